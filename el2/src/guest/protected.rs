//! A protected guest's calls about its memory and devices: KVM's vendor calls, and its measurement.
//!
//! Invariant: the host reaches a page of a protected guest only between the guest's own MEM_SHARE and
//! MEM_UNSHARE; and once a guest has enrolled, no access of its leaves it for the host's devices
//! except on pages that it has named itself.
//!
//! Source: Linux's `Documentation/virt/kvm/arm/hypercalls.rst` and `drivers/virt/coco/pkvm-guest`
//! for the numbers and arguments; the range forms are Android's: `x2` is a number of pages, 0 or 1
//! for one, and `x1` of the answer says how many were done.

use crate::sync::SpinLock;

use super::smccc::INVALID_PARAMETER;

/// Granule of protection in bytes.
pub const GRANULE: u64 = 4096;
/// Most pages that one call moves: what EL2 does at once.
pub const MAX_PAGES: u64 = 512;
/// Most separate ranges of guarded pages.
pub const MAX_GUARDED: usize = 64;

const HYP_MEMINFO: u32 = 0xc600_0002;
const MEM_SHARE: u32 = 0xc600_0003;
const MEM_UNSHARE: u32 = 0xc600_0004;
const GUARD_INFO: u32 = 0xc600_0005;
const GUARD_ENROLL: u32 = 0xc600_0006;
const GUARD_MAP: u32 = 0xc600_0007;
const GUARD_UNMAP: u32 = 0xc600_0008;
const MEM_RELINQUISH: u32 = 0xc600_0009;
const GUARD_RANGE_MAP: u32 = 0xc600_000a;
const GUARD_RANGE_UNMAP: u32 = 0xc600_000b;

/// Bitmap of these calls by function number, with VENDOR_FEATURES itself.
pub const FEATURES: u64 = 0xffd;
/// HYP_MEMINFO's `x1`: the calls about memory take ranges.
const RANGES: u64 = 1;

/// What to do with pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MemoryCall {
    /// Let the host reach them.
    Share,
    /// End that.
    Unshare,
    /// Give them to the host, wiped.
    Relinquish,
}

/// What a call asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Request {
    /// `x0` and `x1` of the answer.
    Answer(u64, u64),
    /// Something with pages from this IPA.
    Memory {
        /// What.
        call: MemoryCall,
        /// First page.
        ipa: u64,
        /// How many: 1 to [`MAX_PAGES`].
        pages: u64,
    },
    /// The measurement's half with this number, in `x1` and `x2`.
    Measurement {
        /// 0 or 1.
        half: u64,
    },
}

const INVALID: Request = Request::Answer(INVALID_PARAMETER, 0);

/// Decides a call with `x1` to `x3`; `None` if it is none of these. `guard` is the VM's.
pub fn call(id: u32, [ipa, count, third]: [u64; 3], guard: &MmioGuard) -> Option<Request> {
    let memory = |call| {
        pages(ipa, count, third, MAX_PAGES).map(|pages| Request::Memory { call, ipa, pages })
    };
    let guarded = |most, map: bool| {
        let pages = pages(ipa, count, third, most)?;
        let done = if map {
            guard.map(ipa, pages)
        } else {
            guard.unmap(ipa, pages)
        };
        done.then_some(Request::Answer(0, pages))
    };
    let request = match id {
        HYP_MEMINFO if [ipa, count, third] == [0; 3] => Some(Request::Answer(GRANULE, RANGES)),
        MEM_SHARE => memory(MemoryCall::Share),
        MEM_UNSHARE => memory(MemoryCall::Unshare),
        MEM_RELINQUISH => memory(MemoryCall::Relinquish),
        GUARD_INFO if [ipa, count, third] == [0; 3] => Some(Request::Answer(GRANULE, 0)),
        GUARD_ENROLL if [ipa, count, third] == [0; 3] => {
            guard.enroll();
            Some(Request::Answer(0, 0))
        }
        // Linux passes the page's attributes along; they are the guest's own business.
        GUARD_MAP => {
            let mapped = ipa.is_multiple_of(GRANULE) && guard.map(ipa, 1);
            mapped.then_some(Request::Answer(0, 0))
        }
        GUARD_UNMAP => guarded(1, false),
        GUARD_RANGE_MAP => guarded(u64::MAX, true),
        GUARD_RANGE_UNMAP => guarded(u64::MAX, false),
        abi::GUEST_MEASUREMENT if ipa < 2 && [count, third] == [0; 2] => {
            Some(Request::Measurement { half: ipa })
        }
        HYP_MEMINFO | GUARD_INFO | GUARD_ENROLL | abi::GUEST_MEASUREMENT => None,
        _ => return None,
    };
    Some(request.unwrap_or(INVALID))
}

