//! `make run`: one machine with the terminal as its console.

use crate::emulate::{self, LINUX_ARGUMENTS};
use crate::machine::{Board, Clock, Entry, Gic, Machine, QEMU, Software};
use crate::payload::{self, Payloads};
use crate::verdict;
use crate::{device_tree, files, fit, machine, output, process};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Bytes of the disk of a machine with an IOMMU that was given none.
const SCRATCH_DISK: u64 = 64 << 20;
/// Its device number.
const PCI_DISK: u8 = 1;
/// Most queues of that disk.
const MOST_QUEUES: u32 = 4;

/// What runs at EL1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// Our own host, which is linked into the image.
    Shim,
    /// Linux, to a shell.
    Linux,
    /// The same Linux without the hypervisor, to compare.
    Bare,
}

/// The settings of `make run`.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Emulated board
    #[arg(long, value_enum, default_value = "virt")]
    board: Board,
    /// What runs at EL1
    #[arg(long, value_enum, default_value = "shim")]
    host: Host,
    /// CPUs, 1 to 8 (raspi4b: always 4)
    #[arg(long, default_value_t = 4)]
    smp: u32,
    /// CPU model, as QEMU calls it (raspi4b: always cortex-a72)
    #[arg(long, default_value = "cortex-a76")]
    cpu: String,
    /// Version of the interrupt controller (raspi4b: always 2)
    #[arg(long, value_enum, default_value = "3")]
    gic: Gic,
    /// RAM, such as 512M or 2G (raspi4b: always 2G)
    #[arg(long, default_value = "1G")]
    memory: String,
    /// 1: an IOMMU before the PCI devices, and a disk behind it (virt only)
    #[arg(long, default_value_t = 0)]
    iommu: u8,
    /// What EL2 says: off, error, warn, info, debug, trace
    #[arg(long, default_value = "info")]
    log: String,
    /// Arguments for our own host's scenarios (then there are no guests), or more of them for Linux as host
    #[arg(long, default_value = "")]
    arguments: String,
    #[command(flatten)]
    guests: GuestSettings,
}

/// What our own host runs in its VMs.
#[derive(Debug, Clone, Args)]
pub struct GuestSettings {
    /// linux, demo (the one that is linked in), or the path of an arm64 Image or raw binary made for QEMU's virt
    #[arg(long, default_value = "linux")]
    guest: String,
    /// Ramdisk of the guest (default: our own for linux, none for a path)
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The guest's command line
    #[arg(long, default_value = "")]
    cmdline: String,
    /// vCPUs of each VM, 1 to 8
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// RAM of each VM, such as 256M
    #[arg(long, default_value = "256M")]
    guest_memory: String,
    /// File that the machine has as its disk, and VM 1 as its own (virt only)
    #[arg(long)]
    disk: Option<PathBuf>,
    /// How many VMs
    #[arg(long, default_value_t = 1)]
    vms: usize,
    /// 1: the VMs' memory is locked, 0: mapped on demand
    #[arg(long, default_value_t = 1)]
    lock: u8,
    /// 1: each VM has a device whose DMA does not snoop
    #[arg(long, default_value_t = 0)]
    noncoherent: u8,
    /// 1: the host can't see the VMs' memory
    #[arg(long, default_value_t = 0)]
    protected: u8,
}

