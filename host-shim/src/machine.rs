//! What the host finds when it starts.

use abi::Features;
use board::{AddrRange, Board, BoardError, Gic, Tree, check_header};

use crate::arch::mmu::{self, Settings};
use crate::arch::{self, mem};
use crate::call;
use crate::console::{self, line};

/// The machine as the host sees it.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The device tree's memory.
    pub(crate) tree_range: AddrRange,
    /// The board; its reservations include the host itself and the tree.
    pub(crate) board: Board<'static>,
    /// EL2's memory, as the tree reserves it.
    pub(crate) el2: Option<AddrRange>,
    /// Registers of a random number generator that is EL2's, or disabled by firmware.
    pub(crate) generator: Option<AddrRange>,
    /// What a core needs to turn its MMU on.
    pub(crate) settings: Settings,
    features: Features,
}

/// Reads the device tree and turns the MMU on.
pub(crate) fn read(address: u64) -> Result<Machine, BoardError> {
    let size = check_header(address, mem::header_at(address))?;
    let tree_range = AddrRange::with_size(address, size as u64).ok_or(BoardError::BadSize(0))?;
    let tree = Tree::new(mem::bytes(tree_range))?;
    console::set(tree.console());
    let mut board = Board::read(&tree)?;
    let el2 = tree.reserved_by_ravelin();
    let generator = tree.disabled_generator();
    board.reserve(tree_range)?;
    if let Some(image) = mem::image() {
        board.reserve(image)?;
    }
    let settings = mmu::enable(&board.memory).map_err(|_| BoardError::NoRoom(0))?;
    let features = call::features();
    Ok(Machine {
        tree_range,
        board,
        el2,
        generator,
        settings,
        features,
    })
}

impl Machine {
    /// Cores other than this one, which may be started: number and affinity.
    pub(crate) fn other_cores(&self) -> impl DoubleEndedIterator<Item = (usize, u64)> {
        let me = arch::mpidr();
        let cores = self.board.cpus.iter().map(|core| core.mpidr);
        cores.enumerate().filter(move |(_, mpidr)| *mpidr != me)
    }

    /// Whether EL2 offers this.
    pub(crate) const fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    /// Prints what was found.
    pub(crate) fn print(&self) {
        line(format_args!(
            "host: {} at EL{}",
            self.board.model,
            arch::current_el()
        ));
        line(format_args!(
            "host: {} CPU(s), {} MiB of RAM",
            self.board.cpus.len(),
            self.board.memory.total() >> 20
        ));
        match &self.board.gic {
            Some(Gic::V2 { gicd, gicc, .. }) => line(format_args!(
                "host: GICv2, distributor {:#x}, CPU interface {:#x}",
                gicd.start(),
                gicc.start()
            )),
            Some(Gic::V3 { gicd, gicr }) => line(format_args!(
                "host: GICv3, distributor {:#x}, redistributors {:#x}",
                gicd.start(),
                gicr.start()
            )),
            None => line(format_args!("host: no GIC that is known")),
        }
        let has = |feature| {
            if self.features.contains(feature) {
                "yes"
            } else {
                "no"
            }
        };
        line(format_args!(
            "host: EL2 offers force-write-back {}, firmware calls {}",
            has(Features::FORCE_WRITE_BACK),
            has(Features::FIRMWARE_CALLS)
        ));
        if let Some(el2) = self.el2 {
            line(format_args!(
                "host: EL2 keeps {el2:?} ({} KiB)",
                el2.size() >> 10
            ));
        }
    }
}