/// The number of pages that the arguments name, if they are right.
fn pages(ipa: u64, count: u64, third: u64, most: u64) -> Option<u64> {
    let count = count.clamp(1, most);
    let bytes = count.checked_mul(GRANULE)?;
    let right = third == 0 && ipa.is_multiple_of(GRANULE) && ipa.checked_add(bytes).is_some();
    right.then_some(count)
}

/// The pages on which a guest expects emulated devices.
#[derive(Debug, Default)]
pub struct MmioGuard {
    state: SpinLock<Guarded>,
}

#[derive(Debug, Default)]
struct Guarded {
    enrolled: bool,
    /// Separate, neither empty nor adjacent, in order: first byte and the byte behind the last.
    ranges: heapless::Vec<(u64, u64), MAX_GUARDED>,
}

impl MmioGuard {
    /// Nothing is guarded.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: SpinLock::new(Guarded {
                enrolled: false,
                ranges: heapless::Vec::new(),
            }),
        }
    }

    /// From now on only the named pages have devices.
    pub fn enroll(&self) {
        self.state.lock().enrolled = true;
    }

    /// Whether an access at `ipa` may go to the host.
    #[must_use]
    pub fn allows(&self, ipa: u64) -> bool {
        let state = self.state.lock();
        let named = |(start, end): &(u64, u64)| (*start..*end).contains(&ipa);
        !state.enrolled || state.ranges.iter().any(named)
    }

    /// Names pages; says whether there was room. They may have been named before.
    pub fn map(&self, ipa: u64, pages: u64) -> bool {
        let mut state = self.state.lock();
        let Some(mut new) = span(ipa, pages) else {
            return false;
        };
        let touches = |(start, end): &(u64, u64)| *start <= new.1 && new.0 <= *end;
        let joined: heapless::Vec<_, MAX_GUARDED> =
            state.ranges.iter().copied().filter(touches).collect();
        if joined.is_empty() && state.ranges.is_full() {
            return false;
        }
        for (start, end) in joined {
            new = (new.0.min(start), new.1.max(end));
        }
        state
            .ranges
            .retain(|(start, end)| new.1 < *start || *end < new.0);
        let at = state.ranges.iter().take_while(|r| r.0 < new.0).count();
        state.ranges.insert(at, new).is_ok()
    }

    /// Forgets pages, which all must be named; says whether they were and there was room.
    pub fn unmap(&self, ipa: u64, pages: u64) -> bool {
        let mut state = self.state.lock();
        let Some((from, to)) = span(ipa, pages) else {
            return false;
        };
        let holds = |(start, end): &(u64, u64)| *start <= from && to <= *end;
        let Some(at) = state.ranges.iter().position(holds) else {
            return false;
        };
        let Some((start, end)) = state.ranges.get(at).copied() else {
            return false;
        };
        if start < from && to < end && state.ranges.is_full() {
            return false;
        }
        state.ranges.remove(at);
        let rest = [(to, end), (start, from)];
        // There is room: one went, at most two come, and where two come there was one to spare.
        rest.into_iter()
            .filter(|(start, end)| start < end)
            .all(|part| state.ranges.insert(at, part).is_ok())
    }
}

