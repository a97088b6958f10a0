//! What operations of a guest cost, in instructions: the payload's microbenchmarks in a VM, and a Linux guest's boot.
//!
//! Same method as for the peers (docs/benchmarks/target.md): QEMU's `virt` with GICv3, two CPUs, 1 GiB, and
//! `-icount shift=0`, so that a nanosecond of the guest's counter is an instruction, of whoever executed it.

mod report;
mod same_wipe;

use crate::bench_boot::{in_instructions, median, ticks, verdict};
use crate::emulate::{Boot, LINUX_ARGUMENTS, PATIENT};
use crate::fit::{self, Guest};
use crate::machine::{Clock, Gic, Machine, edu_args};
use crate::payload::{self, Payloads};
use crate::runner::Context;
use crate::{files, output, verdict};
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;

/// Models that are measured.
const CPUS: [&str; 2] = ["cortex-a76", "max"];
/// Most that a Linux guest's boot may take longer than bare, in per cent.
const TARGET_BOOT_PERCENT: f64 = 5.0;
/// RAM of the Linux guest and of the bare machine, in MiB: Linux's boot moves with where things lie in memory, so the
/// median over nine sizes counts.
const BOOT_SIZES: [u32; 9] = [256, 272, 288, 304, 320, 336, 352, 368, 384];
const PAYLOAD_MIB: u64 = 128;
/// RAM of the machine on which our host measures, in MiB.
const HOST_MIB: u32 = 4096;
/// Of which so much is donated.
const DONATED_MIB: u64 = 1024;

/// An operation.
#[derive(Debug, Clone, Copy)]
struct Operation {
    /// The payload's name of it.
    name: &'static str,
    title: &'static str,
    /// Where it is measured.
    source: Source,
    /// Most instructions that it may take; `None`: shown only.
    target: Option<u64>,
    /// The same on Bao, Xen, KVM with VHE, without, and as pKVM; `None`: not measured.
    peers: [Option<u64>; 5],
}

/// Who measures an operation.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// The payload in a VM whose memory is locked.
    Locked,
    /// The payload in a VM whose memory is mapped on demand.
    OnDemand,
    /// The payload in a protected VM whose memory is locked.
    Protected,
    /// Our host's own scenarios.
    Host,
    /// The same, on machines with and without an SMMU.
    Importer,
}

const fn operation(
    name: &'static str,
    title: &'static str,
    target: Option<u64>,
    peers: [Option<u64>; 5],
) -> Operation {
    Operation {
        name,
        title,
        source: Source::Locked,
        target,
        peers,
    }
}

/// An operation that our host's own scenarios measure.
const fn host(
    name: &'static str,
    title: &'static str,
    target: Option<u64>,
    peers: [Option<u64>; 5],
) -> Operation {
    Operation {
        source: Source::Host,
        ..operation(name, title, target, peers)
    }
}

/// What a protected VM pays for the operation with the same name.
const fn protected(name: &'static str, title: &'static str) -> Operation {
    Operation {
        source: Source::Protected,
        ..operation(name, title, None, [None; 5])
    }
}

/// What an SMMU that walks the tables adds to an operation.
const fn importer(name: &'static str, title: &'static str) -> Operation {
    Operation {
        source: Source::Importer,
        ..operation(name, title, None, [None; 5])
    }
}

/// Most that an exit of a protected VM may take longer, in per cent.
const TARGET_PROTECTED_PERCENT: u64 = 15;

/// Names of the peers' columns, with what they were measured on.
const PEERS: [&str; 5] = [
    "Bao 2026-07 (A72)",
    "Xen 4.17 (A72)",
    "KVM VHE 6.12 (A76)",
    "KVM nVHE 6.12 (A72)",
    "pKVM 6.12 (A72)",
];

