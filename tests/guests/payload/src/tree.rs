//! The few facts of the device tree that the payload needs: properties of the root's children, `/chosen` above all.
//!
//! Format: Devicetree Specification 0.4, chapter 5.

use crate::arch::mem;

const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
/// A device tree larger than this is none of ours.
const LARGEST: u32 = 2 << 20;

/// A device tree at an address.
#[derive(Debug, Clone, Copy)]
pub struct Tree {
    base: u64,
}

fn word(address: u64) -> u32 {
    let bytes = [0, 1, 2, 3].map(|i| mem::read8(address + i) as u8);
    u32::from_be_bytes(bytes)
}

/// Whether the zero-terminated string at `address` is `text`.
fn is(address: u64, text: &str) -> bool {
    let end = mem::read8(address + text.len() as u64) == 0;
    end && text
        .bytes()
        .enumerate()
        .all(|(i, byte)| mem::read8(address + i as u64) == u64::from(byte))
}

fn length(address: u64) -> u64 {
    (0..u64::from(LARGEST))
        .find(|&i| mem::read8(address + i) == 0)
        .unwrap_or(0)
}

impl Tree {
    /// The tree at this address, if there is one.
    pub fn at(base: u64) -> Option<Self> {
        let good =
            base != 0 && base.is_multiple_of(8) && word(base) == MAGIC && word(base + 4) < LARGEST;
        good.then_some(Self { base })
    }

    /// Address and length of a property of `/chosen`.
    pub fn chosen(&self, name: &str) -> Option<(u64, u64)> {
        self.property("chosen", name)
    }

    /// 64-bit number `index` of a property of a child of the root.
    pub fn number(&self, node: &str, name: &str, index: u64) -> Option<u64> {
        let (address, size) = self.property(node, name)?;
        let at = address + 8 * index;
        (8 * (index + 1) <= size).then(|| u64::from(word(at)) << 32 | u64::from(word(at + 4)))
    }

    /// Address and length of a property of a child of the root.
    fn property(&self, node: &str, name: &str) -> Option<(u64, u64)> {
        let strings = self.base + u64::from(word(self.base + 12));
        let mut at = self.base + u64::from(word(self.base + 8));
        let (mut depth, mut inside) = (0, false);
        loop {
            let token = word(at);
            at += 4;
            match token {
                BEGIN_NODE => {
                    depth += 1;
                    inside = depth == 2 && is(at, node);
                    at = (at + length(at) + 4) & !3;
                }
                END_NODE => {
                    depth -= 1;
                    inside = false;
                }
                PROPERTY => {
                    let (size, key) = (u64::from(word(at)), u64::from(word(at + 4)));
                    if inside && is(strings + key, name) {
                        return Some((at + 8, size));
                    }
                    at = (at + 8 + size + 3) & !3;
                }
                NOP => {}
                _ => return None,
            }
        }
    }

    /// A number of one or two cells in `/chosen`.
    pub fn chosen_number(&self, name: &str) -> Option<u64> {
        let (address, size) = self.chosen(name)?;
        match size {
            4 => Some(u64::from(word(address))),
            8 => Some(u64::from(word(address)) << 32 | u64::from(word(address + 4))),
            _ => None,
        }
    }
}
