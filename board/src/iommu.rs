//! The IOMMU in front of the machine's PCI devices, and where they send their interrupts.
//!
//! Bindings: `arm,smmu-v3.yaml`, `pci-iommu.txt` (`iommu-map`), `arm,gic.yaml` (v2m frames).

use dtoolkit::fdt::FdtNode;
use dtoolkit::{Node, Property};
use heapless::Vec;

use crate::tree::{cpu_reg, is_any, is_enabled, number};
use crate::{AddrRange, RangeList, Tree};

/// Most entries of an `iommu-map` that are read.
pub const MAX_STREAM_MAPS: usize = 4;
/// Most separate ranges of interrupt doorbells.
pub const MAX_DOORBELLS: usize = 8;

/// PCI functions and their streams: one entry of `iommu-map`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StreamMap {
    /// First requester ID.
    pub first: u32,
    /// Its stream.
    pub stream: u32,
    /// How many.
    pub count: u32,
}

/// An SMMUv3 in front of PCI devices.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Iommu {
    /// Its registers: two pages of 64 KiB.
    pub registers: AddrRange,
    /// `dma-coherent`: its walks see the CPUs' caches.
    pub coherent: bool,
    /// How the node is named by others.
    pub phandle: u32,
    /// `iommu-map-mask`.
    pub mask: u32,
    /// `iommu-map`.
    pub streams: Vec<StreamMap, MAX_STREAM_MAPS>,
    /// Further SMMUs on the board: DMA behind them is nobody's business.
    pub others: usize,
}

impl Iommu {
    /// The stream of a PCI function.
    #[must_use]
    pub fn stream_of(&self, function: u16) -> Option<u32> {
        let id = u32::from(function) & self.mask;
        self.streams.iter().find_map(|map| {
            let offset = id.checked_sub(map.first)?;
            (offset < map.count).then(|| map.stream.checked_add(offset))?
        })
    }

    /// The PCI function of a stream.
    #[must_use]
    pub fn function_of(&self, stream: u32) -> Option<u16> {
        self.streams.iter().find_map(|map| {
            let offset = stream.checked_sub(map.stream)?;
            let id = (offset < map.count).then(|| map.first.checked_add(offset))?;
            u16::try_from(id?).ok()
        })
    }
}

/// Names of the binding.
pub(crate) const SMMU: &[&str] = &["arm,smmu-v3"];

impl Tree<'_> {
    /// The SMMUv3 that an enabled PCI host bridge names in `iommu-map`.
    #[must_use]
    pub fn iommu(&self) -> Option<Iommu> {
        let (phandle, mask, streams) = self.find_map(|path| bridge(path.last()?))?;
        let (mut found, mut others) = (None, 0);
        let walked: Option<()> = self.find_map(|path| {
            let node = path.last().filter(|node| is_any(node, SMMU))?;
            if number(node, "phandle") == Some(phandle.into()) && is_enabled(node) {
                found = cpu_reg(path, 0).map(|r| (r, node.property("dma-coherent").is_some()));
            } else {
                others += 1;
            }
            None
        });
        debug_assert!(walked.is_none(), "the visitor never stops the walk");
        let (registers, coherent) = found?;
        Some(Iommu {
            registers,
            coherent,
            phandle,
            mask,
            streams,
            others,
        })
    }

    /// Pages that devices write to for an interrupt. Not those of an ITS: the host has none.
    #[must_use]
    pub fn doorbells(&self) -> RangeList<MAX_DOORBELLS> {
        let mut found = RangeList::new();
        let full = self.find_map(|path| {
            let node = path.last().filter(|node| is_enabled(node))?;
            if !is_any(node, &["arm,gic-v2m-frame"]) {
                return None;
            }
            let page = cpu_reg(path, 0)?.grow_to_pages();
            found.insert(page, "doorbells").err()
        });
        debug_assert!(full.is_none() || found.as_slice().len() == MAX_DOORBELLS);
        found
    }
}

type Bridge = (u32, u32, Vec<StreamMap, MAX_STREAM_MAPS>);

/// The IOMMU that a PCI host bridge names, and its streams; entries of another one are left out.
fn bridge(node: &FdtNode<'_>) -> Option<Bridge> {
    if !is_enabled(node) {
        return None;
    }
    let map = node.property("iommu-map")?;
    let mut entries = map.value().chunks_exact(16).map(|entry| {
        let cell = |at: usize| {
            let bytes = entry
                .get(4 * at..4 * at + 4)
                .and_then(|b| b.try_into().ok());
            u32::from_be_bytes(bytes.unwrap_or_default())
        };
        let map = StreamMap {
            first: cell(0),
            stream: cell(2),
            count: cell(3),
        };
        (cell(1), map)
    });
    let (phandle, first) = entries.next()?;
    let same = entries.filter(|(other, _)| *other == phandle);
    let mut streams = Vec::new();
    for map in core::iter::once(first).chain(same.map(|(_, map)| map)) {
        // More entries than room: those functions have no stream that we know, and are refused.
        let _ = streams.push(map).is_ok();
    }
    let mask = number(node, "iommu-map-mask").and_then(|mask| u32::try_from(mask).ok());
    Some((phandle, mask.unwrap_or(u32::MAX), streams))
}
