//! What the CPU must offer, checked by name before anything is used.
//!
//! Two levels: without a *required* capability the hypervisor refuses the machine and says which
//! one is missing; without an *optional* one it takes another path, and says so, too.

use stage2::{EptConfig, Offered};

use crate::controls::{self, Controls};

/// CPUID and MSR words of one CPU, as read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// CPUID.1:ECX.
    pub cpuid_1_ecx: u32,
    /// CPUID.1:EDX.
    pub cpuid_1_edx: u32,
    /// CPUID.80000008H:EAX bits 7:0, MAXPHYADDR.
    pub physical_bits: u8,
    /// IA32_FEATURE_CONTROL, after an attempt to set it if the firmware left it open.
    pub feature_control: u64,
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// IA32_VMX_TRUE_PINBASED_CTLS, or the older register where there is no true one.
    pub pin: u64,
    /// IA32_VMX_TRUE_PROCBASED_CTLS, likewise.
    pub primary: u64,
    /// IA32_VMX_PROCBASED_CTLS2; 0 if there are no secondary controls.
    pub secondary: u64,
    /// IA32_VMX_TRUE_EXIT_CTLS, likewise.
    pub exit: u64,
    /// IA32_VMX_TRUE_ENTRY_CTLS, likewise.
    pub entry: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_EPT_VPID_CAP; 0 if there is neither EPT nor VPID.
    pub ept_vpid: u64,
}

/// A required capability that the CPU, or its firmware, does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// CPUID.1:ECX.VMX is 0.
    #[error("the CPU has no VMX")]
    Vmx,
    /// IA32_FEATURE_CONTROL is locked with VMX outside SMX off.
    #[error("the firmware has switched VMX off (IA32_FEATURE_CONTROL {0:#x})")]
    SwitchedOff(u64),
    /// The VMCS must be write-back memory.
    #[error("VMCS regions of memory type {0} are not supported")]
    VmcsMemoryType(u64),
    /// No secondary processor-based controls, or EPT is not among them.
    #[error("the CPU has no EPT")]
    Ept,
    /// No walks of four levels.
    #[error("EPT walks of four levels are missing")]
    FourLevels,
    /// No write-back paging structures.
    #[error("EPT paging structures cannot be write-back memory")]
    WriteBackTables,
    /// No 2 MiB pages in EPT.
    #[error("EPT has no 2 MiB pages")]
    LargePages,
    /// INVEPT, or its single-context or all-context type.
    #[error("INVEPT is missing (IA32_VMX_EPT_VPID_CAP {0:#x})")]
    Invept(u64),
    /// INVVPID, or its single-context type.
    #[error("INVVPID is missing (IA32_VMX_EPT_VPID_CAP {0:#x})")]
    Invvpid(u64),
    /// A bit of a control word.
    #[error("the control '{0}' is missing")]
    Control(&'static str),
    /// MTRRs of the host.
    #[error("the CPU has no MTRRs or no PAT")]
    MemoryTypes,
}

/// What is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// VMCS revision identifier.
    pub revision: u32,
    /// For the EPT format.
    pub ept: EptConfig,
    /// The control words that every vCPU starts with.
    pub controls: Controls,
    /// The preemption timer counts down by 1 every 2^this ticks of the time-stamp counter, 0 to 31.
    pub timer_shift: u32,
    /// CPUID.1:EDX.SS: uncached accesses find the CPU's own cached lines.
    pub self_snoop: Offered,
}

/// IA32_FEATURE_CONTROL: locked, VMX outside SMX.
const LOCKED: u64 = 1 << 0;
const VMX_OUTSIDE_SMX: u64 = 1 << 2;
/// IA32_VMX_BASIC: memory type of VMCS regions; write-back.
const VMCS_TYPE_SHIFT: u32 = 50;
const WRITE_BACK: u64 = 6;

