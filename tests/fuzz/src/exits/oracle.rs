//! What must become of an exit, from the Arm ARM's numbers (DDI 0487, D24.2.40) and docs/protection.md.

use std::cell::RefCell;

use el2::exits::Registers;
use el2::exits::testing::{
    DEVICE, DEVICE_PAGES, Did, El1, FakeVcpu, GICC, Lines, RAM, RAM_PAGES, READ_ONLY,
    READ_ONLY_PAGES, TAKEN_PAGE,
};
use el2::vgic::GicVersion;

use super::{Known, PAGE};

/// The vCPU before an exit.
pub(super) struct Before {
    pub(super) registers: Registers,
    pub(super) esr: u64,
    pub(super) pstate: u64,
    pub(super) pc: u64,
    pub(super) far: u64,
    pub(super) hpfar: u64,
    pub(super) el1: El1,
    pub(super) lines: Lines,
    did: RefCell<Option<Vec<Did>>>,
}

impl Before {
    pub(super) fn new(vcpu: &FakeVcpu<'_, '_>) -> Self {
        Self {
            registers: vcpu.registers,
            esr: vcpu.esr,
            pstate: vcpu.pstate,
            pc: vcpu.pc,
            far: vcpu.far,
            hpfar: vcpu.hpfar,
            el1: vcpu.el1,
            lines: vcpu.lines,
            did: RefCell::new(None),
        }
    }

    /// What the exit did.
    pub(super) fn did(&self, vcpu: &FakeVcpu<'_, '_>) -> Vec<Did> {
        let mut did = self.did.borrow_mut();
        did.get_or_insert_with(|| vcpu.take_did()).clone()
    }

    pub(super) fn bit(&self, n: u32) -> bool {
        self.esr >> n & 1 != 0
    }

    /// PC and PSTATE behind the instruction. No test here is inside an IT block.
    pub(super) fn behind(&self) -> (u64, u64) {
        if self.pstate & 0x10 == 0 {
            return (self.pc.wrapping_add(4), self.pstate);
        }
        let length = if self.bit(25) { 4 } else { 2 };
        (self.pc.wrapping_add(length) & 0xffff_ffff, self.pstate)
    }

    /// A general register's number in the syndrome.
    pub(super) fn number(&self, shift: u32) -> u8 {
        (self.esr >> shift).to_le_bytes()[0] & 31
    }

    fn register(&self, number: u8) -> u64 {
        if number == 31 {
            0
        } else {
            self.registers.0[usize::from(number)]
        }
    }
}

/// What must become of an instruction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    /// It is repeated, and nothing has changed for it.
    Again,
    /// It is repeated; its memory is mapped, to be written if it says so.
    Mapped { ipa: u64, write: bool },
    /// It is stepped over, as if it had done nothing, or something in EL2 alone.
    Behind,
    /// EL2 has answered the load.
    Answered { rt: u8 },
    /// The guest gets an external abort.
    Aborted,
    /// The guest gets an undefined-instruction exception.
    Undefined,
    /// The host completes it.
    Load { ipa: u64, rt: u8, size: u8 },
    /// The host is told of it, and it is stepped over.
    Store { ipa: u64, size: u8, value: u64 },
    /// The host is asked for the page, and it is repeated.
    Missing { ipa: u64 },
    /// The host is asked for tables, or had enough of them already, and it is repeated.
    MayLackTables { ipa: u64, write: bool },
}

/// What there is at an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Gic,
    Ram,
    /// RAM that is not this guest's.
    NotOwned,
    /// RAM that was taken from it for ever.
    Taken,
    ReadOnly,
    Device,
    Nothing,
}

