//! What scenarios share: booting the image or bare Linux on a machine, and getting the transcript.

use crate::device_tree;
use crate::files;
use crate::machine::{Board, Entry, Machine, QEMU, Software};
use crate::payload::Payloads;
use crate::process::{self, Reply, Run, Transcript};
use crate::runner::Context;
use crate::verdict;
use anyhow::Result;
use std::path::PathBuf;
use std::time::Duration;

/// Wall-clock limit of a machine, in seconds: some three times what the slowest takes on two busy cores. A
/// healthy one never gets there; what hangs costs this once.
pub const SECONDS: u64 = 240;

/// Kernel arguments of every Linux here.
pub const LINUX_ARGUMENTS: &str = "console=ttyAMA0 panic=-1";

/// What is added to them where the kernel's log has to be clean: a lockup is one after two minutes, half of
/// [`SECONDS`], not after 22 s. On two busy cores an emulated one may not get further in that time than a
/// boot's longest initcall (6.12 Documentation/admin-guide/lockup-watchdogs.rst, RCU/stallwarn.rst).
pub const PATIENT: &str = "watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120";

/// What Linux says in place of switching a machine off that has no way to.
const LINUX_HALTED: &str = "reboot: Power off not available: System halted instead";

/// The image under test.
#[must_use]
pub fn ravelin_image() -> PathBuf {
    files::build("ravelin.img")
}

/// The ELF file that the image was made from, with debug information.
#[must_use]
pub fn ravelin_elf() -> PathBuf {
    files::build("ravelin.elf")
}

/// One boot of one machine.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The machine.
    pub machine: Machine,
    /// What it boots.
    pub software: Software,
    /// Wall-clock limit.
    pub timeout: Duration,
    /// What is typed on its console.
    pub replies: Vec<Reply>,
    /// Arguments for QEMU beyond those that the machine needs.
    pub extra: &'a [&'a str],
}

impl Boot<'_> {
    /// The image with our own host, which is told `arguments`.
    #[must_use]
    pub fn shim(machine: &Machine, arguments: &str) -> Self {
        let software = Software {
            kernel: ravelin_image(),
            arguments: arguments.into(),
            ..Software::default()
        };
        Self::new(machine, software, SECONDS)
    }

    /// The image with Linux as its host. `test` is the value of `ravelin.test`.
    #[must_use]
    pub fn linux_host(machine: &Machine, payloads: &Payloads, test: &str) -> Self {
        let arguments = linux_arguments(machine, test, "el2");
        let initrd = Some(payloads.fit.clone());
        let dtb = linux_tree(machine, payloads);
        Self::new(
            machine,
            Software {
                kernel: ravelin_image(),
                initrd,
                arguments,
                dtb,
            },
            SECONDS,
        )
    }

    /// The same Linux without the image below it, entered at EL1 as it would be by the image.
    #[must_use]
    pub fn linux_bare(machine: &Machine, payloads: &Payloads, test: &str) -> Self {
        let machine = if machine.board == Board::Virt {
            machine.entered_at(Entry::El1)
        } else {
            machine.clone()
        };
        let arguments = linux_arguments(&machine, test, "bare");
        let initrd = Some(payloads.initramfs.clone());
        let dtb = linux_tree(&machine, payloads);
        let software = Software {
            kernel: payloads.linux.clone(),
            initrd,
            arguments,
            dtb,
        };
        Self::new(&machine, software, SECONDS)
    }

    /// Any software.
    #[must_use]
    pub fn new(machine: &Machine, software: Software, seconds: u64) -> Self {
        let timeout = Duration::from_secs(seconds);
        Self {
            machine: machine.clone(),
            software,
            timeout,
            replies: Vec::new(),
            extra: &[],
        }
    }

    /// Hands over the machine's own device tree with these strings set in `/chosen`.
    ///
    /// # Errors
    /// QEMU gives no tree, or the file cannot be written.
    pub fn chosen(mut self, context: &Context, properties: &[(&str, &str)]) -> Result<Self> {
        let dtb = self
            .machine
            .device_tree(&context.folder.join("board.dtb"))?;
        let mut tree = device_tree::parse(&dtb)?;
        for (name, value) in properties {
            device_tree::set_chosen(&mut tree, name, value)?;
        }
        let path = context.folder.join("edited.dtb");
        files::write(&path, &tree.to_dtb())?;
        self.software.dtb = Some(path);
        Ok(self)
    }

    /// Runs it; the console goes to `NAME.log` in the scenario's folder.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn run(&self, context: &Context, name: &str) -> Result<Transcript> {
        let mut args = self.machine.args(&self.software);
        args.extend(self.extra.iter().map(|&arg| arg.to_owned()));
        process::run(&Run {
            program: QEMU.into(),
            args,
            timeout: self.timeout * context.patience,
            log: context.folder.join(format!("{name}.log")),
            replies: self.replies.clone(),
            stop_at: vec![verdict::HALTED.into(), LINUX_HALTED.into()],
        })
    }
}

/// The device tree in place of the board's own that Linux needs on this machine.
#[must_use]
pub fn linux_tree(machine: &Machine, payloads: &Payloads) -> Option<PathBuf> {
    (machine.board == Board::Raspi4b).then(|| payloads.pi4_tree.clone())
}

fn linux_arguments(machine: &Machine, test: &str, under: &str) -> String {
    format!(
        "{LINUX_ARGUMENTS} {PATIENT} ravelin.test={test} ravelin.cpus={} ravelin.under={under}",
        machine.cpus
    )
}
