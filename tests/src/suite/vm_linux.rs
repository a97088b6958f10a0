//! Debian's kernel as a guest: what `make run` shows, on every machine that it is promised for.

use super::pci_disks::{disks_of_zeros, isolated};
use super::shim::name;
use crate::emulate::{Boot, LINUX_ARGUMENTS, PATIENT};
use crate::fit::{self, Disk, Guest};
use crate::machine::{Board, Machine, disk_args};
use crate::payload::Payloads;
use crate::process::Reply;
use crate::runner::{Context, Scenario};
use crate::{files, verdict};
use anyhow::{Result, ensure};
use std::sync::Arc;

/// The shell's prompt.
const PROMPT: &str = "/ # ";
/// Opens the monitor's prompt.
const MONITOR: &str = "\u{1}c";

/// How the VMs are set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    pub(super) vms: usize,
    pub(super) vcpus: u32,
    pub(super) memory_mib: u64,
    pub(super) lock: bool,
    pub(super) noncoherent: bool,
    pub(super) protected: bool,
}

/// What `make run` does.
pub(super) const DEFAULT: Setting = Setting {
    vms: 1,
    vcpus: 1,
    memory_mib: 256,
    lock: true,
    noncoherent: false,
    protected: false,
};

/// One VM: a shell that answers, the monitor's prompt beside it, and `poweroff`, which ends the machine.
pub(super) fn shell(
    machine: Machine,
    payloads: &Arc<Payloads>,
    setting: Setting,
    kind: &str,
) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, &format!("vm-linux{kind}")), move |context| {
        let mut boot = boot(&machine, &payloads, context, setting)?;
        boot.replies = vec![
            reply(PROMPT, "echo $((6 * 7)) CPUs $(nproc)\n"),
            reply(PROMPT, &format!("{MONITOR}vm list\r")),
            reply("MiB", &format!("{MONITOR}vm stat 1\r")),
            reply("table pages", "poweroff\n"),
        ];
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        let answer = format!("42 CPUs {}", setting.vcpus);
        let said = |text: &str| transcript.lines.iter().any(|line| line.contains(text));
        ensure!(said(&answer), "the guest's shell did not answer '{answer}'");
        ensure!(said("VM 1  running"), "the monitor did not list the VM");
        ensure!(
            said("injected exceptions 0"),
            "EL2 injected exceptions into Linux"
        );
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// A protected VM: while its shell waits, the host can't read a page of it; it starts over when it wants to, and
/// measures the same again.
pub(super) fn protected(
    machine: Machine,
    payloads: &Arc<Payloads>,
    setting: Setting,
    resets: bool,
) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "vm-linux-protected"), move |context| {
        let secret = Setting {
            protected: true,
            ..setting
        };
        let mut boot = boot(&machine, &payloads, context, secret)?;
        boot.replies = vec![
            reply(PROMPT, &format!("{MONITOR}vm scan 1\r")),
            reply("the host can read", &format!("{MONITOR}vm stat 1\r")),
            reply("table pages", "echo I am $((6 * 7))\n"),
        ];
        if resets {
            boot.replies.push(reply("I am 42", "reboot\n"));
            boot.replies.push(reply("VM 1: reset", ""));
            boot.replies.push(reply(PROMPT, "poweroff\n"));
        } else {
            boot.replies.push(reply("I am 42", "poweroff\n"));
        }
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        let pages = setting.memory_mib << 8;
        let scan = format!("the host can read 0 of {pages} pages");
        verdict::line_with(&transcript, &scan)?;
        // Every page's read, and one page's write and fetch in 61; EL2 has counted each.
        let sample = pages / 61;
        let all = pages + 2 * sample;
        let refused = format!(
            "refused {pages} reads, {sample} writes, {sample} fetches, 0 not; EL2 counted {all}"
        );
        verdict::line_with(&transcript, &refused)?;
        let mut measured = transcript
            .lines
            .iter()
            .filter(|line| line.contains("protected, measurement"));
        let (first, second) = (measured.next(), measured.next());
        ensure!(first.is_some(), "no measurement was shown");
        ensure!(
            second.is_some() == resets && (!resets || first == second),
            "after its reset it measures {second:?}, before {first:?}"
        );
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// Several VMs at once, each with its own console, all of which power off.
pub(super) fn several(machine: Machine, payloads: &Arc<Payloads>, setting: Setting) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "vm-linux-several"), move |context| {
        let mut boot = boot(&machine, &payloads, context, setting)?;
        // The first one takes its time, so that the others are at their prompts when they are spoken to.
        let mut cue = "[vm1] Enter 'help'".to_owned();
        for vm in 1..=setting.vms {
            let rest = if vm == 1 { 8 } else { 1 };
            let command = format!("\u{1}{vm}sleep {rest}; echo I am $((40 + {vm}))\n");
            boot.replies.push(reply(&cue, &command));
            let answer = format!("[vm{vm}] I am {}", 40 + vm);
            boot.replies.push(reply(&answer, "poweroff\n"));
            cue = format!("VM {vm}: powered off");
        }
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        for vm in 1..=setting.vms {
            let answer = format!("[vm{vm}] I am {}", 40 + vm);
            ensure!(
                transcript.lines.iter().any(|line| line.contains(&answer)),
                "no line '{answer}'"
            );
        }
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// A reset from inside: the VM starts over, on the memory that stays locked.
pub(super) fn reset(machine: Machine, payloads: &Arc<Payloads>) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    Scenario::new(name(&machine, "vm-linux-reset"), move |context| {
        let mut boot = boot(&machine, &payloads, context, DEFAULT)?;
        boot.replies = vec![
            reply(PROMPT, "reboot\n"),
            reply("VM 1: reset", ""),
            reply(PROMPT, "poweroff\n"),
        ];
        let transcript = boot.run(context, "console")?;
        verdict::no_alarm(&transcript)?;
        let boots = transcript
            .lines
            .iter()
            .filter(|line| line.contains("Booting Linux on physical CPU"))
            .count();
        ensure!(boots == 2, "Linux booted {boots} times, not twice");
        verdict::closes(&transcript, 1)
    })
    .for_cpus(cpus)
}

