//! Accesses to devices that someone emulates: widths, extensions, the zero register, and what can't be emulated.

use crate::arch::exceptions::catch;
use crate::arch::{gic, mem};
use crate::machine::{Arguments, Report};

/// PL011: integer baud rate divisor, which keeps 16 bits, and line control, which keeps 8.
const DIVISOR: u64 = 0x0900_0024;
/// Fractional divisor: a word at a multiple of 8, so that pairs are aligned, too.
const PAIRS: u64 = 0x0900_0028;
const FLAGS: u64 = 0x0900_0018;
const PERIPHERAL_ID: u64 = 0x0900_0fe0;
/// Distributor: priorities, byte by byte.
const PRIORITIES: u64 = 0x400;

/// Devices of the host, devices of EL2, and refusals.
pub fn run(arguments: &Arguments, report: &mut Report) {
    uart(report);
    distributor(report);
    mem::touch_zero_register(FLAGS);
    report.check("zero register is read and written", true);
    if arguments.is_guest() {
        refusals("UART", PAIRS, report);
        refusals("distributor", gic::distributor(0x100), report);
    }
}

fn uart(report: &mut Report) {
    // "PrimeCell" identification: PL011 has 0x11, 0x10 in its first two words.
    report.expect(
        "PL011 says what it is",
        mem::read32(PERIPHERAL_ID) & 0xff,
        0x11,
    );
    let before = mem::read32(DIVISOR);
    mem::write32(DIVISOR, 0xab);
    report.expect("word is kept", mem::read32(DIVISOR), 0xab);
    report.expect("half-word is its lower part", mem::read16(DIVISOR), 0xab);
    report.expect("byte is its lowest part", mem::read8(DIVISOR), 0xab);
    let (wide, narrow) = mem::read_signed(DIVISOR);
    report.expect("sign goes to bit 63", wide, 0xffff_ffff_ffff_ffab);
    report.expect("sign goes to bit 31 only", narrow, 0xffff_ffab);
    mem::write16(DIVISOR, 0x1234);
    report.expect("half-word is written", mem::read32(DIVISOR), 0x1234);
    mem::write32(DIVISOR, before);
}

fn distributor(report: &mut Report) {
    let at = gic::distributor(PRIORITIES + 40);
    mem::write32(at, 0x4030_2010);
    let bytes = [0, 1, 2, 3].map(|n| mem::read8(at + n));
    report.expect(
        "priorities are bytes of a word",
        bytes,
        [0x10, 0x20, 0x30, 0x40],
    );
    mem::write8(at + 2, 0xf0);
    report.expect("byte changes its own part", mem::read32(at), 0x40f0_2010);
}

/// An instruction on an address.
type Attempt = fn(u64);

/// Instructions that leave no valid syndrome: an external abort in the guest, which goes on.
fn refusals(device: &str, address: u64, report: &mut Report) {
    let attempts: [(&str, Attempt); 5] = [
        ("load of a pair", mem::load_pair),
        ("store of a pair", mem::store_pair),
        ("load with write-back", mem::load_post_index),
        ("store with write-back", mem::store_post_index),
        ("exclusive load", mem::load_exclusive),
    ];
    for (name, attempt) in attempts {
        let caught = catch(|| attempt(address));
        crate::console::line(format_args!("{device}: {name}: {caught:x?}"));
        report.expect(
            name,
            caught.map(|c| (c.is_external(), c.far)),
            Some((true, address)),
        );
    }
    report.expect(
        "cache maintenance is skipped",
        catch(|| mem::clean_invalidate(address)),
        None,
    );
}
