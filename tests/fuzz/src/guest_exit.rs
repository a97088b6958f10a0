//! What a guest can make EL2 decode and decide: syndromes, system registers, emulated accesses, calls.

use arbitrary::{Arbitrary, Result, Unstructured};
use el2::esr::{self, Cause};
use el2::guest::entropy::EntropySource;
use el2::guest::idregs::{GuestIds, HardwareIds, Model};
use el2::guest::mmio::{self, Decoded, Extension, MmioAccess};
use el2::guest::protected::{MAX_PAGES, MmioGuard, Request};
use el2::guest::psci::{self, Power};
use el2::guest::smccc::{self, Action, Caller, Mitigation, Mitigations};
use el2::guest::sysreg::{self, Direction, Outcome, Trapped};

const PAGE: u64 = 4096;

/// A guest, and what we know of it.
struct Guest {
    power: Power,
    vcpus: u8,
    ids: GuestIds,
    mitigations: Mitigations,
    guard: Option<MmioGuard>,
    /// What the guard was told, in order: first page, how many, named or forgotten.
    told: Vec<(u64, u64, bool)>,
    enrolled: bool,
}

/// Random numbers that run out.
struct Entropy(std::cell::Cell<u64>);

impl EntropySource for Entropy {
    fn fill(&self, words: &mut [u64]) -> bool {
        words.iter_mut().all(|word| {
            self.0.set(self.0.get().wrapping_add(1));
            *word = self.0.get();
            !self.0.get().is_multiple_of(7)
        })
    }
}

/// A guest that makes a call.
struct Calling<'a>(&'a Guest, &'a Entropy);

impl Caller for Calling<'_> {
    fn power(&self) -> &Power {
        &self.0.power
    }

    fn ids(&self) -> &GuestIds {
        &self.0.ids
    }

    fn mitigations(&self) -> &Mitigations {
        &self.0.mitigations
    }

    fn entropy(&self) -> Option<&dyn EntropySource> {
        Some(self.1)
    }

    fn guard(&self) -> Option<&MmioGuard> {
        self.0.guard.as_ref()
    }

    fn is_memory(&self, ipa: u64) -> bool {
        is_memory(ipa)
    }
}

fn is_memory(ipa: u64) -> bool {
    (0x4000_0000..0x5000_0000).contains(&ipa)
}

/// Runs one input.
pub(crate) fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(mut guest) = guest(&mut input) else {
        return;
    };
    while !input.is_empty() {
        let step = match input.int_in_range(0..=3u8) {
            Ok(0) => abort(&mut input),
            Ok(1) => register(&mut input, &guest),
            Ok(_) => call(&mut input, &mut guest),
            Err(error) => Err(error),
        };
        if step.is_err() {
            return;
        }
    }
}

fn guest(input: &mut Unstructured<'_>) -> Result<Guest> {
    let hardware = HardwareIds {
        pfr0: input.arbitrary()?,
        pfr1: input.arbitrary()?,
        isar0: input.arbitrary()?,
        isar1: input.arbitrary()?,
        isar2: input.arbitrary()?,
        mmfr0: input.arbitrary()?,
        mmfr1: input.arbitrary()?,
        mmfr2: input.arbitrary()?,
    };
    let model = Model {
        ipa_bits: input.int_in_range(32..=52)?,
        gic_v3: input.arbitrary()?,
    };
    let vcpus = input.int_in_range(1..=8)?;
    let power = Power::new(vcpus);
    let guard = bool::arbitrary(input)?.then(MmioGuard::new);
    let enrolled = guard.is_some() && bool::arbitrary(input)?;
    if enrolled {
        guard.iter().for_each(MmioGuard::enroll);
    }
    let mut mitigation = || input.arbitrary().map(Mitigation::from_firmware);
    Ok(Guest {
        power,
        vcpus,
        ids: GuestIds::new(&hardware, &model),
        mitigations: Mitigations {
            workaround_1: mitigation()?,
            workaround_2: mitigation()?,
            workaround_3: mitigation()?,
        },
        guard,
        told: Vec::new(),
        enrolled,
    })
}

/// Any syndrome decodes; an access is one of a general register, and its value has its width.
fn abort(input: &mut Unstructured<'_>) -> Result<()> {
    let class = *input.choose(&[0x01u64, 0x16, 0x17, 0x18, 0x20, 0x24, 0x3f])?;
    let syndrome = class << 26 | u64::from(input.arbitrary::<u32>()? & 0x3ff_ffff);
    let Cause::Abort(abort) = esr::decode(syndrome) else {
        assert!(class != 0x20 && class != 0x24);
        return Ok(());
    };
    let (hpfar, far) = (input.arbitrary()?, input.arbitrary()?);
    let ipa = esr::fault_ipa(&abort, hpfar, far);
    assert_eq!(ipa >> 52, 0);
    if let Decoded::Access(access) = mmio::decode(syndrome) {
        check_access(access, input.arbitrary()?, ipa);
    }
    Ok(())
}

