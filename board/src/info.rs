//! The board as plain, bounded values.

use dtoolkit::fdt::FdtNode;
use dtoolkit::{Node, Property};
use heapless::Vec;

use crate::tree::{Path, cpu_reg, is_any, is_enabled, number, string};
use crate::{AddrRange, BoardError, Iommu, MAX_DOORBELLS, RangeList, Tree};

/// Most CPUs that are read from the tree.
pub const MAX_CPUS: usize = 64;
/// Most separate ranges of RAM.
pub const MAX_MEMORY: usize = 32;
/// Most separate reserved ranges.
pub const MAX_RESERVED: usize = 64;
/// Largest device tree in bytes: 2 MiB, the limit of the arm64 boot protocol.
const MAX_TREE: u32 = 2 << 20;
/// Affinity fields of MPIDR_EL1: Aff3 [39:32], Aff2..Aff0 [23:0] (Arm ARM D24.2, MPIDR_EL1).
pub(crate) const MPIDR_AFFINITY: u64 = 0xff_00ff_ffff;

/// How firmware is called.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PsciConduit {
    /// `method = "smc"`.
    Smc,
    /// `method = "hvc"`: an EL2 below us; of no use to code that runs at EL2.
    Hvc,
}

/// How a CPU is started.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StartMethod {
    /// `enable-method = "psci"`.
    Psci,
    /// `enable-method = "spin-table"`: its entry goes to this address (8 bytes), then SEV.
    SpinTable(u64),
    /// No method, or one that we don't know.
    Unknown,
}

/// A CPU node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cpu {
    /// Affinity fields of its MPIDR_EL1.
    pub mpidr: u64,
    /// How it is started.
    pub start: StartMethod,
}

/// A kind of UART.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UartKind {
    /// Arm PrimeCell PL011.
    Pl011,
    /// The Raspberry Pi's auxiliary ("mini") UART: 16550-like, registers 4 bytes apart.
    Mini,
}

/// The console that `stdout-path` names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Console {
    /// Its kind.
    pub kind: UartKind,
    /// CPU address of its registers.
    pub base: u64,
}

/// The interrupt controller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Gic {
    /// GICv2: distributor, CPU interface, and, with the virtualization extensions, GICH and GICV.
    V2 {
        /// Distributor.
        gicd: AddrRange,
        /// CPU interface.
        gicc: AddrRange,
        /// Virtual interface control.
        gich: Option<AddrRange>,
        /// Virtual CPU interface.
        gicv: Option<AddrRange>,
    },
    /// GICv3 or later.
    V3 {
        /// Distributor.
        gicd: AddrRange,
        /// First redistributor region.
        gicr: AddrRange,
    },
}

/// How the machine is switched off or reset where PSCI firmware can't.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Power {
    /// Power management and watchdog block of the Broadcom SoCs.
    BcmPm(u64),
}

/// A deliberate fault after boot, to see that EL2 reports it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SelfTest {
    /// A plain panic.
    Panic,
    /// Recursion until the guard page.
    StackOverflow,
    /// A store to EL2's own code.
    WriteText,
    /// A jump into EL2's data.
    ExecData,
    /// A load from address 0 where nothing is mapped.
    Null,
}

/// What the user asked for under `/chosen`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chosen<'a> {
    /// Command line, empty if there is none.
    pub bootargs: &'a str,
    /// Payload that the boot loader put into memory.
    pub initrd: Option<AddrRange>,
    /// Random bytes from the boot loader, empty if there are none; a secret of this boot.
    pub rng_seed: &'a [u8],
    /// `ravelin,log-level`.
    pub log_level: Option<&'a str>,
    /// `ravelin,self-test`.
    pub self_test: Option<SelfTest>,
}

/// Most ranges of [`Board::gic_tables`].
pub const MAX_GIC_TABLES: usize = 8;