/// Bytes of the disk.
const DISK: usize = 4 << 20;
/// What the guest does with its devices. Each echo computes, so that the typed line is not taken for the answer.
const DEVICES: [&str; 4] = [
    "head -c 16 /dev/vda; echo; [ $(head -c 64 /dev/hwrng | wc -c) = 64 ] && echo random $((40 + 2))",
    "head -c 2000000 /dev/urandom > /tmp/r; dd if=/tmp/r of=/dev/vda bs=100k seek=1 conv=fsync",
    "echo 3 > /proc/sys/vm/drop_caches; tail -c +102401 /dev/vda | cmp -n 2000000 - /tmp/r && echo same $((40 + 2))",
    "echo printed $((40 + 2)) > /dev/hvc0; echo -n 'kept by the disk' | dd of=/dev/vda conv=fsync",
];

/// Disk, random numbers and second console of a guest. `own`: the disk is the machine's, else a copy out of the FIT.
pub(super) fn devices(machine: Machine, payloads: &Arc<Payloads>, own: bool) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    let kind = if own { "machine" } else { "image" };
    Scenario::new(
        name(&machine, &format!("vm-linux-disk-{kind}")),
        move |context| {
            let mut contents = b"first of sectors".to_vec();
            contents.resize(DISK, 0x5a);
            let file = context.folder.join("disk");
            files::write(&file, &contents)?;
            let disk = if own {
                Disk::Machine
            } else {
                Disk::Image(&contents)
            };
            let mut boot = boot_with(&machine, &payloads, context, DEFAULT, &[disk], "")?;
            let args = disk_args(&file);
            let mut extra = boot.extra.to_vec();
            extra.extend(args.iter().map(String::as_str));
            boot.extra = &extra;
            boot.replies = DEVICES
                .iter()
                .map(|line| reply(PROMPT, &format!("{line}\n")))
                .collect();
            boot.replies.push(reply(PROMPT, "poweroff\n"));
            let transcript = boot.run(context, "console")?;
            verdict::no_alarm(&transcript)?;
            for answer in ["first of sectors", "random 42", "same 42", "printed 42"] {
                let said = transcript.lines.iter().any(|line| line.trim() == answer);
                ensure!(said, "no line '{answer}'");
            }
            verdict::closes(&transcript, 1)?;
            let after = files::read(&file, "QEMU had it as a disk")?;
            ensure!(
                after.starts_with(b"kept by the disk") == own,
                "what the guest wrote is in the wrong place"
            );
            Ok(())
        },
    )
    .for_cpus(cpus)
}

/// How a PCI disk is reset when it changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reset {
    /// As PCI Express has it, for one function.
    Function,
    /// As virtio has it, since it has nothing else.
    Status,
}

