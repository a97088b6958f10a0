//! Protected VMs: how they come to their memory, how they are sealed, how the host gets pages back.
//!
//! Invariant: what a protected VM finds in its memory when it starts is measured or zero; after that
//! nothing enters it but zeros at addresses that it has never had, or has given away itself.
//!
//! See docs/protection.md. Lock order: stage → the VM's memory → ownership → the host's stage 2.

use abi::{DonationKind, ErrorCode, Exit};
use board::{AddrRange, PAGE_SIZE};
use core::sync::atomic::{AtomicBool, Ordering};
use el2::guest::protected::{MAX_PAGES, MemoryCall, MmioGuard};
use el2::measure::{self, Measurer};
use el2::ownership::OwnershipError;
use el2::page_state::Owner;
use el2::psci::StartOrder;
use el2::vm_error::Refusal;
use memslot::addr::{Gfn, GfnRange};
use memslot::slot::{Memslot, SlotId, SlotKind};
use spin::{Mutex, MutexGuard};
use stage2::{Annotation, Ipa, IpaRange, RunKind};

use crate::arch::mem;
use crate::hypervisor::Hypervisor;
use crate::vm::{HOST_SLOTS, Vm};

/// Note of a page that the host took: forever.
const POISONED: u64 = 1;
/// Note of a page that the guest gave away: until a new one is donated.
const RELINQUISHED: u64 = 2;

/// What makes a VM protected.
#[derive(Debug)]
pub(crate) struct Protection {
    pub(crate) guard: MmioGuard,
    sealed: AtomicBool,
    stage: Mutex<Stage>,
}

/// How far it has come.
#[derive(Debug)]
pub(crate) enum Stage {
    /// The host puts its memory together.
    Building {
        measurer: Measurer,
        expected: Option<[u8; measure::SIZE]>,
    },
    /// It is not what was expected: it never runs.
    Refused,
    /// It may run; this is what it was when it started.
    Sealed([u8; measure::SIZE]),
}

impl Protection {
    pub(crate) const fn new(measurer: Measurer) -> Self {
        Self {
            guard: MmioGuard::new(),
            sealed: AtomicBool::new(false),
            stage: Mutex::new(Stage::Building {
                measurer,
                expected: None,
            }),
        }
    }

    /// Whether it may run.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Keeps it from being sealed; refuses if it is.
    pub(crate) fn building(&self) -> Result<MutexGuard<'_, Stage>, ErrorCode> {
        let stage = self.stage.lock();
        match *stage {
            Stage::Building { .. } => Ok(stage),
            Stage::Refused | Stage::Sealed(_) => Err(ErrorCode::NotPermitted),
        }
    }

    /// A half of the measurement, as two words.
    pub(crate) fn measurement(&self, half: u64) -> Result<[u64; 2], ErrorCode> {
        let Stage::Sealed(measured) = *self.stage.lock() else {
            return Err(ErrorCode::NotPermitted);
        };
        let mut words = measured.as_chunks::<8>().0.iter().copied();
        let skip = if half == 0 { 0 } else { 2 };
        let mut next = || words.next().map_or(0, u64::from_le_bytes);
        for _ in 0..skip {
            next();
        }
        Ok([next(), next()])
    }

    /// Says what the measurement must be.
    pub(crate) fn expect(&self, words: [u64; 4]) -> Result<u64, Refusal> {
        let mut stage = self.building()?;
        match &mut *stage {
            Stage::Building { measurer, expected } if measurer.is_empty() && expected.is_none() => {
                let mut bytes = [0; measure::SIZE];
                for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                    *to = word.to_le_bytes();
                }
                *expected = Some(bytes);
                Ok(0)
            }
            _ => Err(ErrorCode::NotPermitted.into()),
        }
    }
}

/// What became of a guest's call about its memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Moved {
    /// So many pages were moved.
    Pages(u64),
    /// The guest may not do that.
    Refused,
    /// The guest repeats it after the host has done something.
    After(Exit),
}

impl Vm {
    /// The protection of a VM that has one.
    pub(crate) fn protection(&self) -> Result<&Protection, ErrorCode> {
        self.protection.as_ref().ok_or(ErrorCode::NotPermitted)
    }

