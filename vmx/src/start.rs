//! States in which a vCPU starts, and the parts of its VMCS that never change.

use crate::capability::Capabilities;
use crate::controls::ENTRY_IA32E;
use crate::cr::{self, CD, CR0_OWNED, CR4_OWNED, ET, LMA, LME, NE, NW, PAE, PE, PG, VMXE};
use crate::field::{Field, Segment, Vmcs};

/// Where a vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the reset vector, 0xffff_fff0, caches off (SDM vol. 3A table 10-1).
    Reset,
    /// By a start-up IPI: real mode at this page number below 1 MiB.
    StartUp(u8),
    /// In real mode at this linear address below 1 MiB, caches on: what firmware hands over to.
    RealMode(u32),
    /// In 64-bit mode with flat segments, as the 64-bit boot protocol of Linux wants it.
    LongMode {
        /// First instruction.
        rip: u64,
        /// The guest's own page table.
        cr3: u64,
        /// Stack.
        rsp: u64,
        /// Address of a descriptor table with code at 0x10 and data at 0x18.
        gdt: u64,
    },
}

/// Segment access rights (SDM vol. 3C table 25-2).
const CODE_16: u64 = 0x9b;
const DATA_16: u64 = 0x93;
const LDT: u64 = 0x82;
const TSS_BUSY: u64 = 0x8b;
const CODE_64: u64 = 0xa09b;
const DATA_FLAT: u64 = 0xc093;
const UNUSABLE: u64 = 1 << 16;
/// PAT after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// DR7 and RFLAGS after reset.
const DR7_RESET: u64 = 0x400;
const RFLAGS_RESET: u64 = 2;

/// Writes the fields that a vCPU keeps for its life.
pub fn write_constants(
    vmcs: &mut impl Vmcs,
    c: &Capabilities,
    vpid: u16,
    pointer: u64,
    bitmap: u64,
) {
    let fields = [
        (Field::PIN_CONTROLS, u64::from(c.controls.pin)),
        (Field::PRIMARY_CONTROLS, u64::from(c.controls.primary)),
        (Field::SECONDARY_CONTROLS, u64::from(c.controls.secondary)),
        (Field::EXIT_CONTROLS, u64::from(c.controls.exit)),
        (Field::ENTRY_CONTROLS, u64::from(c.controls.entry)),
        (Field::EXCEPTION_BITMAP, 0),
        (Field::VPID, u64::from(vpid)),
        (Field::EPT_POINTER, pointer),
        (Field::MSR_BITMAP, bitmap),
        (Field::LINK_POINTER, u64::MAX),
        (Field::CR0_MASK, CR0_OWNED),
        (Field::CR4_MASK, CR4_OWNED),
    ];
    for (field, value) in fields {
        vmcs.write(field, value);
    }
}

/// Writes the guest's registers for a start. Returns whether CR0.CD is set.
pub fn write_start(vmcs: &mut impl Vmcs, start: Start) -> bool {
    write_common(vmcs);
    let (cr0, cr4, efer) = match start {
        Start::Reset | Start::StartUp(_) => (CD | NW | ET, 0, 0),
        Start::RealMode(_) => (ET, 0, 0),
        Start::LongMode { .. } => (PG | NE | ET | PE | 1 << 1 | 1 << 16, PAE, LME | LMA),
    };
    vmcs.write(Field::CR0_SHADOW, cr0);
    cr::set_hardware_cr0(vmcs, cr0);
    vmcs.write(Field::CR4_SHADOW, cr4);
    vmcs.write(Field::CR4, cr4 | VMXE);
    vmcs.write(Field::EFER, efer);
    let entry = vmcs.read(Field::ENTRY_CONTROLS) & !u64::from(ENTRY_IA32E);
    let long = if efer & LMA == 0 { 0 } else { ENTRY_IA32E };
    vmcs.write(Field::ENTRY_CONTROLS, entry | u64::from(long));
    match start {
        Start::Reset => real_mode(vmcs, 0xf000, 0xffff_0000, 0xfff0),
        Start::StartUp(page) => {
            real_mode(vmcs, u64::from(page) << 8, u64::from(page) << 12, 0);
        }
        Start::RealMode(at) => real_mode(
            vmcs,
            u64::from(at >> 4),
            u64::from(at & !0xf),
            u64::from(at & 0xf),
        ),
        Start::LongMode { rip, cr3, rsp, gdt } => long_mode(vmcs, rip, cr3, rsp, gdt),
    }
    cr0 & CD != 0
}

