//! An emulated machine: QEMU's command line for a board, a CPU, an interrupt controller, and what is booted on it.

use crate::files;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The emulator.
pub const QEMU: &str = "qemu-system-aarch64";
/// The CPU models that every combination is tried on: Pi 4, Pi 5, two with forced write-back, and everything.
pub const CPUS: [&str; 5] = [
    "cortex-a72",
    "cortex-a76",
    "neoverse-v1",
    "neoverse-n2",
    "max",
];

/// One nanosecond per instruction, and nothing random: no host's clock, no seeds.
const REPEATABLE: [&str; 6] = [
    "-icount",
    "shift=0,sleep=off",
    "-rtc",
    "base=2026-01-01,clock=vm",
    "-seed",
    "1",
];

/// A board that QEMU models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Board {
    /// QEMU's own board; PSCI by SMC.
    Virt,
    /// Raspberry Pi 4 B: 4 Cortex-A72, 2 GiB, GICv2, spin table, no SMC.
    Raspi4b,
}

/// Interrupt controller of [`Board::Virt`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Gic {
    /// `GICv2`, at most 8 CPUs.
    #[value(name = "2")]
    V2,
    /// `GICv3`.
    #[value(name = "3")]
    V3,
}

/// Exception level in which the first instruction runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The machine has EL2 and enters it.
    El2,
    /// The machine has no EL2.
    El1,
}

/// How QEMU's clock runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// With the host's.
    Real,
    /// One nanosecond per instruction, waits skipped: repeatable.
    Instructions,
}

/// A machine without software.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The board.
    pub board: Board,
    /// QEMU's name of the CPU model; `raspi4b` has its own.
    pub cpu: String,
    /// The interrupt controller; `raspi4b` has its own.
    pub gic: Gic,
    /// CPUs, 1..=8; `raspi4b` has 4.
    pub cpus: u32,
    /// RAM in MiB; `raspi4b` has 2048.
    pub memory_mib: u32,
    /// Where it starts.
    pub entry: Entry,
    /// Its clock.
    pub clock: Clock,
    /// An `SMMUv3` stands before its PCI devices; `raspi4b` has none.
    pub iommu: bool,
}

/// What is booted on it.
#[derive(Debug, Clone, Default)]
pub struct Software {
    /// Image for `-kernel`.
    pub kernel: PathBuf,
    /// Image for `-initrd`.
    pub initrd: Option<PathBuf>,
    /// Device tree in place of the board's own.
    pub dtb: Option<PathBuf>,
    /// `/chosen/bootargs`.
    pub arguments: String,
}

impl Machine {
    /// A `virt` machine with 1 GiB that enters EL2.
    #[must_use]
    pub fn virt(cpu: &str, gic: Gic, cpus: u32) -> Self {
        let (board, entry, clock) = (Board::Virt, Entry::El2, Clock::Real);
        Self {
            board,
            cpu: cpu.into(),
            gic,
            cpus,
            memory_mib: 1024,
            entry,
            clock,
            iommu: false,
        }
    }

    /// The `raspi4b` machine.
    #[must_use]
    pub fn raspi4b() -> Self {
        Self {
            board: Board::Raspi4b,
            cpus: 4,
            memory_mib: 2048,
            ..Self::virt("cortex-a72", Gic::V2, 4)
        }
    }

    /// The same machine, entered elsewhere.
    #[must_use]
    pub fn entered_at(&self, entry: Entry) -> Self {
        Self {
            entry,
            ..self.clone()
        }
    }

    /// The same machine with an IOMMU before its PCI devices.
    #[must_use]
    pub fn with_iommu(&self) -> Self {
        Self {
            iommu: true,
            ..self.clone()
        }
    }

    /// Arguments for the machine alone.
    fn hardware_args(&self) -> Vec<String> {
        let mut args = match self.board {
            Board::Virt => vec![
                "-machine".into(),
                self.virt_option(),
                "-cpu".into(),
                self.cpu_option(),
            ],
            Board::Raspi4b => vec!["-machine".into(), "raspi4b".into()],
        };
        args.extend([
            "-smp".into(),
            self.cpus.to_string(),
            "-m".into(),
            format!("{}M", self.memory_mib),
        ]);
        if self.clock == Clock::Instructions {
            args.extend(REPEATABLE.map(str::to_owned));
        }
        args
    }

    /// The same CPU with a pointer signature that QEMU computes in less time than the architected one.
    fn cpu_option(&self) -> String {
        let fast = if self.cpu == "max" {
            ",pauth-impdef=on"
        } else {
            ""
        };
        format!("{}{fast}", self.cpu)
    }

    fn virt_option(&self) -> String {
        let virtualization = if self.entry == Entry::El2 {
            "on"
        } else {
            "off"
        };
        let gic = match self.gic {
            Gic::V2 => 2,
            Gic::V3 => 3,
        };
        let random = if self.clock == Clock::Instructions {
            ",dtb-randomness=off"
        } else {
            ""
        };
        let iommu = if self.iommu { ",iommu=smmuv3" } else { "" };
        format!("virt,virtualization={virtualization},gic-version={gic}{iommu}{random}")
    }

    /// The full command line; the console is on standard input and output.
    #[must_use]
    pub fn args(&self, software: &Software) -> Vec<String> {
        let mut args = self.hardware_args();
        args.extend(["-display", "none", "-monitor", "none", "-net", "none"].map(str::to_owned));
        args.extend(self.console_args());
        args.extend(["-kernel".into(), text(&software.kernel)]);
        if let Some(initrd) = &software.initrd {
            args.extend(["-initrd".into(), text(initrd)]);
        }
        if let Some(dtb) = software.dtb.clone().or_else(|| self.default_dtb()) {
            args.extend(["-dtb".into(), text(&dtb)]);
        }
        if !software.arguments.is_empty() {
            args.extend(["-append".into(), software.arguments.clone()]);
        }
        args
    }