    /// The slot that holds all of a range, and the memory behind that.
    fn behind(&self, ipa: u64, pages: u64) -> Option<(GfnRange, AddrRange)> {
        let first = Gfn::try_new(ipa / PAGE_SIZE)?;
        let range = GfnRange::from_base(first, pages)?;
        let (slot, _) = self.memory.find_slot(first)?;
        let memory = backing(&slot)?;
        let start = memory.start() + (first.get() - slot.range.start().get()) * PAGE_SIZE;
        let part = AddrRange::with_size(start, pages.checked_mul(PAGE_SIZE)?)?;
        (slot.kind == SlotKind::Ram && memory.contains_range(part)).then_some((range, part))
    }

    /// Whether a slot of this memory may be created: no frame is behind two addresses.
    pub(crate) fn is_new_backing(&self, memory: AddrRange) -> bool {
        let slots = (0..HOST_SLOTS).filter_map(|id| self.memory.slot(SlotId(id)));
        slots
            .filter_map(|slot| backing(&slot))
            .all(|other| !other.overlaps(memory))
    }

    /// What became of a page: [`POISONED`] or [`RELINQUISHED`].
    fn note(&self, ipa: u64, pages: u64) -> Option<Annotation> {
        let range = IpaRange::new(Ipa::new(ipa), pages * PAGE_SIZE).ok()?;
        self.memory.with_table(|table| {
            table.runs(range).ok()?.find_map(|run| match run.kind {
                RunKind::Annotated(note) => Some(note),
                RunKind::Mapped { .. } => None,
            })
        })
    }

    /// Whether the host took the page at `ipa`.
    pub(crate) fn is_poisoned(&self, ipa: u64) -> bool {
        self.note(ipa & !(PAGE_SIZE - 1), 1)
            .is_some_and(|note| note.get() == POISONED)
    }

    /// Gives the guest the pages behind a range of its addresses; the memory that has moved.
    pub(crate) fn donate_memory(
        &self,
        hypervisor: &Hypervisor,
        ipa: u64,
        pages: u64,
        kind: DonationKind,
    ) -> Result<AddrRange, Refusal> {
        let protection = self.protection()?;
        if pages == 0 || pages > kind.max_pages() {
            return Err(ErrorCode::Invalid.into());
        }
        let mut stage = protection.stage.lock();
        let (gfns, memory) = self.behind(ipa, pages).ok_or(ErrorCode::NotFound)?;
        match (&*stage, kind) {
            (Stage::Building { .. }, _) | (Stage::Sealed(_), DonationKind::Zeros) => {}
            _ => return Err(ErrorCode::NotPermitted.into()),
        }
        match self.note(ipa, pages).map(Annotation::get) {
            None => {}
            Some(RELINQUISHED) if pages == 1 => self.memory.release(gfns)?,
            Some(_) => return Err(ErrorCode::NotPermitted.into()),
        }
        let ownership = &hypervisor.ownership;
        ownership.donate(hypervisor.host.map(), memory, Owner::Hypervisor)?;
        let measurer = match &mut *stage {
            Stage::Building { measurer, .. } => Some(measurer),
            Stage::Refused | Stage::Sealed(_) => None,
        };
        match (kind, measurer) {
            (DonationKind::Contents, Some(measurer)) => {
                measurer.contents(ipa, mem::donated_bytes(memory));
            }
            (_, measurer) => {
                mem::wipe_donated(memory);
                if let Some(measurer) = measurer {
                    measurer.zeros(ipa, memory.size());
                }
            }
        }
        ownership.hand_over(memory, self.index)?;
        Ok(memory)
    }

    /// Completes the measurement and makes vCPU 0 runnable.
    pub(crate) fn seal(&self, entry: u64, context: u64) -> Result<u64, Refusal> {
        let protection = self.protection()?;
        let mut stage = protection.building()?;
        let first = self.vcpu(0)?;
        let Stage::Building { measurer, expected } = &*stage else {
            return Err(ErrorCode::NotPermitted.into());
        };
        let measured = measurer.clone().finish(&measure::Start {
            vcpus: self.config.vcpus,
            entry,
            context,
        });
        if expected.is_some_and(|expected| expected != measured) {
            *stage = Stage::Refused;
            return Err(ErrorCode::Mismatch.into());
        }
        let order = StartOrder { entry, context };
        self.power
            .order(first.index, order)
            .map_err(|_| ErrorCode::Invalid)?;
        *stage = Stage::Sealed(measured);
        protection.sealed.store(true, Ordering::Release);
        Ok(0)
    }