/// What is the same for all starts.
fn write_common(vmcs: &mut impl Vmcs) {
    let zero = [
        Field::DEBUGCTL,
        Field::ENTRY_EVENT,
        Field::INTERRUPTIBILITY,
        Field::ACTIVITY,
        Field::PENDING_DEBUG,
        Field::SYSENTER_CS,
        Field::SYSENTER_ESP,
        Field::SYSENTER_EIP,
        Field::CR3,
        Field::RSP,
        Field::GDTR_BASE,
        Field::IDTR_BASE,
    ];
    for field in zero {
        vmcs.write(field, 0);
    }
    vmcs.write(Field::PAT, PAT_RESET);
    vmcs.write(Field::DR7, DR7_RESET);
    vmcs.write(Field::RFLAGS, RFLAGS_RESET);
    vmcs.write(Field::GDTR_LIMIT, 0xffff);
    vmcs.write(Field::IDTR_LIMIT, 0xffff);
    segment(vmcs, Segment::Ldtr, 0, 0, 0xffff, LDT | UNUSABLE);
    segment(vmcs, Segment::Tr, 0, 0, 0xffff, TSS_BUSY);
}

fn segment(vmcs: &mut impl Vmcs, s: Segment, selector: u64, base: u64, limit: u64, rights: u64) {
    vmcs.write(s.selector(), selector);
    vmcs.write(s.base(), base);
    vmcs.write(s.limit(), limit);
    vmcs.write(s.rights(), rights);
}

const DATA_SEGMENTS: [Segment; 5] = [
    Segment::Es,
    Segment::Ss,
    Segment::Ds,
    Segment::Fs,
    Segment::Gs,
];

fn real_mode(vmcs: &mut impl Vmcs, selector: u64, base: u64, ip: u64) {
    for s in DATA_SEGMENTS {
        segment(vmcs, s, 0, 0, 0xffff, DATA_16);
    }
    segment(vmcs, Segment::Cs, selector, base, 0xffff, CODE_16);
    vmcs.write(Field::RIP, ip);
}

fn long_mode(vmcs: &mut impl Vmcs, rip: u64, cr3: u64, rsp: u64, gdt: u64) {
    for s in DATA_SEGMENTS {
        segment(vmcs, s, 0x18, 0, 0xffff_ffff, DATA_FLAT);
    }
    segment(vmcs, Segment::Cs, 0x10, 0, 0xffff_ffff, CODE_64);
    vmcs.write(Field::GDTR_BASE, gdt);
    vmcs.write(Field::GDTR_LIMIT, 4 * 8 - 1);
    vmcs.write(Field::CR3, cr3);
    vmcs.write(Field::RIP, rip);
    vmcs.write(Field::RSP, rsp);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::FakeVmcs;

    fn started(start: Start) -> (FakeVmcs, bool) {
        let mut v = FakeVmcs::default();
        let cd = write_start(&mut v, start);
        (v, cd)
    }

    #[test]
    fn reset_is_at_the_top_of_4_gib_with_caches_off_for_the_guest_only() {
        let (v, cd) = started(Start::Reset);
        assert!(cd);
        assert_eq!(v.read(Segment::Cs.base()) + v.read(Field::RIP), 0xffff_fff0);
        assert_eq!(cr::cr0(&v), 0x6000_0010);
        assert_eq!(v.read(Field::CR0), 0x30);
    }

    #[test]
    fn start_up_begins_at_the_vectors_page() {
        let (v, _) = started(Start::StartUp(0x9f));
        assert_eq!(v.read(Segment::Cs.selector()), 0x9f00);
        assert_eq!(v.read(Segment::Cs.base()), 0x9_f000);
        assert_eq!(v.read(Field::RIP), 0);
    }

    #[test]
    fn real_mode_keeps_base_and_selector_consistent() {
        let (v, cd) = started(Start::RealMode(0x1_2345));
        assert!(!cd);
        let (selector, base) = (v.read(Segment::Cs.selector()), v.read(Segment::Cs.base()));
        assert_eq!(selector << 4, base);
        assert_eq!(base + v.read(Field::RIP), 0x1_2345);
    }

    #[test]
    fn long_mode_is_consistent_for_the_entry_checks() {
        let start = Start::LongMode {
            rip: 0x10_0000,
            cr3: 0x9000,
            rsp: 0x8000,
            gdt: 0x500,
        };
        let (v, cd) = started(start);
        assert!(!cd);
        assert_eq!(v.read(Field::EFER), 0x500);
        assert_eq!(v.read(Field::ENTRY_CONTROLS), 1 << 9);
        assert_eq!(v.read(Field::CR0), 0x8001_0033);
        assert_eq!(v.read(Segment::Cs.rights()), 0xa09b);
    }
}