fn span(ipa: u64, pages: u64) -> Option<(u64, u64)> {
    Some((ipa, ipa.checked_add(pages.checked_mul(GRANULE)?)?))
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const UART: u64 = 0x900_0000;

    fn ask(id: u32, args: [u64; 3]) -> Option<Request> {
        call(id, args, &MmioGuard::new())
    }

    #[test]
    fn the_bitmap_has_a_bit_for_each_call_and_no_other() {
        let guard = MmioGuard::new();
        for number in 0..64u32 {
            let known = call(0xc600_0000 + number, [0; 3], &guard).is_some();
            let told = FEATURES & 1 << number != 0 && number != 0;
            assert_eq!(known, told, "{number}");
        }
    }

    #[test]
    fn a_page_is_4096_bytes_and_there_are_ranges() {
        assert_eq!(ask(0xc600_0002, [0; 3]), Some(Request::Answer(4096, 1)));
        assert_eq!(ask(0xc600_0005, [0; 3]), Some(Request::Answer(4096, 0)));
    }

    #[test]
    fn sharing_takes_one_page_or_a_range_up_to_the_limit() {
        let share = |pages| {
            Some(Request::Memory {
                call: MemoryCall::Share,
                ipa: 0x4000_0000,
                pages,
            })
        };
        for (count, pages) in [
            (0, 1),
            (1, 1),
            (7, 7),
            (512, 512),
            (513, 512),
            (u64::MAX, 512),
        ] {
            assert_eq!(ask(0xc600_0003, [0x4000_0000, count, 0]), share(pages));
        }
    }

    #[test]
    fn wrong_arguments_are_refused_by_every_call() {
        for id in [
            0xc600_0003,
            0xc600_0004,
            0xc600_0008,
            0xc600_0009,
            0xc600_000a,
            0xc600_000b,
        ] {
            assert_eq!(ask(id, [0x1001, 0, 0]), Some(INVALID), "{id:#x}");
            assert_eq!(ask(id, [0x1000, 0, 1]), Some(INVALID), "{id:#x}");
            assert_eq!(ask(id, [u64::MAX - 4095, 1, 0]), Some(INVALID), "{id:#x}");
        }
        for id in [0xc600_0002, 0xc600_0005, 0xc600_0006] {
            assert_eq!(ask(id, [0, 1, 0]), Some(INVALID), "{id:#x}");
        }
        assert_eq!(ask(abi::GUEST_MEASUREMENT, [2, 0, 0]), Some(INVALID));
        assert_eq!(ask(0xc600_0007, [1, 0, 0]), Some(INVALID));
    }

    #[test]
    fn devices_are_anywhere_until_the_guest_enrolls() {
        let guard = MmioGuard::new();
        assert!(guard.allows(UART));
        assert_eq!(
            call(0xc600_0007, [UART, 0x13, 0], &guard),
            Some(Request::Answer(0, 0))
        );
        assert_eq!(
            call(0xc600_0006, [0; 3], &guard),
            Some(Request::Answer(0, 0))
        );
        assert!(guard.allows(UART + 0xfff) && !guard.allows(UART + 0x1000));
        assert_eq!(
            call(0xc600_0008, [UART, 0, 0], &guard),
            Some(Request::Answer(0, 1))
        );
        assert!(!guard.allows(UART));
        assert_eq!(call(0xc600_0008, [UART, 0, 0], &guard), Some(INVALID));
    }

    #[test]
    fn a_full_guard_refuses_and_keeps_what_it_has() {
        let guard = MmioGuard::new();
        guard.enroll();
        for n in 0..MAX_GUARDED as u64 {
            assert!(guard.map(n * 0x4000, 3));
        }
        assert!(!guard.map(0x100_0000, 1));
        assert!(!guard.unmap(0x1000, 1), "would need room for two parts");
        assert!(guard.allows(0x1000) && guard.allows(0x2fff) && !guard.allows(0x3000));
        assert!(guard.map(0x3000, 1), "joins two");
        assert!(guard.map(0x100_0000, 1));
    }

    proptest! {
        /// The ranges say what a set of pages would.
        #[test]
        fn the_guard_is_a_set_of_pages(
            steps in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..6), 1..60)
        ) {
            let guard = MmioGuard::new();
            guard.enroll();
            let mut model = BTreeSet::new();
            for (map, at, count) in steps {
                let pages = at..at + count;
                if map {
                    prop_assert!(guard.map(at * GRANULE, count));
                    model.extend(pages);
                } else {
                    let all = pages.clone().all(|page| model.contains(&page));
                    prop_assert_eq!(guard.unmap(at * GRANULE, count), all);
                    if all {
                        model.retain(|page| !pages.contains(page));
                    }
                }
                for page in 0..48 {
                    prop_assert_eq!(guard.allows(page * GRANULE), model.contains(&page));
                }
            }
        }
    }
}
