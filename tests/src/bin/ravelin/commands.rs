//! What each subcommand does, in terms of the library.

use super::{Command, Damage, Suite};
use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use ravelin_tests::payload::{self, Payloads};
use ravelin_tests::runner::{self, Options};
use ravelin_tests::symbolise::Symboliser;
use ravelin_tests::x86::bochs;
use ravelin_tests::x86::disk::{self, File};
use ravelin_tests::x86::kernel;
use ravelin_tests::{
    bench_boot, bench_disk, bench_target, boot_only, device_tree, files, fit, image, interactive,
    kernel_image, map_svg, output, sdcard, suite, tcb, two_machines,
};
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// What to do to a device tree.
#[derive(Args)]
pub(super) struct DtbSettings {
    /// Flattened tree to read
    input: PathBuf,
    /// Flattened tree to write
    out: PathBuf,
    /// Set a string property of /chosen: name=value
    #[arg(long, value_name = "NAME=VALUE")]
    chosen: Vec<String>,
    /// Mark the node at this path as disabled
    #[arg(long, value_name = "PATH")]
    disable: Vec<String>,
    /// Remove the node at this path
    #[arg(long, value_name = "PATH")]
    remove: Vec<String>,
    /// Then damage it
    #[arg(long, value_enum)]
    damage: Option<Damage>,
}

/// What to do about code that only boot needs.
#[derive(Subcommand)]
pub(super) enum BootOnly {
    /// Write the linker script's lists of what only boot needs
    Divide {
        /// EL2's object file, after link-time optimisation
        object: PathBuf,
        /// Folder for boot.text.ld and boot.tables.ld
        out: PathBuf,
    },
    /// Fail if what stays in the finished image refers to what only boot needs
    Check {
        /// EL2's ELF file
        elf: PathBuf,
    },
}

/// Which scenarios, and how.
#[derive(Args)]
pub(super) struct TestSettings {
    /// Which set
    #[arg(value_enum)]
    suite: Suite,
    /// Only scenarios whose name contains this
    #[arg(long, default_value = "")]
    filter: String,
    /// List the names, run nothing
    #[arg(long)]
    list: bool,
    /// Machines at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Factor on all time limits, for a slow computer
    #[arg(long, default_value_t = 1)]
    patience: u32,
}

pub(super) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Image { elf, out } => report(
            &out,
            &image::flatten(&files::read(&elf, "build it first")?)?,
        )?,
        Command::X86Disk {
            elf,
            out,
            arguments,
        } => {
            let arguments = File {
                name: "arguments",
                bytes: arguments.as_bytes(),
            };
            let elf = files::read(&elf, "run `make build-x86` first")?;
            report(&out, &disk::build(&elf, &[arguments])?)?;
        }
        Command::X86Kernel { kernel, out } => {
            let file = files::read(&kernel, "run `make build-x86` first")?;
            report(&out, &kernel::unpack(&file)?)?;
        }
        Command::X86Run { smp, cpu, folder } => {
            let folder = folder.unwrap_or_else(|| files::build("work/x86"));
            return bochs::interactive(&cpu, smp, &folder);
        }
        Command::KernelImage { kernel, out } => {
            report(
                &out,
                &kernel_image::unpack(&files::read(&kernel, "run `make setup` first")?)?,
            )?;
        }
        Command::Symbolise { elf } => symbolise(&Symboliser::open(&elf)?)?,
        Command::Initramfs { out } => report(&out, &std::fs::read(payload::prepare()?.initramfs)?)?,
        Command::Fit { out, arguments } => write_fit(&out, arguments.as_deref())?,
        Command::Dtb(settings) => edit_tree(&settings)?,
        Command::Run(settings) => return interactive::run(&settings),
        Command::Test(settings) => return test(&settings),
        Command::BenchBoot => return bench_boot::run(),
        Command::BenchDisk => return bench_disk::run(),
        Command::BenchTarget => return bench_target::run(),
        Command::MapSvg { console, out } => {
            let text = files::read(&console, "name a console's log")?;
            report(
                &out,
                map_svg::draw(&String::from_utf8_lossy(&text))?.as_bytes(),
            )?;
        }
        Command::Tcb { check: true } => tcb::check()?,
        Command::Tcb { check: false } => tcb::write()?,
        Command::TwoMachines => two_machines::write()?,
        Command::BootOnly(BootOnly::Divide { object, out }) => boot_only::divide(&object, &out)?,
        Command::BootOnly(BootOnly::Check { elf }) => boot_only::check(&elf)?,
        Command::Sdcard { board } => {
            let folder = sdcard::write(board)?;
            writeln!(
                output::stdout(),
                "{}: see README.txt there",
                folder.display()
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a file and says how large it is.
fn report(out: &Path, bytes: &[u8]) -> Result<()> {
    files::write(out, bytes)?;
    let size = bytes.len().div_ceil(1024);
    writeln!(output::stdout(), "{}: {size} KiB", out.display())?;
    Ok(())
}

fn symbolise(symboliser: &Symboliser) -> Result<()> {
    let mut out = output::stdout();
    for line in std::io::stdin().lock().lines() {
        writeln!(out, "{}", symboliser.annotate(&line?))?;
    }
    Ok(())
}

fn write_fit(out: &Path, arguments: Option<&str>) -> Result<()> {
    let Payloads {
        linux, initramfs, ..
    } = payload::prepare()?;
    let (kernel, ramdisk) = (std::fs::read(linux)?, std::fs::read(initramfs)?);
    report(
        out,
        &fit::host_linux(&fit::HostLinux {
            kernel: &kernel,
            ramdisk: &ramdisk,
            arguments,
        })?,
    )
}

fn edit_tree(settings: &DtbSettings) -> Result<()> {
    let mut tree = device_tree::parse(&files::read(&settings.input, "name a .dtb file")?)?;
    for setting in &settings.chosen {
        let (name, value) = setting
            .split_once('=')
            .with_context(|| format!("'{setting}' is not NAME=VALUE"))?;
        device_tree::set_chosen(&mut tree, name, value)?;
    }
    settings
        .disable
        .iter()
        .try_for_each(|path| device_tree::disable(&mut tree, path))?;
    settings
        .remove
        .iter()
        .try_for_each(|path| device_tree::remove(&mut tree, path))?;
    let bytes = tree.to_dtb();
    match settings.damage {
        Some(damage) => report(&settings.out, &device_tree::damage(&bytes, damage)?),
        None => report(&settings.out, &bytes),
    }
}

fn test(settings: &TestSettings) -> Result<ExitCode> {
    if settings.list {
        let all = suite::list(settings.suite, &Arc::new(Payloads::default()));
        for scenario in all.iter().filter(|s| s.name.contains(&settings.filter)) {
            writeln!(output::stdout(), "{}", scenario.name)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options {
        jobs: settings.jobs,
        filter: settings.filter.clone(),
        patience: settings.patience,
        logs: files::build("logs"),
    };
    let scenarios = suite::scenarios(settings.suite)?;
    let report = runner::run_all(&scenarios, &options, &mut output::stdout())?;
    Ok(if report.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