impl Words {
    const CPUID_VMX: u32 = 1 << 5;
    const CPUID_MTRR: u32 = 1 << 12;
    const CPUID_PAT: u32 = 1 << 16;
    const CPUID_SELF_SNOOP: u32 = 1 << 27;

    /// What to write to IA32_FEATURE_CONTROL when the firmware has not locked it, `None` if
    /// it has.
    #[must_use]
    pub const fn feature_control_to_set(feature_control: u64) -> Option<u64> {
        if feature_control & LOCKED == 0 {
            Some(feature_control | LOCKED | VMX_OUTSIDE_SMX)
        } else {
            None
        }
    }

    /// Checks everything that is used (SDM vol. 3D appendix A).
    ///
    /// # Errors
    /// The first missing capability.
    pub fn check(&self) -> Result<Capabilities, Missing> {
        self.check_vmx()?;
        let (primary, secondary) = controls::execution(self.primary, self.secondary)?;
        self.check_ept()?;
        let memory_types = Self::CPUID_MTRR | Self::CPUID_PAT;
        if self.cpuid_1_edx & memory_types != memory_types {
            return Err(Missing::MemoryTypes);
        }
        let revision = (self.basic & 0x7fff_ffff) as u32;
        Ok(Capabilities {
            revision,
            ept: self.ept_config(),
            controls: Controls {
                pin: controls::pin(self.pin)?,
                primary,
                secondary,
                exit: controls::exit(self.exit)?,
                entry: controls::entry(self.entry)?,
            },
            timer_shift: u32::from((self.misc & 0x1f).to_le_bytes()[0]),
            self_snoop: offered(u64::from(self.cpuid_1_edx & Self::CPUID_SELF_SNOOP)),
        })
    }

    fn check_vmx(&self) -> Result<(), Missing> {
        if self.cpuid_1_ecx & Self::CPUID_VMX == 0 {
            return Err(Missing::Vmx);
        }
        let on = LOCKED | VMX_OUTSIDE_SMX;
        if self.feature_control & on != on {
            return Err(Missing::SwitchedOff(self.feature_control));
        }
        match self.basic >> VMCS_TYPE_SHIFT & 0xf {
            WRITE_BACK => Ok(()),
            other => Err(Missing::VmcsMemoryType(other)),
        }
    }

    /// IA32_VMX_EPT_VPID_CAP (SDM vol. 3D A.10).
    fn check_ept(&self) -> Result<(), Missing> {
        let has = |bits: u64| self.ept_vpid & bits == bits;
        let needs = [
            (1 << 6, Missing::FourLevels),
            (1 << 14, Missing::WriteBackTables),
            (1 << 16, Missing::LargePages),
            (1 << 20 | 1 << 25 | 1 << 26, Missing::Invept(self.ept_vpid)),
            (1 << 32 | 1 << 41, Missing::Invvpid(self.ept_vpid)),
        ];
        match needs.into_iter().find(|(bits, _)| !has(*bits)) {
            Some((_, missing)) => Err(missing),
            None => Ok(()),
        }
    }

    fn ept_config(&self) -> EptConfig {
        EptConfig {
            output_bits: self.physical_bits,
            execute_only: offered(self.ept_vpid & 1),
            gigabyte: offered(self.ept_vpid & 1 << 17),
            access_dirty: offered(self.ept_vpid & 1 << 21),
        }
    }
}

impl Capabilities {
    /// Optional capabilities that are missing, in words.
    pub fn absent(&self) -> impl Iterator<Item = &'static str> {
        let options = [
            (self.ept.gigabyte, "1 GiB pages in EPT"),
            (self.ept.access_dirty, "accessed and dirty flags in EPT"),
            (self.ept.execute_only, "execute-only pages in EPT"),
            (self.self_snoop, "self-snoop"),
        ];
        options
            .into_iter()
            .filter(|(there, _)| *there == Offered::No)
            .map(|(_, name)| name)
    }
}