/// PCI disks behind the IOMMU are guests' own, each VM's so many: file systems on them hold what was written, also when
/// the guests are reset between. No DMA was refused, and the disks end with what the guests wrote.
pub(super) fn assigned(
    machine: Machine,
    payloads: &Arc<Payloads>,
    setting: Setting,
    numbers: &'static [u8],
    reset: Reset,
) -> Scenario {
    let payloads = Arc::clone(payloads);
    let cpus = machine.cpus;
    let word = if reset == Reset::Status {
        "-status"
    } else {
        ""
    };
    let (vms, all) = (setting.vms, numbers.len());
    let kind = format!("vm-linux-assigned{word}-{vms}x{}", all / vms);
    Scenario::new(name(&machine, &kind), move |context| {
        let payloads = payloads.with_file_system(&context.folder)?;
        let disks = disks_of_zeros(context, numbers)?;
        let functions = disks.functions();
        let functions: Vec<_> = functions.iter().map(String::as_str).collect();
        let each: Vec<_> = functions.chunks(all / vms).collect();
        let test = format!(
            "ravelin.test=disks ravelin.disks={} ravelin.resets=1",
            all / vms
        );
        let own: Vec<_> = each.iter().map(|list| Disk::Functions(list)).collect();
        let mut boot = boot_with(&machine, &payloads, context, setting, &own, &test)?;
        let mut args = disks.args(1);
        if reset == Reset::Status {
            let devices = args
                .iter_mut()
                .filter(|arg| arg.starts_with("virtio-blk-pci"));
            devices.for_each(|arg| arg.push_str(",x-pcie-flr-init=off"));
        }
        let mut extra = boot.extra.to_vec();
        extra.extend(args.iter().map(String::as_str));
        boot.extra = &extra;
        let transcript = boot.run(context, "console")?;
        let checks = u32::try_from(3 * (all / vms) + 2)?;
        verdict::guests_close(&transcript, &vec![checks; vms])?;
        isolated(&transcript)?;
        for (vm, list) in (1..).zip(each) {
            for function in list {
                verdict::line_with(&transcript, &format!("VM {vm} has {function} (1af4:1042)"))?;
                let report = format!("{function} of VM {vm}: 0 DMA accesses refused");
                verdict::line_with(&transcript, &report)?;
            }
        }
        disks.hold(b": kept by a disk of guest")
    })
    .for_cpus(cpus)
}

fn reply(cue: &str, send: &str) -> Reply {
    Reply {
        cue: cue.into(),
        send: send.into(),
    }
}

fn boot(
    machine: &Machine,
    payloads: &Payloads,
    context: &Context,
    setting: Setting,
) -> Result<Boot<'static>> {
    boot_with(machine, payloads, context, setting, &[], "")
}

/// The VMs; the first ones have these disks, and all run this test.
fn boot_with(
    machine: &Machine,
    payloads: &Payloads,
    context: &Context,
    setting: Setting,
    disks: &[Disk<'_>],
    test: &str,
) -> Result<Boot<'static>> {
    let kernel = files::read(&payloads.linux, "run `make setup`")?;
    let ramdisk = files::read(&payloads.initramfs, "run `make build`")?;
    let arguments = format!("{LINUX_ARGUMENTS} {PATIENT} ravelin.under=guest {test}");
    let guest = Guest {
        kernel: &kernel,
        ramdisk: Some(&ramdisk),
        arguments: arguments.trim_end(),
        memory_mib: setting.memory_mib,
        vcpus: setting.vcpus,
        lock: setting.lock,
        noncoherent: setting.noncoherent,
        protected: setting.protected,
        disk: Disk::None,
    };
    let mut guests = vec![guest; setting.vms];
    for (guest, disk) in guests.iter_mut().zip(disks) {
        guest.disk = *disk;
    }
    let path = context.folder.join("guests.fit");
    files::write(&path, &fit::guests(&guests)?)?;
    let mut boot = Boot::shim(machine, "");
    boot.software.initrd = Some(path);
    // Ctrl-A is the monitor's, not QEMU's.
    boot.extra = &["-echr", "0x14"];
    // Two UARTs share the terminal; input goes to the mini UART, which Debian's own tree names.
    boot.software.dtb = (machine.board == Board::Raspi4b)
        .then(|| crate::machine::debian_dtb("bcm2711-rpi-4-b.dtb"));
    Ok(boot)
}