fn check_access(access: MmioAccess, value: u64, ipa: u64) {
    let bits = 8 * u32::from(access.size());
    assert!([8, 16, 32, 64].contains(&bits) && access.rt() < 32);
    let mask = u64::MAX >> (64 - bits);
    assert_eq!(access.stored(value), value & mask);
    assert_eq!(
        access.is_aligned(ipa),
        ipa.is_multiple_of(u64::from(access.size()))
    );
    // A W register that is loaded with 64 bits does not exist: SF is 1 with SAS 3 (Arm ARM D24.2.40).
    if bits == 64 {
        return;
    }
    let loaded = access.loaded(value);
    assert_eq!(loaded & mask, value & mask, "the value's own bits changed");
    let sign = value >> (bits - 1) & 1 == 1;
    let above = match access {
        MmioAccess::Read {
            extension: Extension::SignTo64,
            ..
        } if sign => u64::MAX,
        MmioAccess::Read {
            extension: Extension::SignTo32,
            ..
        } if sign => 0xffff_ffff,
        _ => 0,
    };
    assert_eq!(loaded & !mask, above & !mask, "{access:?} of {value:#x}");
}

/// A guest writes no identification register, and is never told of EL2, EL3, SVE, MPAM, AMU or a PMU.
fn register(input: &mut Unstructured<'_>, guest: &Guest) -> Result<()> {
    let trapped = Trapped::decode(input.arbitrary()?);
    let outcome = sysreg::decide(trapped, &guest.ids);
    let (op0, op1, crn, crm, op2) = trapped.register.parts();
    assert!(trapped.rt < 32);
    if (op0, op1, crn) == (3, 0, 0) && (1..=7).contains(&crm) {
        match (trapped.direction, outcome) {
            (Direction::Read, Outcome::Read(value)) => check_id(crm, op2, value),
            (direction, outcome) => {
                assert_eq!((direction, outcome), (Direction::Write, Outcome::Undefined));
            }
        }
    }
    if let Outcome::Read(_) = outcome {
        assert_eq!(trapped.direction, Direction::Read);
    }
    if outcome == Outcome::WriteIgnored {
        assert_eq!(trapped.direction, Direction::Write);
    }
    Ok(())
}

fn check_id(crm: u8, op2: u8, value: u64) {
    let field = |shift: u32| value >> shift & 0xf;
    match (crm, op2) {
        // ID_AA64PFR0_EL1: EL2, EL3, RAS, SVE, SEL2, MPAM, AMU; EL0 and EL1 in AArch64 only.
        (4, 0) => {
            for shift in [8, 12, 28, 32, 36, 40, 44] {
                assert_eq!(field(shift), 0, "ID_AA64PFR0_EL1 bit {shift}");
            }
            assert_eq!(value & 0xff, 0x11);
        }
        // ID_AA64PFR1_EL1: MTE, SME.
        (4, 1) => assert_eq!((field(8), field(24)), (0, 0)),
        // ID_AA64DFR0_EL1: trace, PMU, SPE, TRBE; PMUVer 0xf would say "implementation defined".
        (5, 0) => {
            for shift in [4, 8, 32, 44] {
                assert_eq!(field(shift), 0, "ID_AA64DFR0_EL1 bit {shift}");
            }
        }
        // ID_AA64MMFR1_EL1: VHE.
        (7, 1) => assert_eq!(field(8), 0),
        _ => {}
    }
}