/// What is shown, in this order.
const OPERATIONS: [Operation; 29] = [
    operation(
        "hypercall",
        "null hypercall (PSCI_VERSION)",
        Some(150),
        [Some(200), Some(482), Some(1366), Some(1746), Some(2965)],
    ),
    operation(
        "mmio-el2",
        "distributor read",
        Some(220),
        [Some(241), Some(627), Some(2149), Some(2486), Some(3705)],
    ),
    operation(
        "mmio-host",
        "MMIO read emulated by the VMM",
        Some(1500),
        [None, None, Some(6821), Some(6394), Some(7583)],
    ),
    host("switch", "to the host and back", None, [None; 5]),
    operation("sysreg", "trapped system register", None, [None; 5]),
    operation(
        "eoi",
        "end of interrupt",
        None,
        [Some(21), Some(21), Some(21), Some(21), Some(21)],
    ),
    operation(
        "ipi",
        "IPI between two vCPUs",
        Some(1000),
        [Some(1344), Some(2175), Some(5121), Some(5856), Some(8297)],
    ),
    operation(
        "timer",
        "timer interrupt",
        Some(800),
        [None, Some(1057), Some(5299), Some(6089), Some(8524)],
    ),
    operation(
        "first-touch",
        "first touch of a locked page",
        Some(23),
        [None, Some(23), None, None, None],
    ),
    Operation {
        source: Source::OnDemand,
        ..operation(
            "first-touch",
            "first touch of a page on demand",
            Some(1500),
            [None, None, Some(8623), Some(9070), Some(10751)],
        )
    },
    host(
        "page-fault",
        "4 KiB page fault, tables there",
        Some(1500),
        [None, None, Some(8623), Some(9070), Some(10751)],
    ),
    operation(
        "second-touch",
        "second touch",
        Some(23),
        [Some(23), Some(23), Some(23), Some(23), Some(23)],
    ),
    host("lock-page", "lock by pages, for each", Some(60), [None; 5]),
    host(
        "lock-blocks",
        "lock of 1 GiB by 2 MiB blocks",
        Some(2000),
        [None; 5],
    ),
    host(
        "lock-one-block",
        "lock of 1 GiB by one block",
        Some(2000),
        [None; 5],
    ),
    protected("hypercall", "null hypercall, protected VM"),
    protected("mmio-el2", "distributor read, protected VM"),
    protected("mmio-host", "MMIO read emulated by the VMM, protected VM"),
    protected("ipi", "IPI, protected VM"),
    protected("timer", "timer interrupt, protected VM"),
    host(
        "donate",
        "donation, for each page, without wiping",
        Some(60),
        [None; 5],
    ),
    host("donate-wiped", "donation of a page, wiped", None, [None; 5]),
    host(
        "donate-hashed",
        "donation of a page, measured",
        None,
        [None; 5],
    ),
    importer("donate-singly", "donation of one page, SMMU's share"),
    importer(
        "donate-together",
        "donation of 510 pages, for each, SMMU's share",
    ),
    importer(
        "importer-remove-block",
        "removal of a slot, one block, device's share",
    ),
    importer(
        "importer-remove-pages",
        "removal of a slot, 512 pages, device's share",
    ),
    importer(
        "importer-reset-block",
        "zap by a reset, one block, device's share",
    ),
    importer(
        "importer-reset-pages",
        "zap by a reset, 512 pages, device's share",
    ),
];

/// What was measured on one model, in instructions.
#[derive(Debug, Clone)]
struct Measurement {
    cpu: &'static str,
    /// In the order of [`OPERATIONS`].
    operations: Vec<u64>,
    /// Linux from its first instruction to user space: bare, and as a guest.
    boot_bare: u64,
    boot_guest: u64,
}

impl Measurement {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a percentage of counts far below 2^52"
    )]
    fn boot_percent(&self) -> f64 {
        (self.boot_guest as f64 / self.boot_bare as f64 - 1.0) * 100.0
    }

    /// What protection adds to an exit, at most: per cent, rounded up.
    fn protected_percent(&self) -> u64 {
        let plain = |name: &str| {
            let mut pairs = OPERATIONS.iter().zip(&self.operations);
            pairs.find_map(|(o, value)| {
                (o.name == name && matches!(o.source, Source::Locked)).then_some(*value)
            })
        };
        let of_protected = OPERATIONS.iter().zip(&self.operations);
        let of_protected = of_protected.filter(|(o, _)| matches!(o.source, Source::Protected));
        let percents = of_protected.filter_map(|(o, value)| {
            let plain = plain(o.name)?;
            Some(((value.saturating_sub(plain)) * 100).div_ceil(plain))
        });
        percents.max().unwrap_or(0)
    }

    fn meets_targets(&self) -> bool {
        let mut pairs = self.operations.iter().zip(OPERATIONS);
        self.boot_percent() < TARGET_BOOT_PERCENT
            && self.protected_percent() <= TARGET_PROTECTED_PERCENT
            && pairs.all(|(value, operation)| operation.target.is_none_or(|most| *value <= most))
    }
}

