//! `ravelin`: the project's one command line, called by `make`. `--help` lists what it does.

use anyhow::Result;
use clap::{Parser, Subcommand};
use ravelin_tests::{files, image, kernel_image, symbolise::Symboliser};
use std::io::{BufRead, Write};
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
        #[arg(long, default_value_os_t = files::build("ravelin.elf"))]
        elf: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ravelin: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Image { elf, out } => {
            let image = image::flatten(&files::read(&elf, "build it first")?)?;
            files::write(&out, &image)?;
            println!("{}: {} KiB", out.display(), image.len().div_ceil(1024));
        }
        Command::KernelImage { kernel, out } => {
            let image = kernel_image::unpack(&files::read(&kernel, "run `make setup` first")?)?;
            files::write(&out, &image)?;
            println!("{}: {} KiB", out.display(), image.len().div_ceil(1024));
        }
        Command::Symbolise { elf } => symbolise(&Symboliser::open(&elf)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn symbolise(symboliser: &Symboliser) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        writeln!(out, "{}", symboliser.annotate(&line?))?;
    }
    Ok(())
}