fn call(input: &mut Unstructured<'_>, guest: &mut Guest) -> Result<()> {
    let id = id(input)?;
    // Some calls must have no argument.
    let registers = if input.ratio(1, 4u8)? {
        [u64::from(id), 0, 0, 0]
    } else {
        [u64::from(id), address(input)?, small(input)?, last(input)?]
    };
    let immediate = if input.ratio(1, 16u8)? {
        input.arbitrary()?
    } else {
        0
    };
    let entropy = Entropy(std::cell::Cell::new(input.arbitrary()?));
    let action = smccc::call(immediate, registers, &Calling(guest, &entropy));
    match action {
        Action::Protected(request) => check_request(request, registers, guest),
        Action::Power(psci::Action::TurnedOn { index }) => {
            assert!(index < guest.vcpus);
            if input.arbitrary()? {
                let psci::Turn::Starts(order) = guest.power.turn(index) else {
                    panic!("it was turned on");
                };
                assert!(is_memory(order.entry) && order.entry.is_multiple_of(4));
            }
        }
        Action::Power(psci::Action::PowerDown(order)) => assert!(is_memory(order.entry)),
        Action::Power(psci::Action::Off) => guest.power.off(input.int_in_range(0..=9)?),
        Action::Firmware(id) => assert!([0x8000_8000, 0x8000_7fff, 0x8000_3fff].contains(&id)),
        _ => {}
    }
    let about_memory = matches!(action, Action::Protected(_));
    assert!(!about_memory || guest.guard.is_some() && immediate == 0);
    check_guard(guest, address(input)?);
    Ok(())
}

/// Mostly ids that exist.
fn id(input: &mut Unstructured<'_>) -> Result<u32> {
    let low = u32::from(input.arbitrary::<u8>()?);
    Ok(match input.int_in_range(0..=5u8)? {
        0 => input.arbitrary()?,
        1 => 0x8400_0000 | low,
        2 => 0xc400_0000 | low,
        3 => 0xc600_0000 | low | u32::from(low > 0x40) << 8,
        4 => *input.choose(&[
            0x8000_0000,
            0x8000_0001,
            0x8000_8000,
            0x8000_7fff,
            0x8000_3fff,
        ])?,
        _ => input.int_in_range(0xc600_0002..=0xc600_000b)?,
    })
}

/// Mostly pages that meet others, some at the ends of the address space.
fn address(input: &mut Unstructured<'_>) -> Result<u64> {
    let page = u64::from(input.arbitrary::<u8>()?) * PAGE;
    Ok(match input.int_in_range(0..=7u8)? {
        0 => input.arbitrary()?,
        1 => 0u64.wrapping_sub(page),
        2 => 0x4000_0000 + page + u64::from(input.arbitrary::<u8>()?),
        3 => 0x0900_0000 + page,
        _ => 0x0900_0000 + (page & 0xf000),
    })
}

/// A number of pages, or an entry point.
fn small(input: &mut Unstructured<'_>) -> Result<u64> {
    match input.int_in_range(0..=7u8)? {
        0 => input.arbitrary(),
        1 => Ok(0x4000_0000 + u64::from(input.arbitrary::<u8>()?)),
        2 => Ok(input.arbitrary::<u8>()?.into()),
        _ => input.int_in_range(0..=8),
    }
}

/// An argument that most calls do not have.
fn last(input: &mut Unstructured<'_>) -> Result<u64> {
    if input.ratio(1, 8u8)? {
        return input.arbitrary();
    }
    Ok(0)
}

/// What reaches the owner of the pages is in bounds; what the guard did is remembered.
fn check_request(request: Request, [id, ipa, ..]: [u64; 4], guest: &mut Guest) {
    match request {
        Request::Memory { ipa, pages, .. } => {
            assert!(ipa.is_multiple_of(PAGE) && (1..=MAX_PAGES).contains(&pages));
            assert!(ipa.checked_add(pages * PAGE).is_some());
        }
        Request::Measurement { half } => assert!(half < 2),
        Request::Answer(0, pages) => match id {
            0xc600_0006 => guest.enrolled = true,
            // The plain form names one page, the range form says how many it did.
            0xc600_0007 => guest.told.push((ipa, 1, true)),
            0xc600_000a => guest.told.push((ipa, pages, true)),
            0xc600_0008 | 0xc600_000b => guest.told.push((ipa, pages, false)),
            _ => panic!("{id:#x} succeeded"),
        },
        Request::Answer(..) => {}
    }
}

/// Once the guest has enrolled, a page is allowed if and only if the last call about it named it. Asked
/// about the edges of the last call's pages, and about another address.
fn check_guard(guest: &Guest, ipa: u64) {
    let Some(guard) = &guest.guard else { return };
    let edges = guest.told.last().map_or([ipa; 4], |&(start, pages, _)| {
        let end = start + pages * PAGE;
        [start.wrapping_sub(1), start, end - 1, end]
    });
    for ipa in edges.into_iter().chain([ipa]) {
        let about = |told: &&(u64, u64, bool)| ipa.wrapping_sub(told.0) < told.1 * PAGE;
        let named = guest
            .told
            .iter()
            .rev()
            .find(about)
            .is_some_and(|told| told.2);
        assert_eq!(guard.allows(ipa), named || !guest.enrolled, "{ipa:#x}");
    }
}
