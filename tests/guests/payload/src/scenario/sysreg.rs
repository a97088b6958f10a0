//! System registers: what the identification registers promise is there, what they hide is undefined.

use crate::arch::exceptions::catch;
use crate::arch::{cpu, mem, mrs, msr};
use crate::console;
use crate::machine::{Arguments, Report};

/// A register that the host emulates.
const UART_FLAGS: u64 = 0x0900_0018;
/// Name and access.
type Access = (&'static str, fn() -> u64);

macro_rules! readers {
    ($($name:literal $register:literal),* $(,)?) => {
        &[$(($name, || mrs!($register))),*]
    };
}

/// Not there for a guest: PMU, profiling, trace, branch records, activity monitors, partitioning, limited ordering,
/// contexts of software, SVE, SME, tags, secure timer, reserved debug and timer encodings, another level's registers.
const HIDDEN: &[Access] = readers![
    "PMCR_EL0" "s3_3_c9_c12_0",
    "PMUSERENR_EL0" "s3_3_c9_c14_0",
    "PMCCNTR_EL0" "s3_3_c9_c13_0",
    "PMEVTYPER0_EL0" "s3_3_c14_c12_0",
    "PMSIDR_EL1" "s3_0_c9_c9_7",
    "TRCIDR1" "s2_1_c0_c9_7",
    "BRBIDR0_EL1" "s2_1_c9_c2_0",
    "AMCR_EL0" "s3_3_c13_c2_0",
    "MPAM1_EL1" "s3_0_c10_c5_0",
    "LORID_EL1" "s3_0_c10_c4_7",
    "ZCR_EL1" "s3_0_c1_c2_0",
    "SMCR_EL1" "s3_0_c1_c2_6",
    "TPIDR2_EL0" "s3_3_c13_c0_5",
    "TCR2_EL1" "s3_0_c2_c0_3",
    "CNTPS_CTL_EL1" "s3_7_c14_c2_1",
    "no timer at S3_3_C14_C2_3" "s3_3_c14_c2_3",
    "no debug register at S2_0_C5_C3_3" "s2_0_c5_c3_3",
    "IMPLEMENTATION DEFINED S3_0_C15_C1_0" "s3_0_c15_c1_0",
    "IMPLEMENTATION DEFINED S3_1_C11_C0_2" "s3_1_c11_c0_2",
    "HCR_EL2" "s3_4_c1_c1_0",
    "SCR_EL3" "s3_6_c1_c1_0",
];

/// There, and zero.
const ZERO: &[Access] = readers![
    "ACTLR_EL1" "actlr_el1",
    "REVIDR_EL1" "s3_0_c0_c0_6",
    "AIDR_EL1" "s3_1_c0_c0_7",
    "DBGBCR0_EL1" "s2_0_c0_c0_5",
    "DBGWCR1_EL1" "s2_0_c0_c1_7",
    "MDCCINT_EL1" "s2_0_c0_c2_0",
    "OSDLR_EL1" "s2_0_c1_c3_4",
    "MDCCSR_EL0" "s2_3_c0_c1_0",
    "ID_AA64ZFR0_EL1" "s3_0_c0_c4_4",
    "ID_AA64SMFR0_EL1" "s3_0_c0_c4_5",
    "ID_AA64DFR1_EL1" "s3_0_c0_c5_1",
    "ID_AA64MMFR4_EL1" "s3_0_c0_c7_4",
    "ID_PFR0_EL1, of AArch32" "s3_0_c0_c1_0",
    "MVFR0_EL1, of AArch32" "s3_0_c0_c3_0",
    "reserved S3_0_C0_C3_7" "s3_0_c0_c3_7",
];

/// One CPU; most checks only make sense under a hypervisor.
pub fn run(arguments: &Arguments, report: &mut Report) {
    set_and_way(report);
    locks(report);
    if !arguments.is_guest() {
        return;
    }
    // CPACR_EL1.{SMEN, FPEN, ZEN}: else a core that has them traps to EL1 itself, with classes of their own.
    msr!("cpacr_el1", 3 << 24 | 3 << 20 | 3 << 16);
    mem::synchronise();
    for (name, read) in HIDDEN {
        let caught = catch(|| {
            read();
        });
        report.expect(name, caught.map(|c| c.is_undefined()), Some(true));
    }
    // In the space of identification registers FEAT_IDST gives the class of a trapped register instead.
    let class = catch(|| {
        mrs!("s3_1_c0_c0_4");
    });
    report.check(
        "GMID_EL1",
        class.is_some_and(|c| matches!(c.class(), 0 | 0x18)),
    );
    software_context(report);
    // RAS is hidden: undefined, or no records.
    let mut records = 0;
    let caught = catch(|| records = mrs!("s3_0_c5_c3_0"));
    report.check(
        "no error records",
        caught.map_or(records == 0, |c| c.is_undefined()),
    );
    for (name, read) in ZERO {
        let mut value = 1;
        let caught = catch(|| value = read());
        report.expect(name, (caught, value), (None, 0));
    }
    features(report);
    calls(report);
}

/// SCXTNUM_EL1: there from CSV2_2 on, and then it survives the host; else undefined.
fn software_context(report: &mut Report) {
    let is_there = mrs!("id_aa64pfr0_el1") >> 56 & 0xf >= 2;
    let mut kept = 0;
    let caught = catch(|| msr!("s3_0_c13_c0_7", 0x5c));
    if is_there {
        mem::read32(UART_FLAGS);
        kept = mrs!("s3_0_c13_c0_7");
        msr!("s3_0_c13_c0_7", 0);
    }
    let undefined = caught.is_some_and(|c| c.is_undefined());
    report.expect(
        "SCXTNUM_EL1",
        (undefined, kept),
        if is_there { (false, 0x5c) } else { (true, 0) },
    );
}

/// DC CISW on every level's first line, as old boot loaders do.
fn set_and_way(report: &mut Report) {
    let data = mem::free_memory();
    mem::write64(data, 0x5e7_0a11);
    for level in 0..2 {
        let caught = catch(|| mem::clean_set_way(level << 1));
        report.expect("maintenance by set and way", caught, None);
    }
    report.expect("memory survives it", mem::read64(data), 0x5e7_0a11);
    // Turns the caches off and on, which a hypervisor that watches for it must survive.
    let control = mrs!("sctlr_el1");
    msr!("sctlr_el1", control & !(1 << 2));
    mem::synchronise();
    let seen = mem::read64(data);
    msr!("sctlr_el1", control);
    mem::synchronise();
    report.expect("also with the cache off", seen, 0x5e7_0a11);
}

fn locks(report: &mut Report) {
    msr!("oslar_el1", 0);
    mem::synchronise();
    report.expect(
        "OS lock is there and open",
        mrs!("oslsr_el1") & 0b1011,
        0b1000,
    );
    report.expect(
        "cache geometry can be read",
        catch(|| {
            mrs!("clidr_el1");
            mrs!("ctr_el0");
        }),
        None,
    );
}

/// Features that are hidden, by register, shift and greatest value of the field.
fn features(report: &mut Report) {
    let field = |value: u64, shift: u32| value >> shift & 0xf;
    let (pfr0, pfr1) = (mrs!("id_aa64pfr0_el1"), mrs!("id_aa64pfr1_el1"));
    let (dfr0, mmfr0) = (mrs!("id_aa64dfr0_el1"), mrs!("id_aa64mmfr0_el1"));
    console::line(format_args!(
        "pfr0 {pfr0:#018x} pfr1 {pfr1:#018x} dfr0 {dfr0:#018x} mmfr0 {mmfr0:#018x}"
    ));
    report.expect("EL0 and EL1 are AArch64 only", pfr0 & 0xff, 0x11);
    for (name, shift) in [
        ("EL2", 8),
        ("EL3", 12),
        ("RAS", 28),
        ("SVE", 32),
        ("MPAM", 40),
        ("AMU", 44),
    ] {
        report.expect(name, field(pfr0, shift), 0);
    }
    for (name, shift) in [("MTE", 8), ("SME", 24), ("NMI", 36)] {
        report.expect(name, field(pfr1, shift), 0);
    }
    for (name, shift) in [
        ("trace", 4),
        ("PMU", 8),
        ("profiling", 32),
        ("trace buffer", 44),
        ("branch records", 52),
    ] {
        report.expect(name, field(dfr0, shift), 0);
    }
    report.expect("debug architecture", field(dfr0, 0), 6);
    report.check("PARange", field(mmfr0, 0) <= 5);
    report.expect("fine-grained traps", field(mmfr0, 56), 0);
}

/// SMC has no EL3 to go to; an HVC with another immediate is no call.
fn calls(report: &mut Report) {
    let smc = catch(|| {
        // SAFETY: undefined, or a call that changes these registers.
        unsafe {
            core::arch::asm!("mov w0, #0x84000000", "smc #0", out("x0") _, out("x1") _, out("x2") _, out("x3") _);
        }
    });
    report.expect(
        "SMC is undefined",
        smc.map(|c| c.is_undefined()),
        Some(true),
    );
    let answer: u64;
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("mov w0, #0x84000000", "hvc #1", out("x0") answer, out("x1") _, out("x2") _, out("x3") _);
    }
    report.expect(
        "HVC #1 is no call",
        answer.cast_signed(),
        cpu::psci::NOT_SUPPORTED,
    );
}
