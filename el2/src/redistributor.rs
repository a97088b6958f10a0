//! What the host may do with a GICv3's redistributors.
//!
//! Invariant: the interrupt controller reads and writes no table in memory. An ITS and the LPIs of
//! redistributors do so at addresses that software writes into their registers (GITS_BASER,
//! GITS_CBASER, GICR_PROPBASER, GICR_PENDBASER, and GICv4's), past every stage 2. So the ITS is not
//! the host's at all, and of the redistributors, whose pages the host needs for its private
//! interrupts, only the registers below are: EL2 makes each access in its place. LPIs can't be
//! enabled, and GICR_TYPER does not offer them.
//!
//! Source: GICv3 and v4 (Arm IHI 0069H) 12.10 and 12.11. Offsets are from a redistributor's first
//! frame; its private interrupts are in the second one. GICv4 has two more, of which nothing is the
//! host's.

/// Size of a frame.
const FRAME: u64 = 0x1_0000;
/// GICR_CTLR.
const CTLR: u64 = 0x0;
/// GICR_IIDR.
const IIDR: u64 = 0x4;
/// GICR_TYPER, low half.
const TYPER: u64 = 0x8;
/// High half.
const TYPER_HIGH: u64 = 0xc;
/// GICR_STATUSR.
const STATUSR: u64 = 0x10;
/// GICR_WAKER.
const WAKER: u64 = 0x14;
/// Identification registers.
const IDENTIFICATION: u64 = 0xffd0;
/// GICR_CTLR.EnableLPIs.
const ENABLE_LPIS: u32 = 1;
/// GICR_TYPER: PLPIS, VLPIS, Dirty, DirectLPI.
const OFFERS_LPIS: u32 = 0xf;

/// Bits of a 32-bit register that the host reads as they are; the others read as zero.
#[must_use]
pub const fn readable(offset: u64) -> u32 {
    match offset {
        CTLR => !ENABLE_LPIS,
        TYPER => !OFFERS_LPIS,
        IIDR | TYPER_HIGH | STATUSR | WAKER => u32::MAX,
        IDENTIFICATION..FRAME => u32::MAX,
        _ if is_private_interrupts(offset) => u32::MAX,
        _ => 0,
    }
}

/// The bits of a 32-bit register that the host writes; `None` if its write is ignored.
#[must_use]
pub const fn writable(offset: u64) -> Option<u32> {
    match offset {
        CTLR => Some(!ENABLE_LPIS),
        STATUSR | WAKER => Some(u32::MAX),
        _ if is_private_interrupts(offset) => Some(u32::MAX),
        _ => None,
    }
}

const fn is_private_interrupts(offset: u64) -> bool {
    FRAME <= offset && offset < 2 * FRAME
}

/// Whether single bytes of a register can be accessed: the priorities (IHI 0069H 12.1.3).
#[must_use]
pub const fn has_bytes(offset: u64) -> bool {
    const PRIORITIES: u64 = FRAME + 0x400;
    PRIORITIES <= offset && offset < PRIORITIES + 0x60
}

/// Bytes of a redistributor, by the low half of its GICR_TYPER: VLPIS says that it has GICv4's frames.
#[must_use]
pub const fn stride(typer: u32) -> u64 {
    const VLPIS: u32 = 1 << 1;
    if typer & VLPIS == 0 {
        2 * FRAME
    } else {
        4 * FRAME
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lpis_are_neither_offered_nor_enabled() {
        assert_eq!(readable(0x8) & 0xf, 0);
        assert_eq!(readable(0xc), u32::MAX);
        assert_eq!(writable(0x0).map(|bits| bits & 1), Some(0));
        assert_eq!(readable(0x0) & 1, 0);
    }

    /// By the manual's table of the first frame: PROPBASER, PENDBASER, SETLPIR, CLRLPIR, INVLPIR,
    /// INVALLR, SYNCR; and GICv4's VPROPBASER and VPENDBASER.
    #[test]
    fn registers_that_hold_addresses_are_not_the_hosts() {
        let tables = [
            0x70, 0x74, 0x78, 0x7c, 0x2_0070, 0x2_0074, 0x2_0078, 0x2_007c,
        ];
        let commands = [0x40, 0x44, 0x48, 0x4c, 0xa0, 0xa4, 0xb0, 0xb4, 0xc0];
        for offset in tables.into_iter().chain(commands) {
            assert_eq!(
                (readable(offset), writable(offset)),
                (0, None),
                "{offset:#x}"
            );
        }
    }

    #[test]
    fn nothing_unknown_of_the_first_frame_can_be_written() {
        let writes = (0..FRAME).step_by(4).filter(|at| writable(*at).is_some());
        assert_eq!(writes.collect::<std::vec::Vec<_>>(), [0x0, 0x10, 0x14]);
    }

    #[test]
    fn private_interrupts_are_the_hosts() {
        for offset in [0x1_0080, 0x1_0100, 0x1_0280, 0x1_0400, 0x1_0c04] {
            assert_eq!(
                (readable(offset), writable(offset)),
                (u32::MAX, Some(u32::MAX))
            );
        }
        assert!(has_bytes(0x1_0400) && has_bytes(0x1_041f) && !has_bytes(0x1_0c00));
    }

    #[test]
    fn gicv4_has_four_frames() {
        assert_eq!((stride(1), stride(3)), (0x2_0000, 0x4_0000));
    }
}
