//! Which functions of the object file only boot can reach.
//!
//! The compiler puts each function into a section of its own, and each reference from one section to another is a
//! relocation: the relocations of branches are all direct control flow that there is, and every other one to code
//! takes a function's address. Assembly (sections without a function symbol) is named by hand: `.boot.*` runs only
//! at boot, the rest always may.

use anyhow::{Context, Result, ensure};
use object::elf;
use object::{
    Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionIndex,
    SectionKind, SymbolKind,
};
use std::collections::{BTreeMap, BTreeSet};

/// Prefix of the sections of boot's assembly.
pub(crate) const BOOT_ASSEMBLY: &str = ".boot.";

/// How one section refers to another.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Reference {
    /// A branch, or an entry of a jump table: control may go there from here.
    Branch,
    /// Everything else: where it goes from here is not known.
    Address,
}

/// A section of code or constants, and what it refers to.
#[derive(Debug, Default)]
struct Node {
    name: String,
    is_empty: bool,
    is_code: bool,
    is_assembly: bool,
    references: BTreeSet<(usize, Reference)>,
}

/// The sections of an object file that can be reached at run time, by their index.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    nodes: BTreeMap<usize, Node>,
}

/// The outcome: names of sections, sorted.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Parts {
    /// Code that only boot reaches, with the jump tables and formatters' tables that belong to it.
    pub(crate) boot: BTreeSet<String>,
    /// Functions that only boot reaches, but whose address it takes: who has it, and when, nobody can say.
    pub(crate) held: BTreeSet<String>,
}

impl Node {
    fn is_boot_assembly(&self) -> bool {
        self.is_assembly && self.name.starts_with(BOOT_ASSEMBLY)
    }

    /// A constant whose entries are distances to code: the compiler makes only jump tables so.
    fn is_jump_table(&self) -> bool {
        let mut references = self.references.iter();
        !self.is_code && references.any(|(_, how)| *how == Reference::Branch)
    }
}

impl Graph {
    /// Reads an object file whose functions have sections of their own.
    ///
    /// # Errors
    /// It is none, or two sections of code have one name: a linker script could not tell them apart.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self> {
        let file = object::File::parse(bytes).context("not an object file")?;
        let mut graph = Self::default();
        for section in file.sections() {
            let Some(is_code) = loaded(&section) else {
                continue;
            };
            let node = Node {
                name: section.name()?.to_owned(),
                is_empty: section.size() == 0,
                is_code,
                is_assembly: is_code,
                references: references(&file, &section)?,
            };
            graph.nodes.insert(section.index().0, node);
        }
        for symbol in file.symbols().filter(|s| s.kind() == SymbolKind::Text) {
            let node = symbol
                .section_index()
                .and_then(|index| graph.nodes.get_mut(&index.0));
            if let Some(node) = node {
                node.is_assembly = false;
            }
        }
        graph.names_are_unique()?;
        Ok(graph)
    }

    fn names_are_unique(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for node in self.nodes.values().filter(|n| n.is_code && !n.is_empty) {
            ensure!(
                seen.insert(&node.name),
                "two sections of code are called {}",
                node.name
            );
        }
        Ok(())
    }

    /// Constants that are nothing but a formatter's table of methods (`dyn Debug`, `dyn Write`), which only
    /// instructions name: as with [`formats`], who borrows one has given it back when the message is out.
    fn formatters(&self) -> BTreeSet<usize> {
        let is_table = |node: &Node| {
            let mut methods = node.references.iter().map(|(to, _)| self.nodes.get(to));
            !node.is_code
                && !node.references.is_empty()
                && methods.all(|to| to.is_some_and(|to| to.is_code && is_of_formatter(&to.name)))
        };
        let tables = self.nodes.iter().filter(|(_, node)| is_table(node));
        let mut tables: BTreeSet<usize> = tables.map(|(index, _)| *index).collect();
        for node in self.nodes.values().filter(|node| !node.is_code) {
            for (to, _) in &node.references {
                tables.remove(to);
            }
        }
        tables
    }

    /// Divides the code.
    pub(crate) fn divide(&self) -> Parts {
        let stays = self.assembly(false);
        let boot = self.reach(self.assembly(true));
        let formatters = self.formatters();
        let held = self.addresses_taken(&boot, &formatters);
        let without_held = self.reach(stays.clone());
        let resident = self.reach(stays.into_iter().chain(held.iter().copied()));
        let name = |index: &usize| self.nodes.get(index).map(|node| node.name.clone());
        let goes = |index: &&usize| {
            let node = self.nodes.get(index);
            !resident.contains(index)
                && (formatters.contains(index)
                    || node.is_some_and(|node| node.is_code || node.is_jump_table()))
        };
        Parts {
            boot: boot.iter().filter(goes).filter_map(name).collect(),
            held: held.difference(&without_held).filter_map(name).collect(),
        }
    }

    fn assembly(&self, of_boot: bool) -> Vec<usize> {
        let all = self.nodes.iter().filter(|(_, node)| node.is_assembly);
        all.filter(|(_, node)| node.is_boot_assembly() == of_boot)
            .map(|(index, _)| *index)
            .collect()
    }

    /// Functions whose address these take, other than their own. Boot's assembly is not held so: where what
    /// stays took its address, the check of the finished image would say so. Nor are formatting functions
    /// that instructions of boot name (see [`formats`]), or a table of `formatters`.
    fn addresses_taken(
        &self,
        by: &BTreeSet<usize>,
        formatters: &BTreeSet<usize>,
    ) -> BTreeSet<usize> {
        let mut taken = BTreeSet::new();
        for (from, node) in by
            .iter()
            .filter(|index| !formatters.contains(index))
            .filter_map(|index| self.nodes.get_key_value(index))
        {
            for (to, how) in &node.references {
                let is_held = self.nodes.get(to).is_some_and(|to| {
                    to.is_code && !to.is_boot_assembly() && !(node.is_code && formats(&to.name))
                });
                if is_held && *how == Reference::Address && from != to {
                    taken.insert(*to);
                }
            }
        }
        taken
    }

    /// Every section that control, or a read of a constant, gets to from these.
    fn reach(&self, from: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
        let mut reached = BTreeSet::new();
        let mut waiting: Vec<usize> = from.into_iter().collect();
        while let Some(index) = waiting.pop() {
            if let Some(node) = self.nodes.get(&index)
                && reached.insert(index)
            {
                waiting.extend(node.references.iter().map(|(to, _)| *to));
            }
        }
        reached
    }
}

