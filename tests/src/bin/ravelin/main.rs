//! `ravelin`: the project's one command line, called by `make`. `--help` lists what it does.

mod commands;

use clap::{Parser, Subcommand};
use ravelin_tests::device_tree::Damage;
use ravelin_tests::sdcard::Card;
use ravelin_tests::suite::Suite;
use ravelin_tests::{emulate, interactive, output};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Ravelin's tools: images, device trees, emulator tests, benchmarks")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Turn an ELF file into the flat image that a boot loader loads
    Image {
        /// ELF file to read
        elf: PathBuf,
        /// Flat image to write
        out: PathBuf,
    },
    /// Turn the x86 hypervisor's ELF file into the disk image that a PC boots
    X86Disk {
        /// ELF file to read
        elf: PathBuf,
        /// Disk image to write
        out: PathBuf,
        /// What the hypervisor is told
        #[arg(long, default_value = "")]
        arguments: String,
    },
    /// Unpack the vmlinux inside Debian's amd64 kernel file
    X86Kernel {
        /// Kernel file to read
        kernel: PathBuf,
        /// ELF file to write
        out: PathBuf,
    },
    /// Boot the x86 hypervisor with a Linux guest on Bochs, with the terminal as the guest's console
    X86Run {
        /// CPUs of the machine
        #[arg(long, default_value_t = 1)]
        smp: u32,
        /// Bochs's name of the CPU
        #[arg(long, default_value = ravelin_tests::x86::bochs::SKYLAKE)]
        cpu: String,
        /// Where its disk image goes (default: build/work/x86)
        #[arg(long)]
        folder: Option<PathBuf>,
    },
    /// Turn Debian's kernel file (raw, gzip or EFI zboot) into a raw arm64 Image
    KernelImage {
        /// Kernel file to read
        kernel: PathBuf,
        /// Raw Image to write
        out: PathBuf,
    },
    /// Copy standard input to standard output, adding function and line to each frame of a backtrace
    Symbolise {
        /// ELF file that the running image was made from
        #[arg(long, default_value_os_t = emulate::ravelin_elf())]
        elf: PathBuf,
    },
    /// Write the initramfs of the Linux host
    Initramfs {
        /// Archive to write
        out: PathBuf,
    },
    /// Write the FIT with Linux as host
    Fit {
        /// FIT to write
        out: PathBuf,
        /// Linux's command line (default: that of /chosen when it boots)
        #[arg(long)]
        arguments: Option<String>,
    },
    /// Edit a device tree, or damage it on purpose
    Dtb(commands::DtbSettings),
    /// Boot one machine with the terminal as its console
    Run(interactive::Settings),
    /// Run a suite of scenarios on emulated machines
    Test(commands::TestSettings),
    /// Count the boot's instructions, bare and under the hypervisor, and write docs/benchmarks/boot.*
    BenchBoot,
    /// Time a disk with and without an SMMU, and write docs/benchmarks/disk.md
    BenchDisk,
    /// Count the instructions of a guest's operations, and write docs/benchmarks/target.*
    BenchTarget,
    /// Draw a guest's address space from what `vm map` prints at the monitor's prompt
    MapSvg {
        /// Console log, or the lines copied from it
        console: PathBuf,
        /// Picture to write
        out: PathBuf,
    },
    /// Count what runs at EL2 and list its unsafe code: docs/tcb.md, docs/unsafe.md and the README's row
    Tcb {
        /// Write nothing; fail if an unsafe has no SAFETY comment or docs/unsafe.md is out of date
        #[arg(long)]
        check: bool,
    },
    /// Count what both machines share on the paths that docs/two-machines.md lists, and write its figures
    TwoMachines,
    /// Divide EL2's code into what stays and what only boot needs, and check the division
    #[command(subcommand)]
    BootOnly(commands::BootOnly),
    /// Write the folder that goes onto a Raspberry Pi's SD card
    Sdcard {
        /// Which board
        #[arg(long, value_enum)]
        board: Card,
    },
}

fn main() -> ExitCode {
    match commands::run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) if output::is_closed(&error) => ExitCode::from(output::CLOSED_STATUS),
        Err(error) => {
            output::complain(&format!("ravelin: error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
