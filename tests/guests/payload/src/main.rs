//! A guest without an operating system: `run=NAME` on its command line picks what it exercises.
//!
//! It expects the platform of QEMU's `virt` (docs: guest platform): it is entered at RAM + 0x80000 with the device
//! tree in x0, prints on the PL011, one line `NAME ok` or `NAME FAILED why` for each check, closes with
//! `N passed, N failed`, and powers off by PSCI. `run=demo` checks nothing: it is for people. On the emulated board itself, entered at EL1 with `under=bare`, the
//! same binary passes too, less what only a hypervisor does: so the checks are checked themselves.

#![no_std]
#![no_main]

mod arch;
mod console;
mod machine;
mod scenario;
mod tree;

use arch::{cpu, gic, mmu};
use machine::{Arguments, Report};
use tree::Tree;

#[unsafe(no_mangle)]
extern "C" fn guest_main(tree: u64) -> ! {
    let tree = Tree::at(tree);
    let arguments = Arguments::read(tree);
    let name = arguments.value("run=").unwrap_or("hello");
    if name == "demo" {
        set_up();
        scenario::demo::run(&arguments, tree)
    }
    let mut report = Report::default();
    report.check("device tree", tree.is_some());
    // What needs the MMU off comes before it is on.
    if let Some(early) = scenario::find(scenario::EARLY, name) {
        early(&arguments, tree, &mut report);
        report.close()
    }
    set_up();
    match scenario::find(scenario::ALL, name) {
        Some(run) => run(&arguments, &mut report),
        None => report.check(name, false),
    }
    cpu::mask();
    report.close()
}

/// Turns MMU and interrupt controller on.
fn set_up() {
    mmu::prepare();
    mmu::enable();
    gic::enable_distributor();
    gic::enable_cpu();
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::line(format_args!("panic FAILED {info}"));
    machine::fail()
}