/// A board.
#[derive(Clone, Debug)]
pub struct Board<'a> {
    /// The root's `model`, or its first `compatible`.
    pub model: &'a str,
    /// RAM, page-aligned.
    pub memory: RangeList<MAX_MEMORY>,
    /// What firmware reserved: the memory reservation block, `/reserved-memory`, spin tables, initrd.
    pub reserved: RangeList<MAX_RESERVED>,
    /// The part of `reserved` that stays so for the host, by its own tree: all but tree and initrd.
    pub set_aside: RangeList<MAX_RESERVED>,
    /// The part of `reserved` that must not even be mapped.
    pub no_map: RangeList<MAX_RESERVED>,
    /// The part of `no_map` that is the firmware's own: its node has no `compatible` that a driver
    /// could claim it by, and no phandle that a device could name it by. On a Raspberry Pi 5 that is
    /// where the code behind SMC runs, in memory that nothing else protects.
    pub firmware: RangeList<MAX_RESERVED>,
    /// CPUs in the tree's order, enabled or held for us; at least one.
    pub cpus: Vec<Cpu, MAX_CPUS>,
    /// CPU nodes beyond [`MAX_CPUS`].
    pub cpus_left_out: usize,
    /// Console.
    pub console: Option<Console>,
    /// PSCI firmware.
    pub psci: Option<PsciConduit>,
    /// A core that this firmware turned off can be turned on again.
    pub psci_gives_back: bool,
    /// Interrupt controller.
    pub gic: Option<Gic>,
    /// Registers of the interrupt controller that make it read and write memory: its ITSs; and those of
    /// its redistributors that are not in [`Gic::V3`]'s region.
    pub gic_tables: Vec<AddrRange, MAX_GIC_TABLES>,
    /// Such registers beyond [`MAX_GIC_TABLES`].
    pub gic_tables_left_out: usize,
    /// Power control without firmware.
    pub power: Option<Power>,
    /// Registers of the random number generator, an RNG200: all of them, 4-aligned.
    pub generator: Option<AddrRange>,
    /// The IOMMU in front of PCI devices.
    pub iommu: Option<Iommu>,
    /// Where devices send their interrupts.
    pub doorbells: RangeList<MAX_DOORBELLS>,
    /// What the user asked for.
    pub chosen: Chosen<'a>,
}

/// Checks the first 8 bytes of a blob (magic and `totalsize`) and gives its size in bytes.
///
/// Raspberry Pi firmware without a device tree passes an ATAG list, QEMU may pass 0: both are
/// told apart here, before anything else is read.
///
/// # Errors
///
/// [`BoardError::NotADeviceTree`] or [`BoardError::BadSize`].
pub fn check_header(address: u64, header: [u8; 8]) -> Result<usize, BoardError> {
    let [a, b, c, d, e, f, g, h] = header;
    let found = u32::from_be_bytes([a, b, c, d]);
    if found != 0xd00d_feed {
        return Err(BoardError::NotADeviceTree { address, found });
    }
    let size = u32::from_be_bytes([e, f, g, h]);
    if !(0x40..=MAX_TREE).contains(&size) {
        return Err(BoardError::BadSize(size));
    }
    usize::try_from(size).map_err(|_| BoardError::BadSize(size))
}

impl<'a> Board<'a> {
    /// Reads the board.
    ///
    /// # Errors
    ///
    /// [`BoardError::NoMemory`], [`BoardError::NoCpus`] or [`BoardError::TooMany`].
    pub fn read(tree: &Tree<'a>) -> Result<Self, BoardError> {
        let root = tree.fdt().root();
        let mut board = Self {
            model: string(&root, "model").unwrap_or("unnamed board"),
            memory: RangeList::new(),
            reserved: RangeList::new(),
            set_aside: RangeList::new(),
            no_map: RangeList::new(),
            firmware: RangeList::new(),
            cpus: Vec::new(),
            cpus_left_out: 0,
            console: None,
            psci: None,
            psci_gives_back: !is_any(&root, KEEPS_CORES),
            gic: None,
            gic_tables: Vec::new(),
            gic_tables_left_out: 0,
            power: None,
            generator: None,
            iommu: tree.iommu(),
            doorbells: tree.doorbells(),
            chosen: Chosen::default(),
        };
        board.read_chosen(&root);
        board.read_memory(&root)?;
        board.read_reserved(tree)?;
        board.read_cpus(&root)?;
        board.read_devices(tree);
        board.console = console(tree);
        Ok(board)
    }

