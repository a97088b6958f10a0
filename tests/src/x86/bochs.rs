//! Bochs: configuration, command line, and the run of one machine.

use super::disk::{self, File};
use super::linux::Linux;
use crate::process::{self, Run, Transcript};
use crate::runner::Context;
use crate::{files, output, verdict};
use anyhow::{Context as _, Result, ensure};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

/// The CPU model with everything that the hypervisor can use.
pub const SKYLAKE: &str = "corei7_skylake_x";
/// EPT without accessed and dirty flags and without 1 GiB pages.
pub const SANDY_BRIDGE: &str = "corei7_sandy_bridge_2600k";
/// VMX without EPT.
pub const PENRYN: &str = "core2_penryn_t9600";
/// No VMX at all.
pub const RYZEN: &str = "ryzen";

/// Starts Bochs with its environment.
const SHELL: &str = "/bin/sh";

/// The hypervisor's ELF file.
#[must_use]
pub fn elf() -> PathBuf {
    files::build("ravelin-x86.elf")
}

/// CPUs of a machine of `make run-x86`: as many as the hypervisor uses.
const MOST_CPUS: u32 = 8;
/// Where Bochs's own messages go, beside the disk image.
const ERRORS: &str = "bochs-errors.txt";

/// RAM in MiB for a machine with a Linux guest of 128 MiB: its memory is aligned to its size, beside the payload.
pub const LINUX_MEMORY: u32 = 512;

/// One machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Bochs's name of the CPU.
    pub model: String,
    /// Where the serial line goes: Bochs's `com1` options.
    pub line: String,
    /// CPUs, 1 to 8.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory: u32,
    /// What the hypervisor is told.
    pub arguments: String,
    /// Wall-clock limit.
    pub timeout: Duration,
}

impl Machine {
    /// A machine with 256 MiB that is given four minutes.
    #[must_use]
    pub fn new(model: &str, cpus: u32, arguments: &str) -> Self {
        Self {
            model: model.into(),
            line: "mode=file, dev=/dev/stdout".into(),
            cpus,
            memory: 256,
            arguments: arguments.into(),
            timeout: Duration::from_secs(240),
        }
    }