/// Whether a function formats a value (a mangled name, or a section's that ends with it).
///
/// Boot's instructions put its address into the arguments of a message, which end with the statement: the
/// language has no way to keep them (`core::fmt::Arguments` borrows temporaries).
pub(crate) fn formats(name: &str) -> bool {
    let plain = plain(name);
    plain.contains(" as core::fmt::") && plain.contains(">::fmt")
}

/// Whether a function may stand in the table of methods of `dyn Debug`, `dyn Display` or `dyn Write`.
fn is_of_formatter(name: &str) -> bool {
    let plain = plain(name);
    let methods = [
        " as core::fmt::",
        "core::fmt::Write::",
        "core::ptr::drop_in_place<",
    ];
    methods.iter().any(|method| plain.contains(method))
}

fn plain(name: &str) -> String {
    let mangled = ["_ZN", "_R"]
        .iter()
        .filter_map(|start| name.find(start))
        .min();
    let mangled = mangled.and_then(|at| name.get(at..)).unwrap_or(name);
    addr2line::demangle_auto(mangled.into(), None).into_owned()
}

/// Whether a section is code (`true`) or data (`false`) of the image; `None` if it is neither.
fn loaded<'a>(section: &impl ObjectSection<'a>) -> Option<bool> {
    match section.kind() {
        SectionKind::Text => Some(true),
        SectionKind::Data
        | SectionKind::ReadOnlyData
        | SectionKind::ReadOnlyDataWithRel
        | SectionKind::ReadOnlyString
        | SectionKind::UninitializedData => Some(false),
        _ => None,
    }
}

fn references<'a>(
    file: &object::File<'a>,
    section: &impl ObjectSection<'a>,
) -> Result<BTreeSet<(usize, Reference)>> {
    let mut found = BTreeSet::new();
    let is_code = section.kind() == SectionKind::Text;
    for (_, relocation) in section.relocations() {
        let to = match relocation.target() {
            RelocationTarget::Symbol(index) => file.symbol_by_index(index)?.section_index(),
            RelocationTarget::Section(index) => Some(index),
            _ => None,
        };
        if let Some(SectionIndex(to)) = to {
            found.insert((to, kind(relocation.flags(), is_code)));
        }
    }
    Ok(found)
}

