//! The device tree that the host gets: the machine less what EL2 keeps.
//!
//! Invariant: the patched tree describes the bare machine, except that EL2's memory is reserved
//! (`no-map`), every CPU is started by PSCI through HVC, a CPU that did not come up is marked
//! `status = "fail"`, an IOMMU that EL2 drives is not there, and an interrupt translation service, like
//! a random number generator that EL2 drives, has `status = "disabled"`.
//!
//! One pass copies the structure block token by token (Devicetree Specification 5.4) and leaves out,
//! or adds, what differs. New properties stand first in their node; their names are appended to the
//! strings.

use core::fmt::Write;

use dtoolkit::Node;
use dtoolkit::fdt::Fdt;
use dtoolkit::standard::{AddressSpaceProperties, NodeStandard};
use heapless::{String, Vec};

use crate::info::{ITS, MPIDR_AFFINITY, RNG200};
use crate::iommu::SMMU;
use crate::tree::cells as number;
use crate::{AddrRange, EditError};

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
/// Header of a version-17 tree: ten words (Devicetree Specification 5.2).
const HEADER: usize = 40;

/// Names of the properties that are added, in the order in which they end the strings.
const NAMES: [&str; 9] = [
    "compatible",
    "method",
    "status",
    "enable-method",
    "no-map",
    "reg",
    "ranges",
    "#address-cells",
    "#size-cells",
];

/// What the host is told.
#[derive(Clone, Copy, Debug)]
pub struct HostTree<'a> {
    /// EL2's memory.
    pub el2: AddrRange,
    /// Affinity values of the CPUs that the host may start, the boot CPU included.
    pub cpus: &'a [u64],
    /// Phandle of the IOMMU that EL2 drives: the host is not told that there is one.
    pub iommu: Option<u32>,
    /// EL2 drives the random number generator: the host is told to leave it alone.
    pub generator: bool,
}

/// Writes the host's tree into `buffer` and gives its length in bytes.
///
/// # Errors
///
/// [`EditError::NoRoom`] if the buffer is too small (8 KiB more than the original always do),
/// [`EditError::NoNode`] if there is no `/cpus`, [`EditError::Cells`] if what is reserved could not be
/// read, [`EditError::Structure`] if the tree is not the one that was validated.
pub fn patch_for_host(
    original: Fdt<'_>,
    buffer: &mut [u8],
    host: &HostTree<'_>,
) -> Result<usize, EditError> {
    let from = original.data();
    let (structs, strings) = (block(from, 8, 36)?, block(from, 12, 32)?);
    let mut out = Output { buffer, length: 0 };
    out.bytes(from.get(..HEADER).ok_or(EditError::Structure)?)?;
    out.bytes(reservations(from)?)?;
    let begin = out.length;
    let mut copy = Copy::new(original, strings, host, out)?;
    copy.structure(Tokens { rest: structs })?;
    let mut out = copy.out;
    out.word(END)?;
    let end = out.length;
    out.bytes(strings)?;
    NAMES.iter().try_for_each(|name| out.string(name))?;
    let total = out.length;
    for (field, value) in [
        (4, total),
        (8, begin),
        (12, end),
        (16, HEADER),
        (32, total - end),
        (36, end - begin),
    ] {
        out.patch(field, value)?;
    }
    Ok(total)
}

/// A block of the tree whose offset and size stand at `offset` and `size` in the header.
fn block(tree: &[u8], offset: usize, size: usize) -> Result<&[u8], EditError> {
    let start = header(tree, offset)?;
    let end = start.checked_add(header(tree, size)?);
    end.and_then(|end| tree.get(start..end))
        .ok_or(EditError::Structure)
}

/// The memory reservations with their terminator, two zero doublewords.
fn reservations(tree: &[u8]) -> Result<&[u8], EditError> {
    let all = tree.get(header(tree, 16)?..).unwrap_or_default();
    let mut entries = all.chunks_exact(16);
    let used = entries.position(|entry| entry.iter().all(|byte| *byte == 0));
    used.and_then(|used| all.get(..(used + 1) * 16))
        .ok_or(EditError::Structure)
}

fn header(tree: &[u8], at: usize) -> Result<usize, EditError> {
    let word = tree.get(at..).and_then(|rest| rest.first_chunk());
    let word = word.ok_or(EditError::Structure)?;
    Ok(u32::from_be_bytes(*word) as usize)
}

