//! The list of capabilities.

use super::{COMMAND, ConfigSpace, Function};

/// Status, in the register of the command: there is a list.
const HAS_LIST: u32 = 1 << (16 + 4);
/// Offset of the first capability's offset.
const FIRST: u16 = 0x34;
/// Capabilities are behind the header.
const HEADER: u16 = 0x40;
/// As many fit, so a longer list runs in circles.
const MOST: usize = 48;

/// ID of the PCI Express capability.
const PCI_EXPRESS: u8 = 0x10;
/// Device Capabilities, from the capability's start (PCI Express 7.5.3.3).
const DEVICE_CAPABILITIES: u16 = 4;
/// Of these: function-level reset.
const FUNCTION_RESET: u32 = 1 << 28;
/// Device Control (7.5.3.4).
const DEVICE_CONTROL: u16 = 8;
/// Of this: initiate a function-level reset.
const INITIATE_RESET: u32 = 1 << 15;

/// A capability.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Capability {
    /// What it is (PCI Code and ID Assignment 2): 0x05 MSI, 0x09 vendor's, 0x10 PCI Express, 0x11 MSI-X.
    pub id: u8,
    /// Where it is in the configuration space.
    pub offset: u16,
}

/// The capabilities of a function, in the order of its list.
pub fn capabilities(
    space: &impl ConfigSpace,
    function: Function,
) -> impl Iterator<Item = Capability> {
    let has_list = space.read(function, COMMAND) & HAS_LIST != 0;
    let mut next = if has_list {
        u16::from(space.read(function, FIRST).to_le_bytes()[0])
    } else {
        0
    };
    core::iter::from_fn(move || {
        // The lowest two bits are reserved (PCI 3.0 6.7).
        let offset = next & !3;
        if offset < HEADER {
            return None;
        }
        let [id, following, ..] = space.read(function, offset).to_le_bytes();
        next = u16::from(following);
        Some(Capability { id, offset })
    })
    .take(MOST)
}

/// The first capability of this kind.
pub fn find_capability(space: &impl ConfigSpace, function: Function, id: u8) -> Option<Capability> {
    capabilities(space, function).find(|capability| capability.id == id)
}

/// Resets a function and only it, if it can do that. `wait` lets 100 ms go by, in which the function
/// may not be asked anything (PCI Express 6.6.2). Its configuration is as after power-on then: BARs
/// have to be restored ([`super::restore`]). Says whether it could.
///
/// The function must be silent ([`super::quiesce`]), so that no transaction is on its way.
pub fn reset_function(space: &impl ConfigSpace, function: Function, wait: impl FnOnce()) -> bool {
    let Some(express) = find_capability(space, function, PCI_EXPRESS) else {
        return false;
    };
    if space.read(function, express.offset + DEVICE_CAPABILITIES) & FUNCTION_RESET == 0 {
        return false;
    }
    let control = express.offset + DEVICE_CONTROL;
    // Device Status, in the upper half, is cleared by ones.
    let value = space.read(function, control) & 0xffff;
    space.write(function, control, value | INITIATE_RESET);
    wait();
    true
}