/// Boots it and waits for its end.
///
/// # Errors
/// A setting is out of range, something has not been built, or QEMU cannot be started.
pub fn run(settings: &Settings) -> Result<ExitCode> {
    let machine = emulated(settings)?;
    let software = software(settings, &machine)?;
    let mut args = with_monitor(machine.args(&software));
    args.extend(disk_args(&machine, settings.guests.disk.as_deref())?);
    // Our own host's console has Ctrl-A for itself.
    let escape = if settings.host == Host::Shim {
        args.extend(["-echr", "0x14"].map(str::to_owned));
        "Ctrl-T"
    } else {
        "Ctrl-A"
    };
    let mut out = output::stdout();
    writeln!(out, "$ {QEMU} {}", process::quote(&args))?;
    writeln!(out, "(leave with {escape} x)\n")?;
    let last = converse(&args)?;
    // Our own host says in its last words how its guests, or its scenarios, went.
    if is_halt(&last) || settings.host == Host::Shim && !ended_well(&last) {
        output::complain("make run: the guests, or the host, did not end well");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs QEMU with this terminal, passes its output on byte by byte, and gives the last line that is not empty. A machine
/// that has halted is ended if nobody is there to do it, one whose output nobody reads any more always.
fn converse(args: &[String]) -> Result<String> {
    let mut qemu = Command::new(QEMU)
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU: run `make setup`")?;
    let console = qemu.stdout.take().context("QEMU has no output")?;
    let attended = std::io::stdin().is_terminal();
    let last = pass_on(console, &mut output::stdout(), attended);
    let goes_on = last.as_ref().is_ok_and(|last| attended || !is_halt(last));
    if !goes_on {
        // It may have ended all the same.
        let _ = qemu.kill();
    }
    let status = qemu.wait()?;
    ensure!(!goes_on || status.success(), "QEMU ended with {status}");
    last
}

/// Copies until the end, or, unless it is `attended`, until EL2 has halted; gives the last line that is not empty.
fn pass_on(mut from: impl Read, to: &mut impl Write, attended: bool) -> Result<String> {
    let (mut buffer, mut line, mut last) = ([0; 4096], Vec::new(), Vec::new());
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        to.write_all(&buffer[..count])?;
        to.flush()?;
        for byte in &buffer[..count] {
            if *byte != b'\n' {
                line.push(*byte);
            } else if line.iter().any(|byte| !byte.is_ascii_whitespace()) {
                last = std::mem::take(&mut line);
            } else {
                line.clear();
            }
        }
        if !attended && is_halt(&String::from_utf8_lossy(&last)) {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&last).into_owned())
}

/// Whether this is the last line of a hypervisor that has halted: the machine would never end.
fn is_halt(line: &str) -> bool {
    line.trim() == verdict::HALTED
}

/// Whether this is the closing line of a host whose checks all passed: that its guests powered off is one of them.
fn ended_well(last: &str) -> bool {
    matches!(verdict::closing_line(last), Some((1.., 0)))
}

/// A virtio disk of the machine, whose bytes are the file's. Behind an IOMMU it is a PCI device, and there is always one.
fn disk_args(machine: &Machine, disk: Option<&Path>) -> Result<Vec<String>> {
    let scratch = files::build("work/disk.img");
    let disk = match disk {
        None if !machine.iommu => return Ok(Vec::new()),
        None => {
            if !scratch.exists() {
                files::write_zeros(&scratch, SCRATCH_DISK)?;
            }
            &scratch
        }
        Some(disk) => disk,
    };
    ensure!(
        machine.board == Board::Virt,
        "DISK needs BOARD=virt: the other one has no virtio devices"
    );
    ensure!(disk.is_file(), "DISK={} is no file", disk.display());
    if machine.iommu {
        let queues = machine.cpus.min(MOST_QUEUES);
        return Ok(machine::pci_disk_args(&[(PCI_DISK, disk)], queues));
    }
    Ok(machine::disk_args(disk))
}

/// The terminal is console and QEMU's monitor in one: behind the escape key x ends, c switches.
fn with_monitor(args: Vec<String>) -> Vec<String> {
    let shared = |arg: String| match arg.as_str() {
        "stdio" => "mon:stdio".to_owned(),
        "stdio,id=line,mux=on" => "stdio,id=line,mux=on,signal=off".to_owned(),
        _ => arg,
    };
    args.into_iter().map(shared).collect()
}

fn emulated(settings: &Settings) -> Result<Machine> {
    ensure!(settings.iommu < 2, "IOMMU is 0 or 1");
    if settings.board == Board::Raspi4b {
        ensure!(settings.iommu == 0, "IOMMU needs BOARD=virt");
        return Ok(Machine::raspi4b());
    }
    ensure!(
        (1..=8).contains(&settings.smp),
        "SMP={} is out of range: 1 to 8",
        settings.smp
    );
    Ok(Machine {
        board: Board::Virt,
        cpu: settings.cpu.clone(),
        gic: settings.gic,
        cpus: settings.smp,
        memory_mib: mebibytes(&settings.memory)?,
        entry: if settings.host == Host::Bare {
            Entry::El1
        } else {
            Entry::El2
        },
        clock: Clock::Real,
        iommu: settings.iommu == 1,
    })
}

fn mebibytes(text: &str) -> Result<u32> {
    sized("MEM", text, 128)
}

/// A size in MiB, at least `least`.
fn sized(name: &str, text: &str, least: u32) -> Result<u32> {
    let (digits, factor) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let number: u32 = digits
        .parse()
        .with_context(|| format!("{name}={text}: use for example 512M or 2G"))?;
    match number.checked_mul(factor) {
        Some(mebibytes) if (least..=1_048_576).contains(&mebibytes) => Ok(mebibytes),
        _ => bail!("{name}={text} is out of range: {least}M to 1024G"),
    }
}

fn software(settings: &Settings, machine: &Machine) -> Result<Software> {
    let linux = format!("{LINUX_ARGUMENTS} {}", settings.arguments);
    let software = match settings.host {
        Host::Shim => shim(settings)?,
        Host::Linux => {
            let payloads = linux_payloads(settings)?;
            let dtb = emulate::linux_tree(machine, &payloads);
            Software {
                kernel: emulate::ravelin_image(),
                initrd: Some(payloads.fit),
                arguments: linux,
                dtb,
            }
        }
        Host::Bare => {
            let payloads = linux_payloads(settings)?;
            let dtb = emulate::linux_tree(machine, &payloads);
            return Ok(Software {
                kernel: payloads.linux,
                initrd: Some(payloads.initramfs),
                arguments: linux,
                dtb,
            });
        }
    };
    ensure!(
        software.kernel.exists(),
        "{} is missing: run `make build`",
        software.kernel.display()
    );
    with_log_level(software, machine, &settings.log)
}

/// With a file system where there is a disk for it.
fn linux_payloads(settings: &Settings) -> Result<Payloads> {
    let payloads = payload::prepare()?;
    if settings.iommu == 1 {
        return payloads.with_file_system(&files::build("work"));
    }
    Ok(payloads)
}

/// Our own host: with guests, unless it is asked for scenarios.
fn shim(settings: &Settings) -> Result<Software> {
    let guests = &settings.guests;
    let mut software = Software {
        kernel: emulate::ravelin_image(),
        arguments: settings.arguments.clone(),
        ..Software::default()
    };
    if guests.guest == "demo" || settings.arguments.contains("shim.run=") {
        return Ok(software);
    }
    let fit = files::build("work/run.fit");
    files::write(&fit, &guests_fit(settings)?)?;
    software.initrd = Some(fit);
    Ok(software)
}

/// The FIT of `vms` equal guests; a disk is the first one's.
fn guests_fit(all: &Settings) -> Result<Vec<u8>> {
    let settings = &all.guests;
    ensure!(
        (1..=8).contains(&settings.vcpus),
        "VCPUS={} is out of range: 1 to 8",
        settings.vcpus
    );
    ensure!(
        (1..=9).contains(&settings.vms),
        "VMS={} is out of range: 1 to 9",
        settings.vms
    );
    ensure!(
        settings.lock < 2 && settings.noncoherent < 2 && settings.protected < 2,
        "LOCK, NONCOHERENT and PROTECTED are 0 or 1"
    );
    ensure!(
        all.iommu == 0 || (settings.lock == 1 && settings.protected == 0),
        "IOMMU=1 gives VM 1 a PCI disk, for which its memory must be locked and not protected"
    );
    let is_linux = settings.guest == "linux";
    let (kernel, own_ramdisk) = if is_linux {
        let payloads = linux_payloads(all)?;
        (payloads.linux, Some(payloads.initramfs))
    } else {
        (PathBuf::from(&settings.guest), None)
    };
    let kernel = files::read(&kernel, "GUEST is linux, demo, or a file")?;
    let ramdisk = settings.initrd.clone().or(own_ramdisk);
    let ramdisk = ramdisk
        .map(|path| files::read(&path, "INITRD is a file"))
        .transpose()?;
    let arguments = if is_linux {
        format!("{LINUX_ARGUMENTS} ravelin.under=guest {}", settings.cmdline)
    } else {
        settings.cmdline.clone()
    };
    let memory_mib = u64::from(sized("GUEST_MEM", &settings.guest_memory, 2)?);
    ensure!(memory_mib % 2 == 0, "GUEST_MEM must be a multiple of 2 MiB");
    let guest = fit::Guest {
        kernel: &kernel,
        ramdisk: ramdisk.as_deref(),
        arguments: arguments.trim(),
        memory_mib,
        vcpus: settings.vcpus,
        lock: settings.lock == 1,
        noncoherent: settings.noncoherent == 1,
        protected: settings.protected == 1,
        disk: fit::Disk::None,
    };
    let mut guests = vec![guest; settings.vms];
    if let Some(first) = guests.first_mut() {
        first.disk = match settings.disk {
            _ if all.iommu == 1 => fit::Disk::Functions(&["00:01.0"]),
            Some(_) => fit::Disk::Machine,
            None => fit::Disk::None,
        };
    }
    fit::guests(&guests)
}

/// The level is a property of `/chosen`; "info" is EL2's own default and needs no tree of ours.
fn with_log_level(mut software: Software, machine: &Machine, level: &str) -> Result<Software> {
    ensure!(
        ["off", "error", "warn", "info", "debug", "trace"].contains(&level),
        "LOG={level}: use off, error, warn, info, debug or trace"
    );
    if level != "info" {
        let own = match &software.dtb {
            Some(path) => files::read(path, "run `make setup`")?,
            None => machine.device_tree(&files::build("work/board.dtb"))?,
        };
        let mut tree = device_tree::parse(&own)?;
        device_tree::set_chosen(&mut tree, "ravelin,log-level", level)?;
        let path = files::build("work/run.dtb");
        files::write(&path, &tree.to_dtb())?;
        software.dtb = Some(path);
    }
    Ok(software)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes_are_read_in_both_units() {
        assert_eq!(mebibytes("1G").unwrap(), 1024);
        assert_eq!(mebibytes("512M").unwrap(), 512);
        assert_eq!(mebibytes("512").unwrap(), 512);
    }

    #[test]
    fn all_output_is_passed_on_and_the_last_line_kept() {
        let text = b"a\r\n\xff b\r\n2 passed, 0 failed\r\n\r\n";
        let mut out = Vec::new();
        let last = pass_on(&text[..], &mut out, false).unwrap();
        assert_eq!(out, text);
        assert!(ended_well(&last), "{last}");
    }

    #[test]
    fn a_halted_machine_is_waited_for_only_at_a_terminal() {
        /// Says that it has halted, and fails the test's read if that is asked for more.
        struct Halted(bool);
        impl Read for Halted {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                if std::mem::replace(&mut self.0, true) {
                    return Err(std::io::ErrorKind::TimedOut.into());
                }
                let text = b"ravelin: PANIC\r\nravelin: halted\r\n";
                buffer[..text.len()].copy_from_slice(text);
                Ok(text.len())
            }
        }
        let last = pass_on(Halted(false), &mut Vec::new(), false).unwrap();
        assert!(is_halt(&last) && !ended_well(&last), "{last}");
        assert!(pass_on(Halted(false), &mut Vec::new(), true).is_err());
    }

    #[test]
    fn only_a_host_without_failures_ends_well() {
        for last in [
            "",
            "host: all 1 guests powered off",
            "0 passed, 0 failed",
            "1 passed, 1 failed",
        ] {
            assert!(!ended_well(last), "{last}");
        }
    }

    #[test]
    fn nonsense_and_extremes_are_refused() {
        for text in ["", "G", "1T", "-1G", "64M", "4294967295G", "2000000"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }
}