/// One thing of the structure block.
enum Token<'a> {
    Begin(&'a [u8]),
    /// Where the name is in the strings, and the value.
    Prop(usize, &'a [u8]),
    EndNode,
    End,
}

/// What is left of the structure block.
#[derive(Clone, Copy)]
struct Tokens<'a> {
    rest: &'a [u8],
}

impl<'a> Tokens<'a> {
    /// The next token; a block that breaks off ends there.
    fn next(&mut self) -> Token<'a> {
        self.try_next().unwrap_or(Token::End)
    }

    fn try_next(&mut self) -> Option<Token<'a>> {
        loop {
            match self.word()? {
                BEGIN_NODE => {
                    let length = self.rest.iter().position(|byte| *byte == 0)?;
                    let name = self.take(length + 1)?;
                    return Some(Token::Begin(name.get(..length)?));
                }
                PROP => {
                    let length = self.word()? as usize;
                    let name = self.word()? as usize;
                    return Some(Token::Prop(name, self.take(length)?));
                }
                END_NODE => return Some(Token::EndNode),
                NOP => {}
                _ => return None,
            }
        }
    }

    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u32::from_be_bytes(*word))
    }

    /// So many bytes, and what pads them to whole words.
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self
            .rest
            .split_at_checked(length.checked_next_multiple_of(4)?)?;
        self.rest = rest;
        taken.get(..length)
    }
}

/// The tree that is being written.
struct Output<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl Output<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), EditError> {
        let needed = bytes.len();
        let room = self.buffer.get_mut(self.length..);
        let room = room.and_then(|room| room.get_mut(..needed));
        let room = room.ok_or(EditError::NoRoom { needed })?;
        room.copy_from_slice(bytes);
        self.length += needed;
        Ok(())
    }

    fn word(&mut self, word: u32) -> Result<(), EditError> {
        self.bytes(&word.to_be_bytes())
    }

    fn string(&mut self, text: &str) -> Result<(), EditError> {
        self.bytes(text.as_bytes())?;
        self.bytes(&[0])
    }

    /// Pads what was written to whole words: every block before it has whole words.
    fn pad(&mut self) -> Result<(), EditError> {
        let padding = self.length.next_multiple_of(4) - self.length;
        self.bytes([0; 4].get(..padding).unwrap_or_default())
    }

    fn begin(&mut self, name: &[u8]) -> Result<(), EditError> {
        self.word(BEGIN_NODE)?;
        self.bytes(name)?;
        self.bytes(&[0])?;
        self.pad()
    }

    fn prop(&mut self, name: usize, value: &[u8]) -> Result<(), EditError> {
        self.word(PROP)?;
        self.word(size(value.len())?)?;
        self.word(size(name)?)?;
        self.bytes(value)?;
        self.pad()
    }

    /// Writes a word of the header.
    fn patch(&mut self, at: usize, value: usize) -> Result<(), EditError> {
        let word = self.buffer.get_mut(at..at + 4);
        let word = word.ok_or(EditError::Structure)?;
        word.copy_from_slice(&size(value)?.to_be_bytes());
        Ok(())
    }
}

/// A tree of at most 2 MiB has no larger number.
fn size(value: usize) -> Result<u32, EditError> {
    u32::try_from(value).map_err(|_| EditError::Structure)
}

/// The pass from the original to the host's tree.
struct Copy<'a, 'b> {
    original: Fdt<'a>,
    strings: &'a [u8],
    host: &'b HostTree<'b>,
    cells: AddressSpaceProperties,
    /// Names of the nodes that are edited below the root, while they are still to come.
    cpus: Option<&'a str>,
    reserved: Option<&'a str>,
    psci: Option<&'a str>,
    /// Whether EL2's memory is reserved already.
    is_reserved: bool,
    out: Output<'b>,
}

/// A node below the root.
#[derive(Clone, Copy, PartialEq)]
enum Branch {
    Cpus,
    Reserved,
    Other,
}

impl<'a, 'b> Copy<'a, 'b> {
    fn new(
        original: Fdt<'a>,
        strings: &'a [u8],
        host: &'b HostTree<'b>,
        out: Output<'b>,
    ) -> Result<Self, EditError> {
        let name = |path| original.find_node(path).map(|node| node.name());
        Ok(Self {
            original,
            strings,
            host,
            cells: reserved_cells(original)?,
            cpus: Some(name("/cpus").ok_or(EditError::NoNode("/cpus"))?),
            reserved: name(RESERVED),
            psci: psci(original),
            is_reserved: false,
            out,
        })
    }