fn place(ipa: u64, vcpu: &FakeVcpu<'_, '_>, known: &Known) -> Place {
    let shape = vcpu.vm.shape;
    let within = |start: u64, size: u64| (start..start + size).contains(&ipa);
    let redistributors = u64::from(shape.vcpus) * 0x2_0000;
    let v3 = shape.gic == GicVersion::V3;
    if within(0x0800_0000, 0x1_0000) || v3 && within(0x080a_0000, redistributors) {
        return Place::Gic;
    }
    if within(RAM, RAM_PAGES * PAGE) {
        let page = (ipa - RAM) / PAGE;
        return match () {
            () if !shape.protected || known.owned.contains(&page) => Place::Ram,
            () if page == TAKEN_PAGE => Place::Taken,
            () => Place::NotOwned,
        };
    }
    match () {
        () if !v3 && within(GICC, 2 * PAGE) => Place::Device,
        () if shape.protected => Place::Nothing,
        () if within(READ_ONLY, READ_ONLY_PAGES * PAGE) => Place::ReadOnly,
        () if within(DEVICE, DEVICE_PAGES * PAGE) => Place::Device,
        () => Place::Nothing,
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Translation,
    Permission,
    AccessFlag,
    Other,
}

/// What must become of an abort.
pub(super) fn of_abort(before: &Before, vcpu: &FakeVcpu<'_, '_>, known: &Known) -> Fate {
    let kind = match before.esr & 0x3f {
        0b00_0100..=0b00_0111 | 0b10_1011 => Kind::Translation,
        0b00_1000..=0b00_1011 => Kind::AccessFlag,
        0b00_1100..=0b00_1111 => Kind::Permission,
        _ => Kind::Other,
    };
    let fetch = before.esr >> 26 & 0x3f == 0x20;
    let (on_walk, no_address) = (before.bit(7), before.bit(10));
    let ipa = if kind == Kind::Permission && !on_walk {
        let Some(page) = vcpu.stage1 else {
            return Fate::Again;
        };
        page | before.far & 0xfff
    } else {
        let page = before.hpfar >> 4 << 12 & 0xf_ffff_ffff_f000;
        let offset = if on_walk || no_address {
            0
        } else {
            before.far & 0xfff
        };
        page | offset
    };
    let place = place(ipa, vcpu, known);
    if place == Place::Gic {
        let plain = kind == Kind::Translation && before.esr & 0x3f < 0x20;
        let emulated = !fetch && plain && !on_walk && !no_address;
        return if emulated {
            emulate(before, ipa, place)
        } else {
            Fate::Aborted
        };
    }
    if kind == Kind::Other {
        return Fate::Aborted;
    }
    // A walk reads tables, and writes them where it may not: FEAT_HAFDBS.
    let write = match on_walk {
        true => kind == Kind::Permission,
        false => !fetch && before.bit(6) && !before.bit(8),
    };
    let mapped = if known.tables {
        Fate::Mapped { ipa, write }
    } else {
        Fate::MayLackTables { ipa, write }
    };
    match place {
        Place::Ram => mapped,
        Place::ReadOnly if !write => mapped,
        Place::Taken => Fate::Aborted,
        Place::NotOwned => Fate::Missing {
            ipa: ipa & !(PAGE - 1),
        },
        Place::Device if on_walk && kind == Kind::Permission => Fate::Aborted,
        Place::Device if fetch && !on_walk => Fate::Aborted,
        Place::Device => mapped,
        _ if fetch => Fate::Aborted,
        _ if is_kept_from_host(ipa, vcpu, known) => Fate::Aborted,
        _ => emulate(before, ipa, place),
    }
}

/// A protected guest that has enrolled reaches the host's devices in the pages that it has named.
fn is_kept_from_host(ipa: u64, vcpu: &FakeVcpu<'_, '_>, known: &Known) -> bool {
    let page = ipa / PAGE;
    let last = known
        .told
        .iter()
        .rev()
        .find(|(pages, _)| pages.contains(&page));
    vcpu.vm.shape.protected && known.enrolled && !last.is_some_and(|(_, named)| *named)
}

/// An access to a device that is emulated, in EL2 or by the host.
fn emulate(before: &Before, ipa: u64, place: Place) -> Fate {
    if before.bit(7) {
        return Fate::Aborted;
    }
    if before.bit(8) {
        return Fate::Behind;
    }
    let size = 1u8 << (before.esr >> 22 & 3);
    if !before.bit(24) || !ipa.is_multiple_of(size.into()) {
        return Fate::Aborted;
    }
    let rt = before.number(16);
    match (before.bit(6), place) {
        (true, Place::Gic) => Fate::Behind,
        (false, Place::Gic) => Fate::Answered { rt },
        (true, _) => {
            let value = before.register(rt) & mask(size);
            Fate::Store { ipa, size, value }
        }
        (false, _) => Fate::Load { ipa, rt, size },
    }
}

/// What a register holds behind a load of `size` bytes of which the host gives `value`.
pub(super) fn loaded(before: &Before, size: u8, value: u64) -> u64 {
    let (signed, wide) = (before.bit(21), before.bit(15));
    let above = !mask(size);
    let unsigned = value & !above;
    let negative = unsigned >> (8 * size - 1) & 1 != 0;
    let extended = if signed && negative {
        unsigned | above
    } else {
        unsigned
    };
    if signed && !wide {
        extended & 0xffff_ffff
    } else {
        extended
    }
}

const fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * size as u32)
}