/// Measures, writes `docs/benchmarks/target.md` and `target.svg`, prints the table; a missed target is a failure.
///
/// # Errors
/// Something has not been built, or a guest did not do what it should.
pub fn run() -> Result<ExitCode> {
    same_wipe::check()?;
    let payloads = payload::prepare()?;
    let measurements = CPUS
        .into_iter()
        .map(|cpu| measure(cpu, &payloads))
        .collect::<Result<Vec<_>>>()?;
    let text = report::markdown(&measurements);
    write!(output::stdout(), "{text}")?;
    let folder = files::root().join("docs/benchmarks");
    files::write(&folder.join("target.md"), text.as_bytes())?;
    files::write(
        &folder.join("target.svg"),
        report::svg(&measurements).as_bytes(),
    )?;
    let met = measurements.iter().all(Measurement::meets_targets);
    verdict(met)
}

fn measure(cpu: &'static str, payloads: &Payloads) -> Result<Measurement> {
    let context = Context {
        folder: files::build("logs/bench-target").join(cpu),
        patience: 1,
    };
    writeln!(
        output::stdout(),
        "{cpu}: microbenchmarks, then Linux's boot, bare and as a guest ..."
    )?;
    let locked = microbench(cpu, &context, "locked")?;
    let on_demand = microbench(cpu, &context, "on-demand")?;
    let protected = microbench(cpu, &context, "protected")?;
    let by_host = measured_by_host(cpu, &context)?;
    let importer = added_by_importers(cpu, &context)?;
    let operations = OPERATIONS.iter().map(|operation| {
        let figures = match operation.source {
            Source::Locked => &locked,
            Source::OnDemand => &on_demand,
            Source::Protected => &protected,
            Source::Host => &by_host,
            Source::Importer => &importer,
        };
        let value = figures.get(operation.name).copied();
        value.with_context(|| format!("no line 'bench {} N'", operation.name))
    });
    let operations = operations.collect::<Result<_>>()?;
    let (boot_bare, boot_guest) = boots(cpu, payloads, &context)?;
    Ok(Measurement {
        cpu,
        operations,
        boot_bare,
        boot_guest,
    })
}

fn machine(cpu: &str, cpus: u32) -> Machine {
    Machine {
        clock: Clock::Instructions,
        ..Machine::virt(cpu, Gic::V3, cpus)
    }
}

