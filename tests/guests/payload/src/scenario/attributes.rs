//! The memory attributes that stage 1 and stage 2 make together, as EL2 measures them by AT S12E1R.
//!
//! `s2-ram=N` and `s2-device=N` say which MemAttr the stage-2 descriptors should have, `fwb=1` that FEAT_S2FWB is in
//! use. What they should combine to is typed from the Arm ARM (D8.6.6, tables for HCR_EL2.FWB 0 and 1).

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
        // Inner shareable where both stages are cacheable, else outer (D8.6.7).
        let cacheable = matches!(found, WB | WT);
        report.expect("shareability", share, if cacheable { 3 } else { 2 });
    }
}