    /// Gives a page back to the host that this VM owns; the guest never finds anything there again.
    pub(crate) fn reclaim_page(
        &self,
        hypervisor: &Hypervisor,
        page: AddrRange,
    ) -> Result<u64, Refusal> {
        self.protection()?;
        let slots = (0..HOST_SLOTS).filter_map(|id| self.memory.slot(SlotId(id)));
        let holder = slots
            .filter_map(|slot| Some((slot.range, backing(&slot)?)))
            .find(|(_, memory)| memory.contains_range(page));
        let note = Annotation::try_new(POISONED).ok_or(ErrorCode::Invalid)?;
        if let Some((range, memory)) = holder {
            let skip = (page.start() - memory.start()) / PAGE_SIZE;
            let gfn = Gfn::try_new(range.start().get() + skip).ok_or(ErrorCode::Invalid)?;
            let gfns = GfnRange::from_base(gfn, 1).ok_or(ErrorCode::Invalid)?;
            self.memory.withhold(gfns, note)?;
        }
        // A failure from here leaves a page that nobody reaches; the host repeats the call.
        give_to_host(hypervisor, page, self.index)?;
        Ok(0)
    }

    /// A guest's call about pages of its memory.
    pub(crate) fn memory_call(
        &self,
        hypervisor: &Hypervisor,
        call: MemoryCall,
        ipa: u64,
        pages: u64,
    ) -> Moved {
        let Some((_, page)) = self.behind(ipa, 1) else {
            return Moved::Refused;
        };
        let states = hypervisor.ownership.pages();
        if !states.all_owned_by(page, Owner::Guest(self.index)) {
            return if self.is_poisoned(ipa) || call != MemoryCall::Share {
                Moved::Refused
            } else {
                Moved::After(Exit::MemoryMissing { ipa })
            };
        }
        match self.move_pages(hypervisor, call, ipa, pages.min(MAX_PAGES)) {
            Err(Refusal {
                code: ErrorCode::NotPermitted,
                ..
            }) if pages > 1 => match self.move_pages(hypervisor, call, ipa, 1) {
                Ok(done) => Moved::Pages(done),
                Err(refusal) => moved(refusal),
            },
            Ok(done) => Moved::Pages(done),
            Err(refusal) => moved(refusal),
        }
    }

    fn move_pages(
        &self,
        hypervisor: &Hypervisor,
        call: MemoryCall,
        ipa: u64,
        pages: u64,
    ) -> Result<u64, Refusal> {
        let refused = ErrorCode::NotPermitted;
        let (gfns, memory) = self.behind(ipa, pages).ok_or(refused)?;
        let (ownership, host) = (&hypervisor.ownership, hypervisor.host.map());
        match call {
            MemoryCall::Share => ownership.share(host, memory, self.index)?,
            MemoryCall::Unshare => {
                ownership.unshare(host, memory, self.index)?;
                // What the host wrote past the caches, or left in them, is settled now.
                mem::clean_invalidate_to_poc(memory);
            }
            MemoryCall::Relinquish => {
                let owner = Owner::Guest(self.index);
                if !ownership.pages().all_shared(memory, owner, false) {
                    return Err(refused.into());
                }
                let note = Annotation::try_new(RELINQUISHED).ok_or(refused)?;
                self.memory.withhold(gfns, note)?;
                give_to_host(hypervisor, memory, self.index)?;
            }
        }
        Ok(pages)
    }
}

/// What a refusal means for the guest that asked.
fn moved(refusal: Refusal) -> Moved {
    match refusal.code {
        ErrorCode::NoHeap => Moved::After(Exit::NeedHeap {
            pages: refusal.pages.max(1),
        }),
        ErrorCode::NoMemory => Moved::After(Exit::NeedPages {
            pages: refusal.pages,
        }),
        _ => Moved::Refused,
    }
}

fn backing(slot: &Memslot) -> Option<AddrRange> {
    let start = slot.backing.checked_mul(PAGE_SIZE)?;
    AddrRange::with_size(start, slot.range.npages().checked_mul(PAGE_SIZE)?)
}

/// Wipes pages of a guest that can't reach them any more, and gives them to the host.
pub(crate) fn give_to_host(
    hypervisor: &Hypervisor,
    pages: AddrRange,
    guest: u8,
) -> Result<(), OwnershipError> {
    let owner = Owner::Guest(guest);
    if !hypervisor.ownership.pages().all_owned_by(pages, owner) {
        return Err(OwnershipError::NotOwned(pages));
    }
    mem::wipe_donated(pages);
    hypervisor
        .ownership
        .give_back(hypervisor.host.map(), pages, owner)
}