fn offered(bits: u64) -> Offered {
    if bits == 0 { Offered::No } else { Offered::Yes }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Bochs 2.7, `corei7_skylake_x`.
    pub(crate) const SKYLAKE: Words = Words {
        cpuid_1_ecx: 0x77fa_f3bf,
        cpuid_1_edx: 0xbfeb_fbff,
        physical_bits: 40,
        feature_control: 5,
        basic: 0x00d8_1000_0000_002b,
        pin: 0x0000_007f_0000_0016,
        primary: 0xf7f9_fffe_0400_6172,
        secondary: 0x0217_7fff_0000_0000,
        exit: 0x007f_ffff_0003_6dfb,
        entry: 0x0000_ffff_0000_11fb,
        misc: 0x6004_01e0,
        ept_vpid: 0x0000_0f01_0633_4141,
    };

    fn with(change: impl Fn(&mut Words)) -> Result<Capabilities, Missing> {
        let mut words = SKYLAKE;
        change(&mut words);
        words.check()
    }

    #[test]
    fn a_complete_cpu_passes() {
        let c = SKYLAKE.check().unwrap();
        assert_eq!(c.revision, 0x2b);
        assert_eq!(c.ept.output_bits, 40);
        assert_eq!(c.timer_shift, 0);
        assert_eq!(c.absent().count(), 0);
    }

    #[test]
    fn every_missing_capability_has_its_name() {
        assert_eq!(with(|w| w.cpuid_1_ecx = 0), Err(Missing::Vmx));
        assert_eq!(
            with(|w| w.feature_control = 1),
            Err(Missing::SwitchedOff(1))
        );
        assert_eq!(
            with(|w| w.basic &= !(0xf << 50)),
            Err(Missing::VmcsMemoryType(0))
        );
        // Penryn: no EPT among the secondary controls; an older one has no such controls.
        assert_eq!(with(|w| w.secondary = 0x41 << 32), Err(Missing::Ept));
        assert_eq!(with(|w| w.secondary = 0), Err(Missing::Ept));
        assert_eq!(with(|w| w.ept_vpid &= !(1 << 6)), Err(Missing::FourLevels));
        assert_eq!(
            with(|w| w.ept_vpid &= !(1 << 14)),
            Err(Missing::WriteBackTables)
        );
        assert_eq!(with(|w| w.ept_vpid &= !(1 << 16)), Err(Missing::LargePages));
        assert!(matches!(
            with(|w| w.ept_vpid &= !(1 << 25)),
            Err(Missing::Invept(_))
        ));
        assert!(matches!(
            with(|w| w.ept_vpid &= !(1 << 32)),
            Err(Missing::Invvpid(_))
        ));
        assert_eq!(
            with(|w| w.secondary &= !(1 << 39)),
            Err(Missing::Control("unrestricted guest"))
        );
        assert_eq!(
            with(|w| w.pin &= !(1 << 38)),
            Err(Missing::Control("preemption timer"))
        );
        assert_eq!(with(|w| w.cpuid_1_edx = 0), Err(Missing::MemoryTypes));
    }

    #[test]
    fn what_is_optional_is_reported_and_configured() {
        // Sandy Bridge: no 1 GiB pages, no accessed and dirty flags.
        let c = with(|w| w.ept_vpid &= !(1 << 17 | 1 << 21)).unwrap();
        assert_eq!(c.ept.gigabyte, Offered::No);
        assert_eq!(c.ept.access_dirty, Offered::No);
        let absent: std::vec::Vec<_> = c.absent().collect();
        assert_eq!(
            absent,
            ["1 GiB pages in EPT", "accessed and dirty flags in EPT"]
        );
    }

    #[test]
    fn an_open_feature_control_register_is_set_and_locked() {
        assert_eq!(Words::feature_control_to_set(0), Some(5));
        assert_eq!(Words::feature_control_to_set(5), None);
        assert_eq!(Words::feature_control_to_set(1), None);
    }
}
