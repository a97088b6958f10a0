//! How fast a virtio disk on the PCI bus is, with and without an SMMU, for Linux bare, as host, and as a guest.
//!
//! `ravelin.test=speed` reads and writes past Linux's cache. Bytes per second come from a run with QEMU's real clock:
//! they compare what this machine emulates, its cost of an SMMU included. Instructions come from a run with
//! `-icount shift=0`, by the CPU's own counter (`INST_RETIRED` at all exception levels). A guest has no such counter.

mod report;

use crate::emulate::{Boot, LINUX_ARGUMENTS, PATIENT};
use crate::fit::{self, Disk, Guest};
use crate::machine::{Gic, Machine, disk_args, pci_disk_args};
use crate::payload::{self, Payloads};
use crate::runner::Context;
use crate::{files, output, verdict};
use anyhow::{Context as _, Result};
use std::io::Write as _;
use std::process::ExitCode;

/// The model that is measured.
const CPU: &str = "cortex-a76";
/// Bytes of the disk.
const DISK: u64 = 64 << 20;
/// Checks of a run: each access of each round.
const CHECKS: u32 = 20;
/// One nanosecond per instruction, but waits are as long as they are: with those skipped, Linux would look after its
/// timers again and again until the disk is done.
const COUNTED: [&str; 2] = ["-icount", "shift=0"];
/// RAM of the guest, in MiB.
const GUEST_MIB: u64 = 256;
const MIB: u64 = 1 << 20;

/// Who drives the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Driver {
    /// Linux without Ravelin, which also drives the SMMU.
    Bare,
    /// Linux as host.
    Host,
    /// A guest whose own function it is.
    Assigned,
    /// A guest with a virtio disk of the shim's, which has the machine's over MMIO.
    Emulated,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
struct Setup {
    title: &'static str,
    driver: Driver,
    iommu: bool,
}

const fn setup(title: &'static str, driver: Driver, iommu: bool) -> Setup {
    Setup {
        title,
        driver,
        iommu,
    }
}

const SETUPS: [Setup; 6] = [
    setup("Linux bare, no SMMU", Driver::Bare, false),
    setup("Linux bare, SMMU driven by Linux", Driver::Bare, true),
    setup("Linux as host, no SMMU", Driver::Host, false),
    setup("Linux as host, SMMU driven by EL2", Driver::Host, true),
    setup(
        "guest, the disk its own behind the SMMU",
        Driver::Assigned,
        true,
    ),
    setup("guest, the shim's virtio disk", Driver::Emulated, false),
];

/// What is timed: direction, and bytes of a request.
const ACCESSES: [(&str, u64); 4] = [
    ("read", 4096),
    ("write", 4096),
    ("read", 1 << 20),
    ("write", 1 << 20),
];

/// What one line of `speed` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    bytes: u64,
    nanoseconds: u64,
    instructions: Option<u64>,
}

/// A row's figures, in the order of [`ACCESSES`].
#[derive(Debug, Clone)]
struct Row {
    setup: Setup,
    /// Million bytes per second.
    speed: Vec<f64>,
    /// Instructions for each MiB.
    instructions: Option<Vec<u64>>,
}

/// Measures, writes `docs/benchmarks/disk.md`, prints the table.
///
/// # Errors
/// Something has not been built, or a machine did not do what it should.
pub fn run() -> Result<ExitCode> {
    let payloads = payload::prepare()?;
    let rows = SETUPS
        .into_iter()
        .map(|setup| measure(setup, &payloads))
        .collect::<Result<Vec<_>>>()?;
    let text = report::markdown(&rows);
    write!(output::stdout(), "{text}")?;
    files::write(
        &files::root().join("docs/benchmarks/disk.md"),
        text.as_bytes(),
    )?;
    Ok(ExitCode::SUCCESS)
}

fn measure(setup: Setup, payloads: &Payloads) -> Result<Row> {
    writeln!(output::stdout(), "{} ...", setup.title)?;
    let samples = samples(setup, payloads, "real", &[])?;
    let speed = samples.iter().map(|list| speed(list)).collect();
    let counts = matches!(setup.driver, Driver::Bare | Driver::Host);
    let instructions = counts.then(|| {
        let samples = self::samples(setup, payloads, "instructions", &COUNTED)?;
        samples.iter().map(|list| instructions(list)).collect()
    });
    Ok(Row {
        setup,
        speed,
        instructions: instructions.transpose()?,
    })
}

/// The samples of each access, one a round.
fn samples(
    setup: Setup,
    payloads: &Payloads,
    name: &str,
    clock: &[&str],
) -> Result<Vec<Vec<Sample>>> {
    let context = Context {
        folder: files::build("logs/bench-disk").join(setup.title.replace([' ', ','], "-")),
        patience: 2,
    };
    let disk = context.folder.join("disk");
    files::write_zeros(&disk, DISK)?;
    let machine = Machine {
        iommu: setup.iommu,
        ..Machine::virt(CPU, Gic::V3, 1)
    };
    let args = if setup.driver == Driver::Emulated {
        disk_args(&disk)
    } else {
        pci_disk_args(&[(1, &disk)], 1)
    };
    let mut extra: Vec<_> = args.iter().map(String::as_str).collect();
    extra.extend(clock);
    let mut boot = match setup.driver {
        Driver::Bare => Boot::linux_bare(&machine, payloads, "speed"),
        Driver::Host => Boot::linux_host(&machine, payloads, "speed"),
        Driver::Assigned => guest(&machine, &context, payloads, Disk::Functions(&["00:01.0"]))?,
        Driver::Emulated => guest(&machine, &context, payloads, Disk::Machine)?,
    };
    boot.extra = &extra;
    let transcript = boot.run(&context, name)?;
    if matches!(setup.driver, Driver::Bare | Driver::Host) {
        verdict::closes(&transcript, CHECKS)?;
    } else {
        verdict::guests_close(&transcript, &[CHECKS])?;
    }
    let each = ACCESSES.map(|(what, block)| {
        let prefix = format!("disk {what} {block} ");
        let lines = transcript
            .lines
            .iter()
            .filter_map(|line| line.strip_prefix(&prefix));
        let list: Option<Vec<_>> = lines.map(sample).collect();
        let list = list.filter(|list| !list.is_empty());
        list.with_context(|| format!("no good line '{prefix}BYTES took ...'"))
    });
    each.into_iter().collect()
}

