//! VMCS fields by name (SDM vol. 3D appendix B), and access to the current VMCS.

/// The encoding of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Field(u32);

impl Field {
    /// The guest's four PAE page-directory pointers.
    pub const PDPTES: [Self; 4] = [
        Self::PDPTE0,
        Self::PDPTE0.nth(1),
        Self::PDPTE0.nth(2),
        Self::PDPTE0.nth(3),
    ];

    /// The encoding that VMREAD and VMWRITE take.
    #[must_use]
    #[inline]
    pub const fn encoding(self) -> u32 {
        self.0
    }

    const fn nth(self, n: u32) -> Self {
        Self(self.0 + 2 * n)
    }
}

macro_rules! fields {
    ($($name:ident = $encoding:literal, $what:literal;)*) => {
        impl Field {
            $(#[doc = $what] pub const $name: Self = Self($encoding);)*
        }
    };
}

fields! {
    VPID = 0x0000, "Virtual-processor identifier.";
    ES_SELECTOR = 0x0800, "Guest ES; the other segments follow.";
    HOST_ES_SELECTOR = 0x0c00, "Host ES.";
    HOST_CS_SELECTOR = 0x0c02, "Host CS.";
    HOST_SS_SELECTOR = 0x0c04, "Host SS.";
    HOST_DS_SELECTOR = 0x0c06, "Host DS.";
    HOST_FS_SELECTOR = 0x0c08, "Host FS.";
    HOST_GS_SELECTOR = 0x0c0a, "Host GS.";
    HOST_TR_SELECTOR = 0x0c0c, "Host TR.";
    MSR_BITMAP = 0x2004, "Address of the MSR bitmaps.";
    EPT_POINTER = 0x201a, "EPT pointer.";
    GUEST_PHYSICAL = 0x2400, "Guest-physical address of an EPT exit.";
    LINK_POINTER = 0x2800, "VMCS link pointer, all ones.";
    DEBUGCTL = 0x2802, "Guest IA32_DEBUGCTL.";
    PAT = 0x2804, "Guest IA32_PAT.";
    EFER = 0x2806, "Guest IA32_EFER.";
    PDPTE0 = 0x280a, "First of the guest's four PAE page-directory pointers.";
    HOST_PAT = 0x2c00, "Host IA32_PAT.";
    HOST_EFER = 0x2c02, "Host IA32_EFER.";
    PIN_CONTROLS = 0x4000, "Pin-based execution controls.";
    PRIMARY_CONTROLS = 0x4002, "Primary processor-based execution controls.";
    EXCEPTION_BITMAP = 0x4004, "Exceptions that exit.";
    EXIT_CONTROLS = 0x400c, "VM-exit controls.";
    ENTRY_CONTROLS = 0x4012, "VM-entry controls.";
    ENTRY_EVENT = 0x4016, "Event to inject at the next entry.";
    ENTRY_EVENT_ERROR = 0x4018, "Its error code.";
    ENTRY_INSTRUCTION_LENGTH = 0x401a, "Length of the instruction that raised it.";
    SECONDARY_CONTROLS = 0x401e, "Secondary processor-based execution controls.";
    INSTRUCTION_ERROR = 0x4400, "Why the last VMX instruction failed.";
    EXIT_REASON = 0x4402, "Exit reason.";
    EXIT_EVENT = 0x4404, "The interrupt or exception that caused an exit.";
    VECTORING_EVENT = 0x4408, "The event whose delivery an exit interrupted.";
    VECTORING_ERROR = 0x440a, "Its error code.";
    INSTRUCTION_LENGTH = 0x440c, "Length of the instruction that exited.";
    ES_LIMIT = 0x4800, "Guest ES limit; the other segments follow.";
    GDTR_LIMIT = 0x4810, "Guest GDTR limit.";
    IDTR_LIMIT = 0x4812, "Guest IDTR limit.";
    ES_RIGHTS = 0x4814, "Guest ES access rights; the other segments follow.";
    INTERRUPTIBILITY = 0x4824, "Blocking by STI, MOV SS, NMI.";
    ACTIVITY = 0x4826, "Active, halted, shut down, waiting for a start-up IPI.";
    SYSENTER_CS = 0x482a, "Guest IA32_SYSENTER_CS.";
    PREEMPTION_TIMER = 0x482e, "Ticks until the preemption timer fires.";
    HOST_SYSENTER_CS = 0x4c00, "Host IA32_SYSENTER_CS.";
    CR0_MASK = 0x6000, "CR0 bits that the hypervisor owns.";
    CR4_MASK = 0x6002, "CR4 bits that the hypervisor owns.";
    CR0_SHADOW = 0x6004, "What the guest reads of its owned CR0 bits.";
    CR4_SHADOW = 0x6006, "What the guest reads of its owned CR4 bits.";
    QUALIFICATION = 0x6400, "Exit qualification.";
    GUEST_LINEAR = 0x640a, "Guest-linear address of an exit.";
    CR0 = 0x6800, "Guest CR0.";
    CR3 = 0x6802, "Guest CR3.";
    CR4 = 0x6804, "Guest CR4.";
    ES_BASE = 0x6806, "Guest ES base; the other segments follow.";
    GDTR_BASE = 0x6816, "Guest GDTR base.";
    IDTR_BASE = 0x6818, "Guest IDTR base.";
    DR7 = 0x681a, "Guest DR7.";
    RSP = 0x681c, "Guest RSP.";
    RIP = 0x681e, "Guest RIP.";
    RFLAGS = 0x6820, "Guest RFLAGS.";
    PENDING_DEBUG = 0x6822, "Guest pending debug exceptions.";
    SYSENTER_ESP = 0x6824, "Guest IA32_SYSENTER_ESP.";
    SYSENTER_EIP = 0x6826, "Guest IA32_SYSENTER_EIP.";
    HOST_CR0 = 0x6c00, "Host CR0.";
    HOST_CR3 = 0x6c02, "Host CR3.";
    HOST_CR4 = 0x6c04, "Host CR4.";
    HOST_TR_BASE = 0x6c0a, "Host TR base.";
    HOST_GDTR_BASE = 0x6c0c, "Host GDTR base.";
    HOST_IDTR_BASE = 0x6c0e, "Host IDTR base.";
}

/// A segment register, in the order in which the VMCS has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Segment {
    /// ES.
    Es,
    /// CS.
    Cs,
    /// SS.
    Ss,
    /// DS.
    Ds,
    /// FS.
    Fs,
    /// GS.
    Gs,
    /// LDTR.
    Ldtr,
    /// TR.
    Tr,
}