    /// Copies the root and all below it, edited.
    fn structure(&mut self, mut tokens: Tokens<'_>) -> Result<(), EditError> {
        const KEPT: &[&str] = &[];
        let (mut depth, mut branch, mut replaced) = (0_usize, Branch::Other, KEPT);
        loop {
            match tokens.next() {
                Token::Begin(name) => {
                    self.out.begin(name)?;
                    depth += 1;
                    (branch, replaced) = match depth {
                        2 => self.enter(name)?,
                        3 if branch == Branch::Cpus => (branch, self.enter_cpu(tokens)?),
                        _ => (branch, KEPT),
                    };
                    if self.is_disabled(tokens) {
                        self.add("status", b"disabled\0")?;
                        replaced = &["status"];
                    }
                }
                Token::Prop(name, _) if self.is_any(name, replaced) || self.names_iommu(name) => {}
                Token::Prop(name, value) => self.out.prop(name, value)?,
                Token::EndNode => {
                    self.leave(depth, branch)?;
                    replaced = KEPT;
                    depth = depth.checked_sub(1).ok_or(EditError::Structure)?;
                }
                Token::End => return Err(EditError::Structure),
            }
            if depth == 0 {
                break;
            }
        }
        // Nothing may go on without.
        if self.is_reserved && self.cpus.is_none() {
            Ok(())
        } else {
            Err(EditError::Structure)
        }
    }

    /// A node ends.
    fn leave(&mut self, depth: usize, branch: Branch) -> Result<(), EditError> {
        match depth {
            1 => self.add_missing()?,
            2 if branch == Branch::Reserved => self.reserve_el2()?,
            _ => {}
        }
        self.out.word(END_NODE)
    }

