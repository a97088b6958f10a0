//! Behaviour, hand-typed values, and a model of the hardware's list registers as the oracle.

mod delivery;
mod random;
mod registers;
mod states;

use std::vec::Vec;

use super::*;

const V2: GicVersion = GicVersion::V2;
const V3: GicVersion = GicVersion::V3;

/// What hardware does with list registers: a guest that acknowledges and ends interrupts.
struct Cpu {
    index: usize,
    version: GicVersion,
    interface: CpuInterface,
}

impl Cpu {
    fn new(index: usize, version: GicVersion, lists: u8) -> Self {
        Self {
            index,
            version,
            interface: CpuInterface::new(lists),
        }
    }

    fn state_shift(&self) -> u32 {
        if self.version == V3 { 62 } else { 28 }
    }

    fn priority(&self, list: u64) -> u64 {
        match self.version {
            GicVersion::V3 => list >> 48 & 0xff,
            GicVersion::V2 => (list >> 23 & 0x1f) << 3,
        }
    }

    /// Loads, and acknowledges the most urgent pending interrupt, if there is one.
    fn acknowledge(&mut self, vgic: &Vgic) -> Option<u32> {
        vgic.load(self.index, &mut self.interface);
        let intid = self.take();
        let _: Kicks = vgic.save(self.index, &mut self.interface);
        intid
    }

    /// Acknowledges the most urgent pending interrupt in a list register, if there is one.
    fn take(&mut self) -> Option<u32> {
        let shift = self.state_shift();
        let used = usize::from(self.interface.used);
        let lists = &self.interface.lists[..used];
        let pending = lists.iter().enumerate();
        let pending = pending.filter(|(_, list)| **list >> shift & 3 == 1);
        let best = pending.min_by_key(|(_, list)| self.priority(**list));
        let best = best.map(|(at, _)| at)?;
        let list = &mut self.interface.lists[best];
        *list ^= 3 << shift;
        Some((*list & 0x3ff) as u32)
    }

    /// Loads, and ends an interrupt.
    fn end(&mut self, vgic: &Vgic, intid: u32) {
        vgic.load(self.index, &mut self.interface);
        self.finish(intid);
        let _: Kicks = vgic.save(self.index, &mut self.interface);
    }

    /// Ends an interrupt: in its list register, or counted if it is in none.
    fn finish(&mut self, intid: u32) {
        let shift = self.state_shift();
        let used = usize::from(self.interface.used);
        let mut lists = self.interface.lists[..used].iter_mut();
        match lists.find(|list| (**list & 0x3ff) as u32 == intid && **list >> shift & 2 != 0) {
            Some(list) => *list &= !(2 << shift),
            None => self.interface.hcr += 1 << 27,
        }
    }

    /// Leaves what is not acknowledged where it is.
    fn pass(&mut self, vgic: &Vgic) {
        vgic.load(self.index, &mut self.interface);
        let _: Kicks = vgic.save(self.index, &mut self.interface);
    }
}

/// A distributor with both groups on and all interrupts enabled.
fn enabled(version: GicVersion, vcpus: u8) -> Vgic {
    let vgic = Vgic::new(version, vcpus);
    let _: Kicks = vgic.dist_write(0, 0, 4, 3);
    for word in 0..32u64 {
        let _: Kicks = vgic.dist_write(0, 0x100 + 4 * word, 4, 0xffff_ffff);
    }
    for vcpu in 0..usize::from(vcpus) {
        let offset = if version == V3 { 0x1_0100 } else { 0x100 };
        let _: Kicks = match version {
            GicVersion::V3 => vgic.redist_write(vcpu, offset, 4, 0xffff_ffff),
            GicVersion::V2 => vgic.dist_write(vcpu, offset, 4, 0xffff_ffff),
        };
    }
    if version == V2 {
        for spi in 32..1020u64 {
            let _: Kicks = vgic.dist_write(0, 0x800 + spi, 1, 1);
        }
    }
    vgic
}

fn kicked(kicks: Kicks) -> Vec<usize> {
    kicks.iter().collect()
}
