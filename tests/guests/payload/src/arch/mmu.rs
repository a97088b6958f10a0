//! Stage 1: identity, and aliases of the first 2 GiB with other memory attributes.
//!
//! VA bits 38:30 pick the entry. 0: devices; 1 to 3: RAM, write-back. From 8 on, five pairs that show the first
//! 2 GiB with each of [`Attribute::ALL`].

use super::mrs;
use core::sync::atomic::{AtomicU64, Ordering};

/// Stage-1 memory attributes, by their index in `MAIR_EL1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attribute {
    /// Normal, write-back.
    WriteBack,
    /// Normal, write-through.
    WriteThrough,
    /// Normal, non-cacheable.
    NonCacheable,
    /// Device-nGnRE.
    DeviceE,
    /// Device-nGnRnE.
    DeviceNonE,
}

impl Attribute {
    /// All of them, by index.
    pub const ALL: [Self; 5] = [
        Self::WriteBack,
        Self::WriteThrough,
        Self::NonCacheable,
        Self::DeviceE,
        Self::DeviceNonE,
    ];
}

const MAIR: u64 = 0xff | 0xbb << 8 | 0x44 << 16 | 0x04 << 24;
/// 39 bits, 4 KiB granule, walks write-back and inner shareable, TTBR1 off; IPS is added.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23;
/// RES1 bits, M, C, I.
const SCTLR: u64 = 0x30d0_0800 | 1 | 1 << 2 | 1 << 12;
const GIB: u64 = 1 << 30;
const ALIASES: u64 = 8;

#[repr(align(4096))]
struct Table([AtomicU64; 512]);

static LEVEL1: Table = Table([const { AtomicU64::new(0) }; 512]);

unsafe extern "C" {
    fn enable_mmu(ttbr0: u64, tcr: u64, mair: u64, sctlr: u64);
}

/// A block of 1 GiB (Arm ARM D8.3.1): valid, AF, inner shareable, read-write at EL1.
fn block(address: u64, attribute: Attribute) -> u64 {
    let index = attribute as u64;
    let never_execute = if address == 0 || index != 0 {
        1 << 53 | 1 << 54
    } else {
        0
    };
    address | 1 | index << 2 | 3 << 8 | 1 << 10 | never_execute
}

/// Fills the table; once, on the boot CPU, with the MMU off.
pub fn prepare() {
    let set = |index: u64, value| LEVEL1.0[index as usize].store(value, Ordering::Relaxed);
    set(0, block(0, Attribute::DeviceE));
    (1..4).for_each(|gib| set(gib, block(gib * GIB, Attribute::WriteBack)));
    for attribute in Attribute::ALL {
        for gib in 0..2 {
            set(
                ALIASES + 2 * attribute as u64 + gib,
                block(gib * GIB, attribute),
            );
        }
    }
}

/// Where the address, below 2 GiB, is seen with this attribute.
pub fn alias(address: u64, attribute: Attribute) -> u64 {
    address + (ALIASES + 2 * attribute as u64) * GIB
}

/// Turns this CPU's MMU and caches on.
pub fn enable() {
    let ips = (mrs!("id_aa64mmfr0_el1") & 0xf).min(5);
    // SAFETY: the table maps everything that the payload uses at its own address.
    unsafe {
        enable_mmu(
            (&raw const LEVEL1).addr() as u64,
            TCR | ips << 32,
            MAIR,
            SCTLR,
        )
    }
}
