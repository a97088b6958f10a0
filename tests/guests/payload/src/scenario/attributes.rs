//! The memory attributes that stage 1 and stage 2 make together, as EL2 measures them by AT S12E1R.
//!
//! `s2-ram=N` and `s2-device=N` say which MemAttr the stage-2 descriptors should have, `fwb=1` that FEAT_S2FWB is in
//! use. What they should combine to is typed from the Arm ARM (D8.6.6, tables for HCR_EL2.FWB 0 and 1). In `run=edges`
//! the host says it instead, which makes devices come and go meanwhile.

use crate::arch::cpu;
use crate::arch::mem;
use crate::arch::mmu::{self, Attribute};
use crate::console;
use crate::machine::{Arguments, Report};

/// EL2's call: `x1`, an address; gives PAR_EL1's attribute (63:56) in `x1` and shareability (8:7) in `x2`.
const PROBE: u64 = 0xc600_0180;
/// A device that the host emulates, so it has no stage-2 mapping, is not probed; this is where a device slot is.
const DEVICE: &str = "device=";

const WB: u64 = 0xff;
const WT: u64 = 0xbb;
const NC: u64 = 0x44;
const RE: u64 = 0x04;
const RNE: u64 = 0x00;

/// Combined attribute, by MemAttr and stage 1 in the order of [`Attribute::ALL`].
fn expected(fwb: bool, mem_attr: u64) -> Option<[u64; 5]> {
    Some(match (fwb, mem_attr) {
        (false, 0xf) | (true, 7) => [WB, WT, NC, RE, RNE],
        (false, 0xa) => [WT, WT, NC, RE, RNE],
        (false, 5) | (true, 5) => [NC, NC, NC, RE, RNE],
        (false, 1) => [RE, RE, RE, RE, RNE],
        // nGnRnE of stage 1 is QEMU's nGnRE here; real cores may give either.
        (true, 1) => [RE; 5],
        (_, 0) => [RNE; 5],
        (true, 6) => [WB; 5],
        _ => return None,
    })
}

/// Probes RAM, and a device slot where one is named.
pub fn run(arguments: &Arguments, report: &mut Report) {
    let fwb = arguments.number("fwb=") == Some(1);
    let ram = mem::free_memory() + 0x10_0000;
    mem::write64(ram, 1); // the leaf exists from here on
    let ram_attr = arguments
        .number("s2-ram=")
        .unwrap_or(if fwb { 6 } else { 0xf });
    probe("RAM", ram, expected(fwb, ram_attr), report);
    if let Some(device) = arguments.number(DEVICE) {
        let device_attr = arguments.number("s2-device=").unwrap_or(1);
        let _: u64 = mem::read32(device);
        probe("device", device, expected(fwb, device_attr), report);
    }
}

/// Where the host is asked what to look at next: 0 for nothing more, else bit 0 says that FEAT_S2FWB is in use, and
/// four bits each from 4 on are the MemAttr of [`PLACES`].
const MAILBOX: u64 = 0x0b00_0000;
/// RAM (an offset in it), memory of a flagged slot, a device, and one with write combining.
const PLACES: [(&str, u64); 4] = [
    ("RAM", 0x4080_0000),
    ("flagged RAM", 0x5000_0000),
    ("device", 0x0c00_0000),
    ("write-combining device", 0x0c01_0000),
];

/// Probes all places, again and again, as the host changes what is expected.
pub fn edges(_: &Arguments, report: &mut Report) {
    loop {
        let order = mem::read32(MAILBOX);
        if order == 0 {
            return;
        }
        for ((what, address), shift) in PLACES.into_iter().zip([4, 8, 12, 16]) {
            let _: u64 = mem::read32(address); // the leaf exists from here on
            let expected = expected(order & 1 != 0, order >> shift & 0xf);
            report.expect(what, Some(measured(address)), expected.map(with_share));
        }
    }
}

/// Attribute and shareability of an address under each type of stage 1; `None` if EL2 knows none.
fn measured(address: u64) -> [Option<(u64, u64)>; 5] {
    Attribute::ALL.map(|attribute| {
        let [status, found, share, _] = cpu::hvc([PROBE, mmu::alias(address, attribute), 0, 0]);
        (status == 0).then_some((found, share))
    })
}

fn with_share(attributes: [u64; 5]) -> [Option<(u64, u64)>; 5] {
    attributes.map(|attribute| Some((attribute, shareability(attribute))))
}

/// Inner shareable where both stages are cacheable, else outer (D8.6.7).
fn shareability(attribute: u64) -> u64 {
    if matches!(attribute, WB | WT) { 3 } else { 2 }
}

fn probe(what: &str, address: u64, expected: Option<[u64; 5]>, report: &mut Report) {
    let Some(expected) = expected else {
        return report.check("MemAttr is a known one", false);
    };
    for (attribute, expected) in Attribute::ALL.into_iter().zip(expected) {
        let [status, found, share, _] = cpu::hvc([PROBE, mmu::alias(address, attribute), 0, 0]);
        console::line(format_args!(
            "attribute {what} {attribute:?} {found:#04x} SH {share}"
        ));
        report.expect(what, (status, found), (0, expected));
        report.expect("shareability", share, shareability(found));
    }
}
