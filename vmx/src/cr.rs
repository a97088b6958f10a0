//! The guest's CR0 and CR4.
//!
//! The hypervisor owns CD, NW and NE of CR0: the guest's CD and NW are an input of the memory
//! type and never reach the hardware, which would otherwise run the guest, and the hypervisor's
//! accesses beside it, without caches; NE must be 1 in VMX operation. All other bits are the
//! guest's own ("unrestricted guest"). Of CR4 it owns what CPUID does not offer.

use crate::controls::ENTRY_IA32E;
use crate::field::{Field, Segment, Vmcs};

/// The guest did what raises a general-protection fault with error code 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// CR0.PE, protection.
pub const PE: u64 = 1 << 0;
/// CR0.ET, always 1.
pub const ET: u64 = 1 << 4;
/// CR0.NE.
pub const NE: u64 = 1 << 5;
/// CR0.NW.
pub const NW: u64 = 1 << 29;
/// CR0.CD.
pub const CD: u64 = 1 << 30;
/// CR0.PG, paging.
pub const PG: u64 = 1 << 31;
/// CR0 bits that exist.
const CR0_KNOWN: u64 = 0xe005_003f;
/// CR0 bits that a guest's write exits for.
pub const CR0_OWNED: u64 = CD | NW | NE;

/// CR4.PAE.
pub const PAE: u64 = 1 << 5;
/// CR4.VMXE, must be 1 in VMX operation.
pub const VMXE: u64 = 1 << 13;
/// CR4 bits that the guest's CPUID offers: VME to PCE, OSFXSR, OSXMMEXCPT, FSGSBASE, SMEP, SMAP.
const CR4_OFFERED: u64 = 0x7ff | 1 << 16 | 1 << 20 | 1 << 21;
/// CR4 bits that a guest's write exits for.
pub const CR4_OWNED: u64 = !CR4_OFFERED;

/// EFER.LME.
pub const LME: u64 = 1 << 8;
/// EFER.LMA.
pub const LMA: u64 = 1 << 10;
/// Code segment access rights: 64-bit.
const CS_L: u64 = 1 << 13;

/// What a write to CR0 means beyond the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cr0Change {
    /// The guest's CD after the write.
    pub cd: bool,
    /// The four page-directory pointers must be loaded from CR3.
    pub load_pdptes: bool,
    /// Cached translations of the guest's own tables must go.
    pub flush: bool,
}

/// CR0 as the guest sees it.
#[must_use]
pub fn cr0(vmcs: &impl Vmcs) -> u64 {
    merge(
        vmcs.read(Field::CR0),
        vmcs.read(Field::CR0_SHADOW),
        CR0_OWNED,
    )
}

/// CR4 as the guest sees it.
#[must_use]
pub fn cr4(vmcs: &impl Vmcs) -> u64 {
    merge(
        vmcs.read(Field::CR4),
        vmcs.read(Field::CR4_SHADOW),
        CR4_OWNED,
    )
}

const fn merge(hardware: u64, shadow: u64, owned: u64) -> u64 {
    hardware & !owned | shadow & owned
}

/// Carries out the guest's write to CR0.
///
/// # Errors
/// [`Fault`] as SDM vol. 3A 2.5 and 4.1.2 say; nothing has changed then.
pub fn write_cr0(vmcs: &mut impl Vmcs, value: u64) -> Result<Cr0Change, Fault> {
    let old = cr0(vmcs);
    let value = value | ET;
    let lacks = |bit: u64, needs: u64| value & bit != 0 && value & needs == 0;
    if value & !CR0_KNOWN != 0 || lacks(NW, CD) || lacks(PG, PE) {
        return Err(Fault);
    }
    let turned = (old ^ value) & PG != 0;
    let efer = vmcs.read(Field::EFER);
    let pae = vmcs.read(Field::CR4) & PAE != 0;
    let in_64_bit = efer & LMA != 0 && vmcs.read(Segment::Cs.rights()) & CS_L != 0;
    if turned {
        let long = efer & LME != 0;
        if value & PG != 0 && long && !pae || in_64_bit {
            return Err(Fault);
        }
        set_long_mode(vmcs, efer, long && value & PG != 0);
    }
    vmcs.write(Field::CR0_SHADOW, value);
    set_hardware_cr0(vmcs, value);
    Ok(Cr0Change {
        cd: value & CD != 0,
        load_pdptes: turned && value & PG != 0 && pae && efer & LME == 0,
        flush: turned,
    })
}

/// What the hardware gets for a guest's CR0: caches on, whatever the guest says.
pub fn set_hardware_cr0(vmcs: &mut impl Vmcs, guest: u64) {
    vmcs.write(Field::CR0, guest & !(CD | NW) | NE);
}

/// EFER.LMA follows paging, and the VM-entry control follows EFER.LMA.
fn set_long_mode(vmcs: &mut impl Vmcs, efer: u64, active: bool) {
    let (efer, control) = if active {
        (efer | LMA, ENTRY_IA32E)
    } else {
        (efer & !LMA, 0)
    };
    vmcs.write(Field::EFER, efer);
    let controls = vmcs.read(Field::ENTRY_CONTROLS) & !u64::from(ENTRY_IA32E);
    vmcs.write(Field::ENTRY_CONTROLS, controls | u64::from(control));
}

/// Carries out the guest's write to CR4 that touches bits that are not its own: there is none
/// that it may set.
///
/// # Errors
/// [`Fault`]; nothing has changed then.
pub fn write_cr4(vmcs: &mut impl Vmcs, value: u64) -> Result<(), Fault> {
    let leaves_long_mode = vmcs.read(Field::EFER) & LMA != 0 && value & PAE == 0;
    if value & !CR4_OFFERED != 0 || leaves_long_mode {
        return Err(Fault);
    }
    vmcs.write(Field::CR4_SHADOW, value);
    vmcs.write(Field::CR4, value | VMXE);
    Ok(())
}

