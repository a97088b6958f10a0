//! What EL2 needs of a core's part of the interrupt controller before a guest runs there: its own private
//! interrupts, and empty list registers.
//!
//! It is done after each time that the core is turned on. Firmware disables private interrupts then, and list
//! registers come up unknown (Arm IHI 0069H 12.4.8, `ICH_LR<n>_EL2`), or as an earlier owner left them.

use abi::{GUEST_TIMER_PPI, KICK_SGI};

/// INTID of the maintenance interrupt (PPI 9 on all boards that we know; IHI 0069H 3.1 recommends
/// it).
const MAINTENANCE: u32 = 25;
/// INTID of the EL2 physical timer's interrupt (Arm BSA, DEN 0094).
const EL2_TIMER: u32 = 26;
const TIMER_BIT: u32 = 1 << GUEST_TIMER_PPI;
/// The private interrupts that EL2 needs.
const OURS: u32 = TIMER_BIT | 1 << MAINTENANCE | 1 << EL2_TIMER | 1 << KICK_SGI;

/// GICD_IGROUPR0, GICD_ISENABLER0 and GICD_ITARGETSR0; GICR_IGROUPR0 and GICR_ISENABLER0 are at the same
/// offsets.
const GROUPS: usize = 0x80;
const SET_ENABLE: usize = 0x100;
const TARGETS: usize = 0x800;

/// A core's part of the controller.
pub trait CoreGic {
    /// Reads a word of the frame with its private interrupts.
    fn read(&self, offset: usize) -> u32;
    /// Writes it.
    fn write(&self, offset: usize, value: u32);
    /// Turns the virtual interface off, and empties all its list registers.
    fn empty_lists(&self);
}

/// Prepares the core; gives the bit that its interface has in a GICv2's target registers.
pub fn prepare(core: &impl CoreGic) -> u8 {
    // In the group that the host has chosen for the guests' timer, which it takes from us.
    let groups = core.read(GROUPS);
    if groups & TIMER_BIT != 0 {
        core.write(GROUPS, groups | OURS);
    }
    core.write(SET_ENABLE, OURS);
    core.empty_lists();
    // It need not be the core's affinity (on Cortex-A76 that is in Aff1). Zero on a machine with one core.
    core.read(TARGETS).to_le_bytes()[0].max(1)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use core::cell::{Cell, RefCell};
    use std::vec::Vec;

    use super::*;

    /// SGI 7, PPIs 25 to 27.
    const NEEDED: u32 = 0x0e00_0080;

    /// A core that has just been turned on: nothing enabled, list registers with anything in them.
    #[derive(Default)]
    struct Fresh {
        groups: u32,
        targets: u32,
        writes: RefCell<Vec<(usize, u32)>>,
        lists_emptied: Cell<bool>,
    }

    impl CoreGic for Fresh {
        fn read(&self, offset: usize) -> u32 {
            match offset {
                0x80 => self.groups,
                0x800 => self.targets,
                _ => 0,
            }
        }
        fn write(&self, offset: usize, value: u32) {
            self.writes.borrow_mut().push((offset, value));
        }
        fn empty_lists(&self) {
            self.lists_emptied.set(true);
        }
    }

    #[test]
    fn what_el2_needs_is_enabled_and_list_registers_are_empty() {
        let core = Fresh::default();
        prepare(&core);
        assert_eq!(*core.writes.borrow(), [(0x100, NEEDED)]);
        assert!(core.lists_emptied.get());
    }

    #[test]
    fn they_are_in_the_group_that_the_host_uses_and_others_stay() {
        let core = Fresh {
            groups: 1 << 27 | 1 << 30,
            ..Fresh::default()
        };
        prepare(&core);
        let groups = (0x80, NEEDED | 1 << 30);
        assert_eq!(*core.writes.borrow(), [groups, (0x100, NEEDED)]);
    }

    #[test]
    fn a_gicv2s_interface_says_its_bit() {
        let with = |targets| {
            prepare(&Fresh {
                targets,
                ..Fresh::default()
            })
        };
        assert_eq!((with(0x0404_0404), with(0x8080_8080)), (4, 0x80));
        assert_eq!(with(0), 1, "one core");
    }
}