    fn read_chosen(&mut self, root: &FdtNode<'a>) {
        let Some(chosen) = root.child("chosen") else {
            return;
        };
        let start = number(&chosen, "linux,initrd-start");
        let end = number(&chosen, "linux,initrd-end");
        self.chosen = Chosen {
            bootargs: string(&chosen, "bootargs").unwrap_or(""),
            initrd: start.zip(end).and_then(|(s, e)| AddrRange::new(s, e)),
            rng_seed: chosen
                .property("rng-seed")
                .and_then(|seed| seed.value_as().ok())
                .unwrap_or(&[]),
            log_level: string(&chosen, "ravelin,log-level"),
            self_test: string(&chosen, "ravelin,self-test").and_then(self_test),
        };
    }

    fn read_memory(&mut self, root: &FdtNode<'a>) -> Result<(), BoardError> {
        let nodes = root
            .children()
            .filter(|node| string(node, "device_type") == Some("memory") && is_enabled(node));
        for node in nodes {
            for range in regs(&node).filter_map(AddrRange::shrink_to_pages) {
                self.memory.insert(range, "memory ranges")?;
            }
        }
        if self.memory.as_slice().is_empty() {
            return Err(BoardError::NoMemory);
        }
        Ok(())
    }

    fn read_reserved(&mut self, tree: &Tree<'a>) -> Result<(), BoardError> {
        for entry in tree.fdt().memory_reservations() {
            let Some(range) = AddrRange::with_size(entry.address(), entry.size()) else {
                continue;
            };
            // Boot loaders list the initrd here, too. That is no reservation of the board's: what else is
            // in its pages is as it was before a reset.
            let initrd = self.chosen.initrd.map(AddrRange::grow_to_pages);
            if initrd.is_some_and(|initrd| initrd.contains_range(range)) {
                self.reserve(range)?;
            } else {
                self.set_aside(range)?;
            }
        }
        if let Some(initrd) = self.chosen.initrd {
            self.reserve(initrd)?;
        }
        let Some(parent) = tree.fdt().find_node("/reserved-memory") else {
            return Ok(());
        };
        for node in parent.children().filter(is_enabled) {
            let has = |name| node.property(name).is_some();
            let no_map = has("no-map");
            let claimed = has("compatible") || has("phandle") || has("linux,phandle");
            for range in regs(&node).map(AddrRange::grow_to_pages) {
                self.set_aside(range)?;
                if no_map {
                    self.no_map.insert(range, "no-map ranges")?;
                }
                if no_map && !claimed {
                    self.firmware.insert(range, "firmware's ranges")?;
                }
            }
        }
        Ok(())
    }

    /// Marks what nobody may be placed in.
    ///
    /// # Errors
    ///
    /// [`BoardError::TooMany`].
    pub fn reserve(&mut self, range: AddrRange) -> Result<(), BoardError> {
        self.reserved
            .insert(range.grow_to_pages(), "reserved ranges")
    }

    fn set_aside(&mut self, range: AddrRange) -> Result<(), BoardError> {
        self.set_aside
            .insert(range.grow_to_pages(), "reserved ranges")?;
        self.reserve(range)
    }

    fn read_cpus(&mut self, root: &FdtNode<'a>) -> Result<(), BoardError> {
        let Some(parent) = root.child("cpus") else {
            return Err(BoardError::NoCpus);
        };
        for node in parent.children() {
            let Some(cpu) = cpu(&node) else { continue };
            if let StartMethod::SpinTable(word) = cpu.start
                && let Some(range) = AddrRange::with_size(word, 8)
            {
                self.set_aside(range)?;
            }
            if self.cpus.push(cpu).is_err() {
                self.cpus_left_out += 1;
            }
        }
        if self.cpus.is_empty() {
            return Err(BoardError::NoCpus);
        }
        Ok(())
    }