    /// A node below the root begins: what it is, and which of its properties were replaced.
    fn enter(&mut self, name: &[u8]) -> Result<(Branch, &'static [&'static str]), EditError> {
        let is = |wanted: &Option<&str>| wanted.is_some_and(|wanted| wanted.as_bytes() == name);
        if is(&self.cpus) {
            self.cpus = None;
            return Ok((Branch::Cpus, &[]));
        }
        if is(&self.reserved) {
            self.reserved = None;
            return Ok((Branch::Reserved, &[]));
        }
        if is(&self.psci) {
            self.psci = None;
            self.psci_properties()?;
            return Ok((Branch::Other, &["compatible", "method"]));
        }
        Ok((Branch::Other, &[]))
    }

    /// A node below `/cpus` begins, and `tokens` is what it holds: if it is a CPU, how it is
    /// started.
    fn enter_cpu(&mut self, mut tokens: Tokens<'_>) -> Result<&'static [&'static str], EditError> {
        // The first of a name counts, as where the tree is read.
        let (mut kind, mut reg) = (None, None);
        while let Token::Prop(name, value) = tokens.next() {
            if self.is_any(name, &["device_type"]) {
                kind = kind.or(Some(value));
            } else if self.is_any(name, &["reg"]) {
                reg = reg.or(Some(value));
            }
        }
        let Some(mpidr) = reg.and_then(number).filter(|_| kind == Some(b"cpu\0")) else {
            return Ok(&[]);
        };
        let is_up = self.host.cpus.contains(&(mpidr & MPIDR_AFFINITY));
        let status: &[u8] = if is_up { b"okay\0" } else { b"fail\0" };
        self.add("enable-method", b"psci\0")?;
        self.add("status", status)?;
        Ok(&["cpu-release-addr", "enable-method", "status"])
    }

    /// Whether a node that holds `tokens` is the IOMMU or the generator that EL2 drives, or an ITS.
    fn is_disabled(&self, mut tokens: Tokens<'_>) -> bool {
        let (mut compatible, mut phandle) = (None, None);
        while let Token::Prop(name, value) = tokens.next() {
            if self.is_any(name, &["compatible"]) {
                compatible = compatible.or(Some(value));
            } else if self.is_any(name, &["phandle"]) {
                phandle = phandle.or(number(value));
            }
        }
        let names = compatible.unwrap_or_default().split(|byte| *byte == 0);
        let is_one_of = |known: &[&str]| {
            let mut names = names.clone();
            names.any(|name| known.iter().any(|known| known.as_bytes() == name))
        };
        let is_iommu = self.host.iommu.is_some() && phandle == self.host.iommu.map(u64::from);
        is_one_of(&[ITS])
            || (is_iommu && is_one_of(SMMU))
            || (self.host.generator && is_one_of(RNG200))
    }

    /// Whether a property of this name says which IOMMU a device is behind, and the host is not to
    /// know.
    fn names_iommu(&self, name: usize) -> bool {
        const NAMES: &[&str] = &["iommu-map", "iommu-map-mask", "iommus"];
        self.host.iommu.is_some() && self.is_any(name, NAMES)
    }

    fn psci_properties(&mut self) -> Result<(), EditError> {
        self.add("compatible", b"arm,psci-1.0\0arm,psci-0.2\0")?;
        self.add("method", b"hvc\0")
    }

    /// What the original does not have below its root.
    fn add_missing(&mut self) -> Result<(), EditError> {
        if psci(self.original).is_none() {
            self.out.begin(b"psci")?;
            self.psci_properties()?;
            self.out.word(END_NODE)?;
        }
        if self.original.find_node(RESERVED).is_none() {
            self.out.begin(&RESERVED.as_bytes()[1..])?;
            let cells = self.cells;
            self.add("#address-cells", &cells.address_cells.to_be_bytes())?;
            self.add("#size-cells", &cells.size_cells.to_be_bytes())?;
            self.add("ranges", &[])?;
            self.reserve_el2()?;
            self.out.word(END_NODE)?;
        }
        Ok(())
    }

    /// Adds `/reserved-memory/ravelin@ADDRESS` with `no-map`.
    fn reserve_el2(&mut self) -> Result<(), EditError> {
        let el2 = self.host.el2;
        let mut name = String::<32>::new();
        let written = write!(name, "ravelin@{:x}", el2.start());
        debug_assert!(written.is_ok(), "16 hex digits fit");
        let mut reg = Vec::<u8, 16>::new();
        push_cells(&mut reg, self.cells.address_cells, el2.start());
        push_cells(&mut reg, self.cells.size_cells, el2.size());
        self.out.begin(name.as_bytes())?;
        self.add("reg", &reg)?;
        self.add("no-map", &[])?;
        self.is_reserved = true;
        self.out.word(END_NODE)
    }

    /// Adds a property whose name is one of [`NAMES`].
    fn add(&mut self, name: &str, value: &[u8]) -> Result<(), EditError> {
        let before = NAMES.iter().take_while(|known| **known != name);
        let before: usize = before.map(|known| known.len() + 1).sum();
        self.out.prop(self.strings.len() + before, value)
    }

    /// Whether the name that begins at `at` in the strings is one of `names`.
    fn is_any(&self, at: usize, names: &[&str]) -> bool {
        let rest = self.strings.get(at..).unwrap_or_default();
        let is = |name: &&str| {
            let behind = rest.strip_prefix(name.as_bytes());
            behind.is_some_and(|behind| behind.first() == Some(&0))
        };
        names.iter().any(is)
    }
}

/// The name of the PSCI node.
fn psci(tree: Fdt<'_>) -> Option<&str> {
    let existing = tree.root().children().find(|node| {
        node.compatible()
            .is_some_and(|mut list| list.any(|name| name.starts_with("arm,psci")))
    });
    let node = existing.or_else(|| tree.find_node("/psci"));
    node.map(|node| node.name())
}

const RESERVED: &str = "/reserved-memory";

/// Cell sizes of what is reserved: those of the root, which `/reserved-memory` must have, too
/// (Devicetree Specification 3.5.1). Linux ignores all of one that has others.
fn reserved_cells(original: Fdt<'_>) -> Result<AddressSpaceProperties, EditError> {
    let root = original.root().address_space();
    let node = original.find_node(RESERVED);
    let own = node.map_or(root, |node| node.address_space());
    let known = [own.address_cells, own.size_cells];
    if own != root || known.iter().any(|cells| !(1..=2).contains(cells)) {
        return Err(EditError::Cells(own.address_cells, own.size_cells));
    }
    Ok(own)
}

fn push_cells(reg: &mut Vec<u8, 16>, cells: u32, value: u64) {
    let bytes = value.to_be_bytes();
    let from = if cells == 1 { 4 } else { 0 };
    let fits = reg.extend_from_slice(&bytes[from..]);
    debug_assert!(fits.is_ok(), "at most two times two cells");
}