    /// Boots it from a disk image of its own with these files; the console goes to `console.log` in the folder.
    ///
    /// # Errors
    /// The hypervisor is not built, or Bochs cannot be started.
    pub fn run(&self, context: &Context, payload: &[File<'_>]) -> Result<Transcript> {
        process::run(&Run {
            program: SHELL.into(),
            args: self.prepare(&context.folder, payload)?,
            timeout: self.timeout * context.patience,
            log: context.folder.join("console.log"),
            replies: Vec::new(),
            stop_at: vec![verdict::HALTED.into()],
        })
    }

    /// Writes disk image and configuration into the folder; the shell's arguments that start Bochs with them.
    fn prepare(&self, folder: &Path, payload: &[File<'_>]) -> Result<Vec<String>> {
        let mut all = vec![File {
            name: "arguments",
            bytes: self.arguments.as_bytes(),
        }];
        all.extend(payload);
        let elf = files::read(&elf(), "run `make build-x86`")?;
        let image = folder.join("disk.img");
        files::write(&image, &disk::build(&elf, &all)?)?;
        // A killed Bochs leaves its lock behind, and the next one would not start.
        let _ = std::fs::remove_file(folder.join("disk.img.lock"));
        let configuration = folder.join("bochsrc");
        files::write(&configuration, self.configuration(folder).as_bytes())?;
        let script = folder.join("debugger");
        files::write(&script, b"c\nq\n")?;
        Ok(arguments(&configuration, &script))
    }

    /// 50 million instructions are a second; nothing depends on the host's clock.
    fn configuration(&self, folder: &Path) -> String {
        let path = |name: &str| folder.join(name).display().to_string();
        format!(
            "config_interface: textconfig\n\
             display_library: sdl2\n\
             cpu: model={model}, count={cpus}, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=0\n\
             memory: guest={memory}, host={memory}\n\
             romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot\n\
             vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest\n\
             ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
             ata0-master: type=disk, path=\"{disk}\", mode=flat\n\
             boot: disk\n\
             com1: enabled=1, {line}\n\
             clock: sync=none, time0=1\n\
             sound: driver=dummy\n\
             plugin_ctrl: iodebug=1\n\
             log: {log}\n\
             panic: action=fatal\n\
             error: action=report\n\
             info: action=ignore\n\
             debug: action=ignore\n",
            line = self.line,
            model = self.model,
            cpus = self.cpus,
            memory = self.memory,
            disk = path("disk.img"),
            log = path("bochs.txt"),
        )
    }
}

/// Boots Linux in a VM; its console is the terminal, or, where standard input is none, standard input and output. Its
/// `poweroff -f` ends the run. The machine's files go into `folder`.
///
/// # Errors
/// Something is not built, or Bochs cannot be started.
pub fn interactive(model: &str, cpus: u32, folder: &Path) -> Result<ExitCode> {
    ensure!(
        (1..=MOST_CPUS).contains(&cpus),
        "SMP={cpus} is out of range: 1 to {MOST_CPUS}"
    );
    let mut machine = Machine::new(model, cpus, "run=linux");
    machine.memory = LINUX_MEMORY;
    let files = Linux::prepare("")?;
    let status = if std::io::stdin().is_terminal() {
        machine.line = "mode=term, dev=/dev/tty".into();
        let arguments = machine.prepare(folder, &files.files())?;
        Command::new(SHELL).args(arguments).status()?
    } else {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        machine.line = format!("mode=socket-client, dev={}", listener.local_addr()?);
        converse(&machine.prepare(folder, &files.files())?, &listener)?
    };
    if status.success() {
        return Ok(ExitCode::SUCCESS);
    }
    // What stopped Bochs itself: a wrong model, a file. If the hypervisor did, it has said so on the console.
    let errors = std::fs::read_to_string(folder.join(ERRORS)).unwrap_or_default();
    for line in errors.lines().filter(|line| line.contains(">>PANIC<<")) {
        output::complain(&format!("make run-x86: Bochs: {line}"));
    }
    Ok(ExitCode::FAILURE)
}

/// Runs Bochs, which connects its serial line to us, and passes what comes and goes on byte by byte. What Bochs itself
/// says stays out of it. A machine whose output nobody reads any more is ended.
fn converse(arguments: &[String], listener: &TcpListener) -> Result<ExitStatus> {
    let mut bochs = Command::new(SHELL)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start Bochs: run `make setup`")?;
    if let Some(mut line) = connected(listener, &mut bochs)? {
        let mut keys = line.try_clone()?;
        // Ends with the process: nothing else ends a read of standard input.
        std::thread::spawn(move || std::io::copy(&mut std::io::stdin().lock(), &mut keys));
        let shown = pass_on(&mut line, &mut output::stdout());
        if shown.is_err() {
            // It may have ended all the same.
            let _ = bochs.kill();
        }
        let status = bochs.wait()?;
        return shown.map(|()| status);
    }
    Ok(bochs.wait()?)
}

/// The serial line, `None` if Bochs ends before it has one.
fn connected(listener: &TcpListener, bochs: &mut Child) -> Result<Option<TcpStream>> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((line, _)) => {
                line.set_nonblocking(false)?;
                return Ok(Some(line));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if bochs.try_wait()?.is_some() {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Copies until the end, and shows each piece as it comes.
fn pass_on(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut buffer = [0; 4096];
    // A Bochs that ends may reset the connection instead of closing it.
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        to.write_all(&buffer[..count])?;
        to.flush()?;
    }
    Ok(())
}

/// A shell's arguments that become Bochs. No display is needed, nor used; Bochs's own messages do not mix with the
/// console.
fn arguments(configuration: &Path, script: &Path) -> Vec<String> {
    let file = |path: &Path| path.display().to_string();
    let mut bochs: Vec<_> = ["bochs", "-q", "-f"].map(String::from).into();
    bochs.extend([file(configuration), "-rc".into(), file(script)]);
    let bochs = process::quote(&bochs);
    let errors = process::quote(&[file(&script.with_file_name(ERRORS))]);
    let command = format!("SDL_VIDEODRIVER=dummy exec {bochs} 2>{errors}");
    vec!["-c".into(), command]
}