    fn read_devices(&mut self, tree: &Tree<'a>) {
        let found: Option<()> = tree.find_map(|path| {
            let node = path.last()?;
            if is_any(node, &["arm,psci-1.0", "arm,psci-0.2", "arm,psci"]) {
                self.psci = psci_conduit(node);
            } else if self.gic.is_none() && is_enabled(node) {
                self.gic = gic(path);
            }
            if is_any(node, &["arm,gic-v3"]) {
                let regions = number(node, "#redistributor-regions").unwrap_or(1);
                let others = (2..64).zip(1..regions);
                others.for_each(|(reg, _)| self.add_gic_tables(cpu_reg(path, reg)));
            } else if is_any(node, &[ITS]) {
                self.add_gic_tables(cpu_reg(path, 0));
            }
            if is_any(node, BCM) {
                self.read_bcm(path);
            }
            None
        });
        debug_assert!(found.is_none(), "the visitor never stops the walk");
    }
}

impl Board<'_> {
    /// A node that is one of [`BCM`].
    fn read_bcm(&mut self, path: &Path<'_>) {
        let registers = cpu_reg(path, 0);
        match path.last() {
            Some(node) if is_any(node, RNG200) => {
                let registers = registers.filter(|_| is_enabled(node));
                let registers = registers.filter(|range| has_rng200_registers(*range));
                self.generator = self.generator.or(registers);
            }
            _ => self.power = registers.map(|registers| Power::BcmPm(registers.start())),
        }
    }

    fn add_gic_tables(&mut self, registers: Option<AddrRange>) {
        if let Some(registers) = registers
            && self.gic_tables.push(registers).is_err()
        {
            self.gic_tables_left_out += 1;
        }
    }
}

/// Binding of an interrupt translation service (arm,gic-v3.yaml).
pub(crate) const ITS: &str = "arm,gic-v3-its";

/// Machines whose PSCI firmware never gives a core back: a Raspberry Pi 5 (and Compute Module 5) ends its
/// CPU_OFF with a reset by RMR_EL3 that does not come; CPU_ON says that it does (raspberrypi/linux 7291).
const KEEPS_CORES: &[&str] = &["brcm,bcm2712"];

/// Bindings of the power management block (brcm,bcm2835-pm.yaml), and [`RNG200`]: no other board has them, so
/// that a node is asked for all of them at once.
const BCM: &[&str] = &[
    "brcm,bcm2835-pm",
    "brcm,bcm2711-pm",
    "brcm,bcm2712-pm",
    "brcm,bcm2835-pm-wdt",
    RNG200[0],
];

/// Binding of the random number generator (brcm,iproc-rng200.yaml) as a BCM2711 and a BCM2712 have it.
/// Others of its family warm up differently.
pub(crate) const RNG200: &[&str] = &["brcm,bcm2711-rng200"];

/// Size of an RNG200's registers in bytes: the last one is FIFO_COUNT, at 0x24.
const RNG200_SIZE: u64 = 0x28;

/// Whether all registers of an RNG200, of 4 bytes each, are in `range`, and can be accessed there.
const fn has_rng200_registers(range: AddrRange) -> bool {
    range.size() >= RNG200_SIZE && range.start().is_multiple_of(4)
}

/// Entries of a `reg` whose parent is the root or another identity-mapped node.
fn regs(node: &FdtNode<'_>) -> impl Iterator<Item = AddrRange> {
    node.reg()
        .ok()
        .flatten()
        .into_iter()
        .flatten()
        .filter_map(|reg| AddrRange::with_size(reg.address::<u64>().ok()?, reg.size::<u64>().ok()?))
}

/// A CPU of `/cpus` that we may start; `status = "disabled"` is how a PSCI or spin-table CPU that
/// has not been started may be marked, anything else ("fail") is not to be used
/// (Devicetree Specification 3.8.1).
fn cpu(node: &FdtNode<'_>) -> Option<Cpu> {
    if string(node, "device_type") != Some("cpu") {
        return None;
    }
    if !is_enabled(node) && string(node, "status") != Some("disabled") {
        return None;
    }
    let mpidr = number(node, "reg")? & MPIDR_AFFINITY;
    let start = match string(node, "enable-method") {
        Some("psci") => StartMethod::Psci,
        Some("spin-table" | "brcm,bcm2836-smp") => {
            number(node, "cpu-release-addr").map_or(StartMethod::Unknown, StartMethod::SpinTable)
        }
        _ => StartMethod::Unknown,
    };
    Some(Cpu { mpidr, start })
}

