//! The control words of a VMCS: which bits are asked for, and how the capability registers
//! answer (SDM vol. 3C 25.6 to 25.8, vol. 3D A.3 to A.5).

use crate::capability::Missing;

/// The five control words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based execution controls.
    pub pin: u32,
    /// Primary processor-based execution controls.
    pub primary: u32,
    /// Secondary ones.
    pub secondary: u32,
    /// VM-exit controls.
    pub exit: u32,
    /// VM-entry controls.
    pub entry: u32,
}

type Bit = (u32, &'static str);

/// Interrupts never reach the guest past the hypervisor, and a guest never runs without end.
const PIN: [Bit; 3] = [
    (0, "external-interrupt exiting"),
    (3, "NMI exiting"),
    (6, "preemption timer"),
];

/// CR8 exits because the guest's task priority is not the machine's.
const PRIMARY: [Bit; 6] = [
    (7, "HLT exiting"),
    (19, "CR8-load exiting"),
    (20, "CR8-store exiting"),
    (24, "unconditional I/O exiting"),
    (28, "MSR bitmaps"),
    (31, "secondary controls"),
];

/// WBINVD exits: it would flush the host's lines, too.
const SECONDARY: [Bit; 4] = [
    (1, "EPT"),
    (5, "VPID"),
    (6, "WBINVD exiting"),
    (7, "unrestricted guest"),
];

const EXIT: [Bit; 7] = [
    (2, "save debug controls"),
    (9, "64-bit host"),
    (15, "acknowledge interrupt on exit"),
    (18, "save PAT"),
    (19, "load PAT"),
    (20, "save EFER"),
    (21, "load EFER"),
];

const ENTRY: [Bit; 3] = [
    (2, "load debug controls"),
    (14, "load PAT"),
    (15, "load EFER"),
];

/// VM-entry control that follows EFER.LMA of the guest.
pub const ENTRY_IA32E: u32 = 1 << 9;
/// Primary control: exit as soon as the guest can take an interrupt.
pub const PRIMARY_INTERRUPT_WINDOW: u32 = 1 << 2;

/// The word with the wanted bits and those that must be 1. The capability's low half says which
/// must be 1, its high half which may be.
fn word(capability: u64, wanted: &[Bit]) -> Result<u32, Missing> {
    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    let (must, may) = (capability as u32, (capability >> 32) as u32);
    let mut word = must;
    for (bit, name) in wanted {
        if may & 1 << bit == 0 {
            return Err(Missing::Control(name));
        }
        word |= 1 << bit;
    }
    Ok(word)
}

/// The pin-based word for this capability register.
///
/// # Errors
/// [`Missing::Control`].
pub fn pin(capability: u64) -> Result<u32, Missing> {
    word(capability, &PIN)
}

/// The primary and secondary words for these capability registers.
///
/// # Errors
/// [`Missing::Ept`] where the CPU cannot have it, else [`Missing::Control`].
pub fn execution(primary: u64, secondary: u64) -> Result<(u32, u32), Missing> {
    const EPT_ALLOWED: u64 = 1 << (32 + 1);
    const SECONDARY_ALLOWED: u64 = 1 << (32 + 31);
    if primary & SECONDARY_ALLOWED == 0 || secondary & EPT_ALLOWED == 0 {
        return Err(Missing::Ept);
    }
    Ok((word(primary, &PRIMARY)?, word(secondary, &SECONDARY)?))
}

/// The VM-exit word for this capability register.
///
/// # Errors
/// [`Missing::Control`].
pub fn exit(capability: u64) -> Result<u32, Missing> {
    word(capability, &EXIT)
}

/// The VM-entry word for this capability register.
///
/// # Errors
/// [`Missing::Control`].
pub fn entry(capability: u64) -> Result<u32, Missing> {
    word(capability, &ENTRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_that_must_be_one_are_kept_and_wanted_ones_added() {
        assert_eq!(pin(0x7f_0000_0016), Ok(0x5f));
        assert_eq!(entry(0xffff_0000_11fb), Ok(0xd1ff));
    }

    #[test]
    fn a_bit_that_may_not_be_one_is_named() {
        assert_eq!(pin(0x77_0000_0016), Err(Missing::Control("NMI exiting")));
        assert_eq!(
            pin(0x3f_0000_0016),
            Err(Missing::Control("preemption timer"))
        );
        assert_eq!(entry(0x7fff_0000_11fb), Err(Missing::Control("load EFER")));
    }
}
