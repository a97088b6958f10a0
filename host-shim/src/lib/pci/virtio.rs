//! Where a virtio device over PCI has the register that resets it.

use super::{ConfigSpace, Function, ID, capabilities};

/// Vendor of virtio devices (VIRTIO 1.2, 4.1.2).
const VIRTIO: u16 = 0x1af4;
/// ID of a vendor's capability. The fourth byte of virtio's says what is there, the fifth in which
/// base address register, the third and fourth doublewords where and how long it is (4.1.4).
const VENDOR: u8 = 0x09;
/// The common configuration.
const COMMON: u8 = 1;
/// Offset of the device's status in it: 8 bits. Writing 0 resets the device, which is done when 0 is
/// read (4.1.4.3).
const STATUS: u32 = 0x14;

/// The device's status register: number of the base address register, and the offset behind it.
/// `None` if the function is no virtio device.
pub fn virtio_status(space: &impl ConfigSpace, function: Function) -> Option<(u8, u32)> {
    let [a, b, ..] = space.read(function, ID).to_le_bytes();
    if u16::from_le_bytes([a, b]) != VIRTIO {
        return None;
    }
    let common = capabilities(space, function).find(|found| {
        let [id, _, _, kind] = space.read(function, found.offset).to_le_bytes();
        id == VENDOR && kind == COMMON
    })?;
    let [bar, ..] = space.read(function, common.offset + 4).to_le_bytes();
    let offset = space.read(function, common.offset + 8);
    let length = space.read(function, common.offset + 12);
    if length <= STATUS {
        return None;
    }
    Some((bar, offset.checked_add(STATUS)?))
}
