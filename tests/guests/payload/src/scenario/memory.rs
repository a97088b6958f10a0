//! RAM, code that changes, and addresses where nothing is.

use crate::arch::cpu;
use crate::arch::exceptions::catch;
use crate::arch::mem;
use crate::console;
use crate::machine::{Arguments, Report};
use crate::tree::Tree;
use core::sync::atomic::{AtomicU64, Ordering};

/// Multiplier of the pattern that a ramdisk for [`reader`] is filled with: word n is n times this, modulo 2^64.
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;
const PAGE: u64 = 4096;

/// With the MMU off: the ramdisk's bytes have reached memory itself, not only a cache.
pub fn reader(_: &Arguments, tree: Option<Tree>, report: &mut Report) {
    let bound = |name| tree.and_then(|tree| tree.chosen_number(name));
    let (Some(start), Some(end)) = (bound("linux,initrd-start"), bound("linux,initrd-end")) else {
        return report.check("there is a ramdisk", false);
    };
    let words = (end - start) / 8;
    report.check("ramdisk has at least a page", words >= 512);
    let wrong = (0..words).find(|n| mem::read64(start + 8 * n) != n.wrapping_mul(PATTERN));
    report.expect("first wrong word of the ramdisk", wrong, None);
    console::line(format_args!("read {} KiB with the MMU off", words / 128));
}

/// Code that is written, made visible and executed, many times at one address and once at many.
pub fn code(_: &Arguments, report: &mut Report) {
    let place = mem::free_memory();
    let wrong = (0..1000u64).find(|&n| run_new_code(place, n) != n);
    report.expect("first wrong rewrite of code", wrong, None);
    let wrong = (0..256u64).find(|&n| run_new_code(place + n * PAGE + 8 * n, n + 7) != n + 7);
    report.expect("first page with wrong code", wrong, None);
}

fn run_new_code(place: u64, result: u64) -> u64 {
    mem::write32(place, 0x5280_0000 | result << 5); // mov w0, #result
    mem::write32(place + 4, 0xd65f_03c0); // ret
    mem::clean_for_fetch(place);
    mem::clean_for_fetch(place + 4);
    mem::synchronise();
    mem::invalidate_fetch(place);
    mem::invalidate_fetch(place + 4);
    mem::synchronise();
    mem::execute(place)
}

/// Pages that each CPU touches in [`faults`].
static STORM_PAGES: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);

/// Every CPU touches the same fresh pages at once, each at its own offset.
pub fn faults(arguments: &Arguments, report: &mut Report) {
    let pages = arguments.number("pages=").unwrap_or(4096);
    STORM_PAGES.store(pages, Ordering::SeqCst);
    report.check("CPUs start and end", cpu::everywhere(storm));
    report.expect("lost or torn words", ERRORS.load(Ordering::SeqCst), 0);
    let offset = |cpu: usize| 8 * cpu as u64;
    let all = (0..pages).flat_map(|page| (0..cpu::count()).map(move |cpu| (page, cpu)));
    let wrong =
        all.filter(|&(page, cpu)| mem::read64(storm_page(page) + offset(cpu)) != mark(page, cpu));
    report.expect("words lost afterwards", wrong.count(), 0);
}

fn storm_page(page: u64) -> u64 {
    mem::free_memory() + 0x20_0000 + page * PAGE
}

fn mark(page: u64, cpu: usize) -> u64 {
    page << 8 | cpu as u64 | 1 << 63
}

fn storm(cpu: usize) {
    for page in 0..STORM_PAGES.load(Ordering::SeqCst) {
        let place = storm_page(page) + 8 * cpu as u64;
        mem::write64(place, mark(page, cpu));
        if mem::read64(place) != mark(page, cpu) {
            ERRORS.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// IPAs at which a guest has nothing: behind its RAM (`hole=`, default 3 GiB), and a device.
const UART: u64 = 0x0900_0000;

/// Jumps into nothing and into a device, and goes on.
pub fn nowhere(arguments: &Arguments, report: &mut Report) {
    if !arguments.is_guest() {
        // The board itself may answer as it likes.
        return report.check("board is not a guest", true);
    }
    let hole = arguments.number("hole=").unwrap_or(0xc000_0000);
    let jump = catch(|| {
        mem::execute(hole);
    });
    report.expect(
        "jump into nothing is an external abort",
        jump.map(|c| c.is_external()),
        Some(true),
    );
    report.expect("address of the abort", jump.map(|c| c.far), Some(hole));
    let jump = catch(|| {
        mem::execute(UART);
    });
    // Stage 1 forbids it already: a permission fault of the guest's own.
    report.expect(
        "jump into a device aborts",
        jump.map(|c| c.class()),
        Some(0x21),
    );
    let line = catch(|| mem::clean_invalidate(hole));
    report.expect("cache maintenance on nothing is skipped", line, None);
    let pair = catch(|| mem::load_pair(hole));
    report.expect(
        "pair from nothing is an external abort",
        pair.map(|c| c.is_external()),
        Some(true),
    );
    let zero = catch(|| mem::zero_block(hole));
    report.expect(
        "DC ZVA on nothing is an external abort",
        zero.map(|c| c.is_external()),
        Some(true),
    );
    let atomic = catch(|| mem::load_exclusive(hole));
    report.expect(
        "exclusive on nothing is an external abort",
        atomic.map(|c| c.is_external()),
        Some(true),
    );
}