/// ELF for the Arm 64-bit Architecture, 5.7: the relocations of branches; and of words that hold a distance.
fn kind(flags: RelocationFlags, from_code: bool) -> Reference {
    let RelocationFlags::Elf { r_type } = flags else {
        return Reference::Address;
    };
    match r_type {
        elf::R_AARCH64_CALL26
        | elf::R_AARCH64_JUMP26
        | elf::R_AARCH64_CONDBR19
        | elf::R_AARCH64_TSTBR14 => Reference::Branch,
        elf::R_AARCH64_PREL32 | elf::R_AARCH64_PREL16 if !from_code => Reference::Branch,
        _ => Reference::Address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reference::{Address, Branch};

    const HELD: &str = ".text._ZN3lib4held17h0123456789abcdefE";
    const FORMAT: &str =
        ".text._ZN49_$LT$lib..Error$u20$as$u20$core..fmt..Display$GT$3fmt17h0123456789abcdefE";

    fn node(name: &str, references: &[(usize, Reference)]) -> Node {
        let symbols = name.contains("_ZN");
        Node {
            name: name.into(),
            is_empty: false,
            is_code: name.starts_with(".text") || name.starts_with(".boot"),
            is_assembly: !symbols && !name.starts_with(".rodata"),
            references: references.iter().copied().collect(),
        }
    }

    /// Boot's assembly calls 2, the vectors call 3; the rest is for each test.
    fn graph(more: &[(usize, Node)]) -> Parts {
        let mut nodes = BTreeMap::from([
            (0, node(".boot.head", &[(2, Branch), (1, Branch)])),
            (1, node(".text.vectors", &[(3, Branch)])),
            (3, node(".text._ZN4trap", &[(9, Branch)])),
            (9, node(".text._ZN6shared", &[])),
        ]);
        for (index, node) in more {
            let Node {
                name,
                is_empty,
                is_code,
                is_assembly,
                references,
            } = node;
            let node = Node {
                name: name.clone(),
                is_empty: *is_empty,
                is_code: *is_code,
                is_assembly: *is_assembly,
                references: references.clone(),
            };
            nodes.insert(*index, node);
        }
        Graph { nodes }.divide()
    }

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn what_only_boot_calls_goes_and_what_both_call_stays() {
        let parts = graph(&[
            (2, node(".text._ZN4boot", &[(4, Branch), (9, Branch)])),
            (4, node(".text._ZN4deep", &[])),
        ]);
        let goes = [".boot.head", ".text._ZN4boot", ".text._ZN4deep"];
        assert_eq!(parts.boot, names(&goes));
    }

    #[test]
    fn jump_table_goes_with_its_function() {
        let parts = graph(&[
            (2, node(".text._ZN4boot", &[(4, Address), (5, Address)])),
            (4, node(".rodata._ZN4boot", &[(2, Branch)])),
            (5, node(".rodata.words", &[])),
        ]);
        assert!(parts.boot.contains(".rodata._ZN4boot"));
        assert!(
            !parts.boot.contains(".rodata.words"),
            "constants may be kept by anybody"
        );
    }

    #[test]
    fn function_whose_address_boot_takes_stays_with_all_that_it_calls() {
        let parts = graph(&[
            (2, node(".text._ZN4boot", &[(4, Address)])),
            (4, node(HELD, &[(5, Branch)])),
            (5, node(".text._ZN6callee", &[])),
        ]);
        assert_eq!(parts.boot, names(&[".boot.head", ".text._ZN4boot"]));
        assert_eq!(parts.held, names(&[HELD]));
    }

    #[test]
    fn formatting_goes_if_instructions_of_boot_name_it() {
        let by_code = graph(&[
            (2, node(".text._ZN4boot", &[(4, Address)])),
            (4, node(FORMAT, &[])),
        ]);
        assert!(by_code.boot.contains(FORMAT));
    }

    #[test]
    fn formatters_table_goes_if_only_instructions_of_boot_name_it() {
        let table = || (5, node(".rodata.vtable", &[(4, Address)]));
        let boot = |to| (2, node(".text._ZN4boot", &[(to, Address)]));
        let by_code = graph(&[boot(5), (4, node(FORMAT, &[])), table()]);
        assert!(by_code.boot.contains(FORMAT) && by_code.boot.contains(".rodata.vtable"));
        let by_constant = (6, node(".rodata.kept", &[(5, Address)]));
        let kept = graph(&[boot(6), (4, node(FORMAT, &[])), table(), by_constant]);
        assert!(!kept.boot.contains(FORMAT) && !kept.boot.contains(".rodata.vtable"));
        assert_eq!(kept.held, names(&[FORMAT]));
    }

    #[test]
    fn table_with_another_method_than_a_formatters_stays() {
        let parts = graph(&[
            (2, node(".text._ZN4boot", &[(5, Address)])),
            (4, node(FORMAT, &[])),
            (5, node(".rodata.vtable", &[(4, Address), (6, Address)])),
            (6, node(HELD, &[])),
        ]);
        assert_eq!(parts.held, names(&[FORMAT, HELD]));
    }

    #[test]
    fn formatters_table_that_what_stays_names_stays() {
        let parts = graph(&[
            (2, node(".text._ZN4boot", &[(5, Address)])),
            (3, node(".text._ZN4trap", &[(5, Address)])),
            (4, node(FORMAT, &[])),
            (5, node(".rodata.vtable", &[(4, Address)])),
        ]);
        assert!(!parts.boot.contains(FORMAT) && !parts.boot.contains(".rodata.vtable"));
    }

    #[test]
    fn code_that_nothing_reaches_is_in_no_list() {
        let parts = graph(&[(4, node(".text._ZN4dead", &[(9, Address)]))]);
        assert_eq!(parts.boot, names(&[".boot.head"]));
        assert_eq!(parts.held, names(&[]));
    }
}