impl Segment {
    /// All eight.
    pub const ALL: [Self; 8] = [
        Self::Es,
        Self::Cs,
        Self::Ss,
        Self::Ds,
        Self::Fs,
        Self::Gs,
        Self::Ldtr,
        Self::Tr,
    ];

    /// Its selector's field.
    #[must_use]
    pub const fn selector(self) -> Field {
        Field::ES_SELECTOR.nth(self as u32)
    }

    /// Its base's field.
    #[must_use]
    pub const fn base(self) -> Field {
        Field::ES_BASE.nth(self as u32)
    }

    /// Its limit's field.
    #[must_use]
    pub const fn limit(self) -> Field {
        Field::ES_LIMIT.nth(self as u32)
    }

    /// Its access rights' field.
    #[must_use]
    pub const fn rights(self) -> Field {
        Field::ES_RIGHTS.nth(self as u32)
    }
}

/// The current VMCS of the CPU that the caller runs on.
pub trait Vmcs {
    /// Reads a field.
    fn read(&self, field: Field) -> u64;
    /// Writes a field.
    fn write(&mut self, field: Field, value: u64);
}

/// A VMCS without a CPU.
#[cfg(test)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FakeVmcs(pub(crate) std::collections::BTreeMap<Field, u64>);

#[cfg(test)]
impl Vmcs for FakeVmcs {
    fn read(&self, field: Field) -> u64 {
        self.0.get(&field).copied().unwrap_or(0)
    }

    fn write(&mut self, field: Field, value: u64) {
        self.0.insert(field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodings by hand from SDM vol. 3D tables B-2, B-11, B-12, B-15.
    #[test]
    fn segments_follow_each_other() {
        assert_eq!(Segment::Cs.selector().encoding(), 0x802);
        assert_eq!(Segment::Tr.selector().encoding(), 0x80e);
        assert_eq!(Segment::Ss.limit().encoding(), 0x4804);
        assert_eq!(Segment::Tr.limit().encoding(), 0x480e);
        assert_eq!(Segment::Ldtr.rights().encoding(), 0x4820);
        assert_eq!(Segment::Gs.base().encoding(), 0x6810);
        assert_eq!(Segment::Tr.base().encoding(), 0x6814);
    }
}