/// Carries out the guest's write to EFER.
///
/// # Errors
/// [`Fault`] for bits that CPUID does not offer, and for LME while paging is on (SDM vol. 3A
/// 9.8.5); nothing has changed then.
pub fn write_efer(vmcs: &mut impl Vmcs, value: u64) -> Result<(), Fault> {
    const SCE: u64 = 1 << 0;
    const NXE: u64 = 1 << 11;
    let old = vmcs.read(Field::EFER);
    let paging = vmcs.read(Field::CR0) & PG != 0;
    let known = value & !(SCE | LME | LMA | NXE) == 0;
    if !known || paging && (old ^ value) & LME != 0 {
        return Err(Fault);
    }
    // LMA cannot be written.
    vmcs.write(Field::EFER, value & !LMA | old & LMA);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::FakeVmcs;
    use proptest::prelude::*;

    fn vmcs(cr0: u64, efer: u64, cr4: u64) -> FakeVmcs {
        let mut v = FakeVmcs::default();
        v.write(Field::CR0_SHADOW, cr0);
        set_hardware_cr0(&mut v, cr0);
        v.write(Field::EFER, efer);
        v.write(Field::CR4, cr4 | VMXE);
        v.write(Field::CR4_SHADOW, cr4);
        v
    }

    #[test]
    fn cd_is_seen_by_the_guest_and_by_nobody_else() {
        let mut v = vmcs(PE | ET, 0, 0);
        let change = write_cr0(&mut v, PE | CD).unwrap();
        assert!(change.cd && !change.flush);
        assert_eq!(cr0(&v), PE | ET | CD);
        assert_eq!(v.read(Field::CR0), PE | ET | NE);
        assert!(!write_cr0(&mut v, PE).unwrap().cd);
    }

    #[test]
    fn impossible_combinations_fault_and_change_nothing() {
        for bad in [NW | PE, PG, 1 << 32, 1 << 6] {
            let mut v = vmcs(PE | ET, 0, 0);
            let before = v.clone();
            assert_eq!(write_cr0(&mut v, bad), Err(Fault), "{bad:#x}");
            assert_eq!(v, before);
        }
    }

    #[test]
    fn paging_with_lme_enters_long_mode_and_leaves_it() {
        let mut v = vmcs(PE | ET, LME, PAE);
        assert!(write_cr0(&mut v, PE | PG | CD).unwrap().flush);
        assert_eq!(v.read(Field::EFER), LME | LMA);
        assert_eq!(v.read(Field::ENTRY_CONTROLS), u64::from(ENTRY_IA32E));
        write_cr0(&mut v, PE).unwrap();
        assert_eq!(v.read(Field::EFER), LME);
        assert_eq!(v.read(Field::ENTRY_CONTROLS), 0);
    }

    #[test]
    fn long_mode_needs_pae_and_is_not_left_from_64_bit_code() {
        let mut v = vmcs(PE | ET, LME, 0);
        assert_eq!(write_cr0(&mut v, PE | PG), Err(Fault));
        let mut v = vmcs(PE | ET | PG, LME | LMA, PAE);
        v.write(Segment::Cs.rights(), CS_L | 0x9b);
        assert_eq!(write_cr0(&mut v, PE), Err(Fault));
    }

    #[test]
    fn pae_paging_loads_the_directory_pointers() {
        let mut v = vmcs(PE | ET, 0, PAE);
        assert!(write_cr0(&mut v, PE | PG).unwrap().load_pdptes);
        let mut v = vmcs(PE | ET, 0, 0);
        assert!(!write_cr0(&mut v, PE | PG).unwrap().load_pdptes);
    }

    #[test]
    fn cr4_bits_that_are_not_offered_fault() {
        let mut v = vmcs(PE, 0, 0);
        for bad in [VMXE, 1 << 17, 1 << 18, 1 << 11, 1 << 63] {
            assert_eq!(write_cr4(&mut v, bad), Err(Fault));
        }
        write_cr4(&mut v, PAE | 1 << 9).unwrap();
        assert_eq!(cr4(&v), PAE | 1 << 9);
        assert_eq!(v.read(Field::CR4), PAE | 1 << 9 | VMXE);
    }

    #[test]
    fn lme_does_not_change_under_paging_and_lma_is_not_written() {
        let mut v = vmcs(PE | PG | ET, 0, PAE);
        assert_eq!(write_efer(&mut v, LME), Err(Fault));
        assert_eq!(write_efer(&mut v, 1 << 12), Err(Fault));
        let mut v = vmcs(PE | ET, 0, 0);
        write_efer(&mut v, LME | LMA | 1).unwrap();
        assert_eq!(v.read(Field::EFER), LME | 1);
    }

    proptest! {
        #[test]
        fn caches_stay_on_in_hardware(writes in prop::collection::vec(any::<u64>(), 1..20)) {
            let mut v = vmcs(PE | ET | CD | NW, 0, 0);
            for value in writes {
                let before = cr0(&v);
                let done = write_cr0(&mut v, value & (CR0_KNOWN | 1 << 40));
                prop_assert_eq!(v.read(Field::CR0) & (CD | NW), 0);
                prop_assert_eq!(v.read(Field::CR0) & NE, NE);
                match done {
                    Ok(change) => prop_assert_eq!(change.cd, cr0(&v) & CD != 0),
                    Err(Fault) => prop_assert_eq!(cr0(&v), before),
                }
            }
        }
    }
}