fn psci_conduit(node: &FdtNode<'_>) -> Option<PsciConduit> {
    match string(node, "method")? {
        "smc" => Some(PsciConduit::Smc),
        "hvc" => Some(PsciConduit::Hvc),
        _ => None,
    }
}

fn gic(path: &Path<'_>) -> Option<Gic> {
    let node = path.last()?;
    let (gicd, second) = (cpu_reg(path, 0), cpu_reg(path, 1));
    if is_any(node, &["arm,gic-v3"]) {
        return Some(Gic::V3 {
            gicd: gicd?,
            gicr: second?,
        });
    }
    if is_any(
        node,
        &["arm,gic-400", "arm,cortex-a15-gic", "arm,cortex-a7-gic"],
    ) {
        return Some(Gic::V2 {
            gicd: gicd?,
            gicc: second?,
            gich: cpu_reg(path, 2),
            gicv: cpu_reg(path, 3),
        });
    }
    None
}

impl Tree<'_> {
    /// The console: what `stdout-path` names, or else the first PL011 that is enabled.
    #[must_use]
    pub fn console(&self) -> Option<Console> {
        console(self)
    }
}

fn console(tree: &Tree<'_>) -> Option<Console> {
    let chosen = tree.fdt().find_node("/chosen");
    let named = chosen
        .and_then(|node| string(&node, "stdout-path"))
        .and_then(|path| path.split(':').next())
        .and_then(|path| uart(&tree.resolve(path)?));
    named.or_else(|| tree.find_map(|path| uart(path).filter(|c| c.kind == UartKind::Pl011)))
}

fn uart(path: &Path<'_>) -> Option<Console> {
    let node = path.last()?;
    let kind = if is_any(node, &["arm,pl011", "arm,pl011-axi"]) {
        UartKind::Pl011
    } else if is_any(node, &["brcm,bcm2835-aux-uart"]) {
        UartKind::Mini
    } else {
        return None;
    };
    if !is_enabled(node) {
        return None;
    }
    let base = cpu_reg(path, 0)?.start();
    Some(Console { kind, base })
}

fn self_test(name: &str) -> Option<SelfTest> {
    match name {
        "panic" => Some(SelfTest::Panic),
        "stack-overflow" => Some(SelfTest::StackOverflow),
        "write-text" => Some(SelfTest::WriteText),
        "exec-data" => Some(SelfTest::ExecData),
        "null" => Some(SelfTest::Null),
        _ => None,
    }
}

/// Most virtio devices that are looked at: as many as QEMU's `virt` has.
pub const MAX_VIRTIO: usize = 32;

impl Tree<'_> {
    /// Registers of the virtio devices over MMIO; whether a device is behind them they say.
    #[must_use]
    pub fn virtio_mmio(&self) -> Vec<AddrRange, MAX_VIRTIO> {
        let mut found = Vec::new();
        let full = self.find_map(|path| {
            let node = path.last()?;
            if is_any(node, &["virtio,mmio"]) && is_enabled(node) {
                return found.push(cpu_reg(path, 0)?).err();
            }
            None
        });
        debug_assert!(
            full.is_none() || found.is_full(),
            "what is beyond is left out"
        );
        found
    }

    /// Registers of a random number generator that the tree says to leave alone, as
    /// [`crate::patch_for_host`] does with EL2's.
    #[must_use]
    pub fn disabled_generator(&self) -> Option<AddrRange> {
        self.find_map(|path| {
            let node = path.last()?;
            let is_it = is_any(node, RNG200) && !is_enabled(node);
            is_it.then(|| cpu_reg(path, 0))?
        })
    }

    /// EL2's memory, as [`crate::patch_for_host`] reserved it.
    #[must_use]
    pub fn reserved_by_ravelin(&self) -> Option<AddrRange> {
        let parent = self.fdt().find_node("/reserved-memory")?;
        let node = parent.child("ravelin")?;
        regs(&node).next()
    }
}