    /// The Pi has two UARTs that software may take for its console, PL011 and "mini": both are shown.
    fn console_args(&self) -> Vec<String> {
        let shared = [
            "-chardev",
            "stdio,id=line,mux=on",
            "-serial",
            "chardev:line",
            "-serial",
            "chardev:line",
        ];
        let args = match self.board {
            Board::Virt => &["-serial", "stdio"][..],
            Board::Raspi4b => &shared,
        };
        args.iter().map(|&arg| arg.to_owned()).collect()
    }

    /// QEMU's `raspi4b` makes no device tree of its own: Debian's real one serves.
    fn default_dtb(&self) -> Option<PathBuf> {
        (self.board == Board::Raspi4b).then(|| debian_dtb("bcm2711-rpi-4-b.dtb"))
    }

    /// The device tree that the firmware would hand over: QEMU's own for `virt`, Debian's for `raspi4b`.
    ///
    /// # Errors
    /// QEMU is missing or refuses the machine; Debian's tree has not been fetched.
    pub fn device_tree(&self, scratch: &Path) -> Result<Vec<u8>> {
        if let Some(dtb) = self.default_dtb() {
            return files::read(&dtb, "run `make setup`");
        }
        let mut args = self.hardware_args();
        args[1] = format!("{},dumpdtb={}", args[1], text(scratch));
        args.extend(["-display", "none", "-net", "none"].map(str::to_owned));
        let output = Command::new(QEMU)
            .args(&args)
            .output()
            .context("cannot start QEMU: run `make setup`")?;
        ensure!(
            output.status.success(),
            "QEMU dumped no device tree: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        files::read(scratch, "QEMU should have written it")
    }
}

/// Arguments that give `virt` a virtio block device over MMIO, whose bytes are the file's.
#[must_use]
pub fn disk_args(file: &Path) -> Vec<String> {
    vec![
        "-drive".into(),
        drive("disk", file),
        "-device".into(),
        "virtio-blk-device,drive=disk".into(),
    ]
}

/// Arguments that give `virt` virtio block devices over PCI, by their device numbers on the first bus (1 to 31) and the
/// files that hold their bytes, with this many queues each. Their DMA goes through the IOMMU if there is one.
#[must_use]
pub fn pci_disk_args(disks: &[(u8, &Path)], queues: u32) -> Vec<String> {
    let mut args = Vec::new();
    for (number, file) in disks {
        let id = format!("pci-disk{number}");
        args.extend(["-drive".into(), drive(&id, file), "-device".into()]);
        args.push(format!(
            "virtio-blk-pci,drive={id},addr={number:#x},num-queues={queues},iommu_platform=on,disable-legacy=on,romfile="
        ));
    }
    args
}

/// Arguments that give `virt` this many of QEMU's `edu` devices, from 00:01.0 on, which reach every address.
#[must_use]
pub fn edu_args(count: u32) -> Vec<String> {
    let device = |number| {
        [
            "-device".to_owned(),
            format!("edu,addr={number:#x},dma_mask=0xffffffffffffffff"),
        ]
    };
    (1..=count).flat_map(device).collect()
}

/// The value of `-drive` for the bytes of a file.
fn drive(id: &str, file: &Path) -> String {
    // A comma ends a value; two of them are one.
    let file = text(file).replace(',', ",,");
    format!("if=none,id={id},format=raw,file={file}")
}

/// A Raspberry Pi device tree of Debian's kernel package.
#[must_use]
pub fn debian_dtb(name: &str) -> PathBuf {
    files::build("debian/dtb/broadcom").join(name)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virt_command_line_names_everything_that_was_chosen() {
        let mut machine = Machine::virt("max", Gic::V2, 8);
        machine.clock = Clock::Instructions;
        let software = Software {
            kernel: "k".into(),
            initrd: Some("i".into()),
            arguments: "a b".into(),
            dtb: None,
        };
        let line = machine.args(&software).join(" ");
        for part in [
            "virt,virtualization=on,gic-version=2",
            "-cpu max",
            "-smp 8",
            "-m 1024M",
            "-icount shift=0,sleep=off",
            "-kernel k",
            "-initrd i",
            "-append a b",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
        assert!(!line.contains("-dtb"));
    }

    #[test]
    fn entry_at_el1_has_no_virtualization() {
        let machine = Machine::virt("cortex-a72", Gic::V3, 1).entered_at(Entry::El1);
        assert!(
            machine
                .args(&Software::default())
                .contains(&"virt,virtualization=off,gic-version=3".to_owned())
        );
    }

    #[test]
    fn an_iommu_and_the_disks_behind_it_are_named() {
        let machine = Machine::virt("max", Gic::V3, 1).with_iommu();
        let line = machine.args(&Software::default()).join(" ");
        assert!(line.contains("gic-version=3,iommu=smmuv3"), "{line}");
        let args = pci_disk_args(&[(1, Path::new("a,b")), (20, Path::new("c"))], 4).join(" ");
        for part in [
            "id=pci-disk1,format=raw,file=a,,b",
            "drive=pci-disk1,addr=0x1,num-queues=4,iommu_platform=on",
            "drive=pci-disk20,addr=0x14,",
        ] {
            assert!(args.contains(part), "{part} is missing in {args}");
        }
    }

    #[test]
    fn raspi4b_gets_debians_device_tree() {
        let args = Machine::raspi4b().args(&Software::default());
        assert!(
            args.windows(2)
                .any(|pair| pair[0] == "-dtb" && pair[1].ends_with("bcm2711-rpi-4-b.dtb"))
        );
        assert!(!args.contains(&"-cpu".to_owned()));
    }
}