fn guest(
    machine: &Machine,
    context: &Context,
    payloads: &Payloads,
    disk: Disk<'_>,
) -> Result<Boot<'static>> {
    let guest = Guest {
        kernel: &files::read(&payloads.linux, "run `make setup`")?,
        ramdisk: Some(&files::read(&payloads.initramfs, "run `make setup`")?),
        arguments: &format!("{LINUX_ARGUMENTS} {PATIENT} ravelin.test=speed ravelin.under=guest"),
        memory_mib: GUEST_MIB,
        vcpus: 1,
        lock: true,
        noncoherent: false,
        protected: false,
        disk,
    };
    let path = context.folder.join("guest.fit");
    files::write(&path, &fit::guests(&[guest])?)?;
    let mut boot = Boot::shim(machine, "");
    boot.timeout *= 4;
    boot.software.initrd = Some(path);
    Ok(boot)
}

/// Reads `BYTES took N ticks of F Hz`, perhaps with `, I instructions`.
fn sample(text: &str) -> Option<Sample> {
    let (bytes, rest) = text.trim().split_once(" took ")?;
    let (ticks, rest) = rest.split_once(" ticks of ")?;
    let (frequency, rest) = rest.split_once(" Hz")?;
    let instructions = match rest {
        "" => None,
        rest => Some(rest.strip_prefix(", ")?.strip_suffix(" instructions")?),
    };
    let (ticks, frequency): (u128, u128) = (ticks.parse().ok()?, frequency.parse().ok()?);
    Some(Sample {
        bytes: bytes.parse().ok()?,
        nanoseconds: u64::try_from((ticks * 1_000_000_000).checked_div(frequency)?).ok()?,
        instructions: instructions.map(str::parse).transpose().ok()?,
    })
}

/// Million bytes per second, of the fastest round: whatever else this machine does only slows.
#[expect(clippy::cast_precision_loss, reason = "sizes and times far below 2^52")]
fn speed(samples: &[Sample]) -> f64 {
    let each = samples
        .iter()
        .map(|s| s.bytes as f64 * 1000.0 / s.nanoseconds.max(1) as f64);
    each.fold(0.0, f64::max)
}

/// Instructions for each MiB, of the round with the fewest: whatever else Linux does meanwhile only adds.
fn instructions(samples: &[Sample]) -> Result<u64> {
    let counts = samples
        .iter()
        .map(|sample| Some(sample.instructions? * MIB / sample.bytes.max(1)));
    let counts: Option<Vec<_>> = counts.collect();
    let least = counts.and_then(|list| list.into_iter().min());
    least.context("Linux can't count instructions")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_instructions_are_read() {
        let whole = sample("4096 took 125 ticks of 62500000 Hz, 77 instructions").unwrap();
        let expected = Sample {
            bytes: 4096,
            nanoseconds: 2000,
            instructions: Some(77),
        };
        assert_eq!(whole, expected);
        let guest = sample("1 took 2 ticks of 1 Hz").unwrap();
        assert_eq!(
            (guest.nanoseconds, guest.instructions),
            (2_000_000_000, None)
        );
        for wrong in [
            "",
            "4096 took 125 ticks of 0 Hz",
            "4096 took 125 ticks of 1 Hz, x instructions",
            "4096 took 125 ticks of 1 Hz and more",
            "x took 1 ticks of 1 Hz",
        ] {
            assert_eq!(sample(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_best_round_counts() {
        let round = |nanoseconds, count| Sample {
            bytes: 2 << 20,
            nanoseconds,
            instructions: Some(count),
        };
        let rounds = [
            round(4_000_000, 100),
            round(2_097_152, 90),
            round(9_000_000, 300),
        ];
        assert!((speed(&rounds) - 1000.0).abs() < 0.001);
        assert_eq!(instructions(&rounds).unwrap(), 45);
        let uncounted = Sample {
            instructions: None,
            ..round(1, 1)
        };
        assert!(instructions(&[uncounted]).is_err());
    }

    #[test]
    fn the_table_has_every_setup() {
        let rows = SETUPS.map(|setup| Row {
            setup,
            speed: vec![1.0, 2.0, 3.0, 4.5],
            instructions: (setup.driver == Driver::Host).then(|| vec![5000, 6499, 6500, 8000]),
        });
        let text = report::markdown(&rows);
        for setup in SETUPS {
            assert!(text.contains(setup.title), "{}", setup.title);
        }
        assert_eq!(text.matches("| 1.0 | 2.0 | 3.0 | 4.5 |").count(), 6);
        assert_eq!(text.matches("| 5 | 6 | 7 | 8 |").count(), 2);
    }
}