/// Our host with one VM.
fn vm(machine: &Machine, context: &Context, name: &str, guest: Guest<'_>) -> Result<Boot<'static>> {
    let path = context.folder.join(format!("{name}.fit"));
    files::write(&path, &fit::guests(&[guest])?)?;
    let mut boot = Boot::shim(machine, "");
    boot.timeout *= 3;
    boot.software.initrd = Some(path);
    Ok(boot)
}

fn microbench(cpu: &str, context: &Context, name: &str) -> Result<BTreeMap<String, u64>> {
    let kernel = files::read(&files::build("guests/payload"), "run `make build`")?;
    let guest = Guest {
        kernel: &kernel,
        ramdisk: None,
        arguments: "run=bench",
        memory_mib: PAYLOAD_MIB,
        vcpus: 2,
        lock: name != "on-demand",
        noncoherent: false,
        protected: name == "protected",
        disk: fit::Disk::None,
    };
    let transcript = vm(&machine(cpu, 2), context, name, guest)?.run(context, name)?;
    verdict::guests_close(&transcript, &[3])?;
    Ok(figures(&transcript.lines))
}

/// What our host measures itself; it takes a GiB of memory that begins at such a boundary.
fn measured_by_host(cpu: &str, context: &Context) -> Result<BTreeMap<String, u64>> {
    let machine = Machine {
        memory_mib: HOST_MIB,
        ..machine(cpu, 2)
    };
    let transcript = Boot::shim(&machine, "shim.run=lock-cost,switch-cost").run(context, "host")?;
    verdict::closes(&transcript, 6)?;
    let figures = figures(&transcript.lines);
    ensure!(
        figures.get("donate-mib") == Some(&DONATED_MIB),
        "donations were not measured over {DONATED_MIB} MiB"
    );
    Ok(figures)
}

/// What an SMMU adds: our host measures changes of a VM with and without a device itself, and donations of its own pages
/// on this machine and on one that has no SMMU.
fn added_by_importers(cpu: &str, context: &Context) -> Result<BTreeMap<String, u64>> {
    let args = edu_args(1);
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let run = |machine: &Machine, name: &str, checks| -> Result<_> {
        let mut boot = Boot::shim(machine, "shim.run=importer-cost");
        boot.extra = &args;
        let transcript = boot.run(context, name)?;
        verdict::closes(&transcript, checks)?;
        Ok(figures(&transcript.lines))
    };
    let machine = machine(cpu, 2);
    let without = run(&machine, "no-iommu", 1)?;
    let mut added = run(&machine.with_iommu(), "iommu", 2)?;
    for (name, value) in &mut added {
        *value = value.saturating_sub(without.get(name).copied().unwrap_or(0));
    }
    Ok(added)
}

/// The lines `bench NAME VALUE`, of our host or of a guest whose lines it passes on.
fn figures(lines: &[String]) -> BTreeMap<String, u64> {
    let figure = |line: &String| {
        let line = line.strip_prefix("  guest: ").unwrap_or(line);
        let (name, value) = line.strip_prefix("bench ")?.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    lines.iter().filter_map(figure).collect()
}

/// Linux's way to user space on the board itself at EL1, and as a guest with as much memory.
fn boots(cpu: &str, payloads: &Payloads, context: &Context) -> Result<(u64, u64)> {
    let kernel = files::read(&payloads.linux, "run `make setup`")?;
    let ramdisk = files::read(&payloads.initramfs, "run `make setup`")?;
    let (mut bare, mut guest) = (Vec::new(), Vec::new());
    for size in BOOT_SIZES {
        let alone = Machine {
            memory_mib: size,
            ..machine(cpu, 1)
        };
        let boot = Boot::linux_bare(&alone, payloads, "ticks");
        let console = boot.run(context, &format!("bare-{size}"))?;
        bare.push(in_instructions(ticks(&console)?));
        let linux = Guest {
            kernel: &kernel,
            ramdisk: Some(&ramdisk),
            arguments: &format!(
                "{LINUX_ARGUMENTS} {PATIENT} ravelin.test=ticks ravelin.cpus=1 ravelin.under=guest"
            ),
            memory_mib: size.into(),
            vcpus: 1,
            lock: true,
            noncoherent: false,
            protected: false,
            disk: fit::Disk::None,
        };
        let name = format!("guest-{size}");
        let console = vm(&machine(cpu, 1), context, &name, linux)?.run(context, &name)?;
        guest.push(in_instructions(ticks(&console)?));
    }
    Ok((median(bare), median(guest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Measurement {
        Measurement {
            cpu: "max",
            operations: OPERATIONS.iter().map(limit).collect(),
            boot_bare: 1000,
            boot_guest: 1049,
        }
    }

    /// The most that an operation may take; of a protected VM: as much as of another.
    fn limit(operation: &Operation) -> u64 {
        let same = |other: &&Operation| {
            other.name == operation.name && matches!(other.source, Source::Locked)
        };
        let plain = OPERATIONS.iter().find(same).and_then(|other| other.target);
        operation.target.or(plain).unwrap_or(9999)
    }

    #[test]
    fn a_protected_vm_may_take_15_percent_more() {
        let is_protected = |o: &Operation| matches!(o.source, Source::Protected);
        let place = OPERATIONS.iter().position(is_protected).unwrap();
        for (more, meets) in [(22, true), (23, false)] {
            let mut measured = good();
            assert_eq!(measured.operations[place], 150);
            measured.operations[place] += more;
            assert_eq!(measured.meets_targets(), meets, "{more}");
        }
    }

    #[test]
    fn each_target_counts() {
        assert!(good().meets_targets());
        for (place, operation) in OPERATIONS.iter().enumerate() {
            let mut slow = good();
            slow.operations[place] += 1;
            assert_eq!(slow.meets_targets(), operation.target.is_none());
        }
        let slow = Measurement {
            boot_guest: 1051,
            ..good()
        };
        assert!(!slow.meets_targets());
    }

    #[test]
    fn only_whole_figures_are_read() {
        let lines = [
            "bench a 1",
            "bench b x",
            "bench c",
            "no bench d 2",
            "  guest: bench e 3",
        ]
        .map(str::to_owned);
        let expected = [("a".to_owned(), 1), ("e".to_owned(), 3)];
        assert_eq!(figures(&lines), BTreeMap::from(expected));
    }

    #[test]
    fn table_and_chart_hold_every_operation() {
        let (text, chart) = (report::markdown(&[good()]), report::svg(&[good()]));
        for operation in OPERATIONS {
            assert!(text.contains(operation.title), "{}", operation.title);
        }
        assert!(text.contains("| null hypercall (PSCI_VERSION) | 150 | 150 |"));
        assert!(chart.matches("<rect").count() > OPERATIONS.len());
    }
}
