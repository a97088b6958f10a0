//! Reads the finished image and finds whatever would still get to what only boot needs.
//!
//! Three ways lead into code: a direct branch, the address of one of its functions, and a return address. The
//! first two are looked for here, in every instruction and every relocated word of the image; the last ones are on
//! the stack, which `leave_boot` (entry.S) empties. Numbers that only say where boot's part begins and ends are
//! allowed, as what stays has to give it away.

use super::decode::{Names, decode};
use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSection, ObjectSymbol};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Symbols of the linker script that bound boot's part.
const BOUNDS: [&str; 3] = ["__image_start", "__boot_text_end", "__boot_rodata_end"];
/// The only code of boot's whose address may be taken, and only by boot: where the placed image is entered.
const ENTRY: &str = "placed";
/// Instructions after an ADRP among which the ones that complete the address are.
const REACH: usize = 64;

/// The image, as far as the check needs it.
#[derive(Debug, Default)]
pub(crate) struct Image {
    /// Addresses of boot's part, and of its instructions.
    boot: Range<u64>,
    boot_text: Range<u64>,
    /// Instructions that stay and boot's, by address; literals left out.
    code: BTreeMap<u64, u32>,
    /// Words that hold an address: where, and which.
    words: Vec<(u64, u64)>,
    bounds: BTreeSet<u64>,
    entry: u64,
    /// Functions of the image, by their start: end and name.
    functions: BTreeMap<u64, (u64, String)>,
    /// Starts of functions that format a value: boot takes their addresses, as its messages' arguments.
    formats: BTreeSet<u64>,
}

impl Image {
    /// Reads EL2's ELF file.
    ///
    /// # Errors
    /// It is none, or has not the sections and symbols that el2.ld makes.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self> {
        let file = object::File::parse(bytes).context("not an object file")?;
        let symbols: BTreeMap<&str, u64> = file
            .symbols()
            .filter_map(|symbol| Some((symbol.name().ok()?, symbol.address())))
            .collect();
        let symbol = |name: &str| {
            let address = symbols.get(name);
            address
                .copied()
                .with_context(|| format!("the image has no symbol {name}"))
        };
        let mut image = Self {
            boot: symbol("__image_start")?..symbol("__boot_end")?,
            boot_text: symbol("__image_start")?..symbol("__boot_text_end")?,
            bounds: BOUNDS
                .iter()
                .map(|name| symbol(name))
                .collect::<Result<_>>()?,
            entry: symbol(ENTRY)?,
            functions: functions(&file),
            formats: formatting(&file),
            ..Self::default()
        };
        for name in [".boot.text", ".text"] {
            image.add_code(&file, name)?;
        }
        image.add_words(&file)?;
        Ok(image)
    }

    /// The instructions of a section, without the literals between them, which mapping symbols mark
    /// (ELF for the Arm 64-bit Architecture, 5.5.4).
    fn add_code(&mut self, file: &object::File<'_>, name: &str) -> Result<()> {
        let section = file.section_by_name(name);
        let section = section.with_context(|| format!("the image has no {name}"))?;
        let marks: BTreeMap<u64, bool> = file
            .symbols()
            .filter_map(|symbol| {
                let name = symbol.name().ok()?;
                let is_data = name == "$d" || name.starts_with("$d.");
                (is_data || name == "$x" || name.starts_with("$x."))
                    .then_some((symbol.address(), is_data))
            })
            .collect();
        for (word, pc) in section
            .data()?
            .chunks_exact(4)
            .zip((section.address()..).step_by(4))
        {
            let is_data = marks
                .range(..=pc)
                .next_back()
                .is_some_and(|(_, data)| *data);
            if let (false, Ok(word)) = (is_data, word.try_into()) {
                self.code.insert(pc, u32::from_le_bytes(word));
            }
        }
        Ok(())
    }

    /// The words that entry.S relocates: Elf64_Rela entries of type R_AARCH64_RELATIVE.
    fn add_words(&mut self, file: &object::File<'_>) -> Result<()> {
        let section = file
            .section_by_name(".rela.dyn")
            .context("the image has no .rela.dyn")?;
        for entry in section.data()?.chunks_exact(24) {
            let word = |at: usize| entry.get(at..at + 8).and_then(|b| b.try_into().ok());
            if let (Some(at), Some(to)) = (word(0), word(16)) {
                self.words
                    .push((u64::from_le_bytes(at), u64::from_le_bytes(to)));
            }
        }
        ensure!(!self.words.is_empty(), "the image has no relocated word");
        Ok(())
    }

    /// Everything that must not be there, in words; and how many references were looked at.
    pub(crate) fn violations(&self) -> (Vec<String>, usize) {
        let mut found = Vec::new();
        let mut seen = 0;
        for (&pc, &word) in &self.code {
            let Some(names) = decode(word, pc) else {
                continue;
            };
            seen += 1;
            let wrong = match names {
                Names::Branch(to) => !self.boot.contains(&pc) && self.boot.contains(&to),
                Names::Address(to) => self.is_forbidden(pc, to),
                Names::Page(page, register) => self.wrong_page(pc, page, register),
                Names::Add(..) => false,
            };
            if wrong {
                found.push(format!("{} at {pc:#x}: {names:x?}", self.name(pc)));
            }
        }
        for &(at, to) in &self.words {
            seen += 1;
            let is_pointer = self.boot.contains(&to) && !self.bounds.contains(&to);
            if is_pointer && !self.boot.contains(&at) {
                found.push(format!(
                    "the constant or variable at {at:#x} points to {}",
                    self.name(to)
                ));
            }
        }
        (found, seen)
    }

    /// Whether the instruction at `pc` must not name `address`: what stays no part of boot's, boot no function.
    fn is_forbidden(&self, pc: u64, address: u64) -> bool {
        if self.bounds.contains(&address) {
            return false;
        }
        if !self.boot.contains(&pc) {
            return self.boot.contains(&address);
        }
        // A jump table's distances are from a place in the function itself.
        self.boot_text.contains(&address)
            && address != self.entry
            && !self.formats.contains(&address)
            && self.function(pc).is_none_or(|own| !own.contains(&address))
    }

    /// An ADRP to a page of boot's: each address that is made of it is looked at, and there must be one.
    fn wrong_page(&self, pc: u64, page: u64, register: u32) -> bool {
        let scope = match self.boot.contains(&pc) {
            true => &self.boot_text,
            false => &self.boot,
        };
        if !scope.contains(&page) {
            return false;
        }
        let mut completed = false;
        for (&at, &word) in self.code.range(pc + 4..).take(REACH) {
            match decode(word, at) {
                Some(Names::Add(from, more)) if from == register => {
                    completed = true;
                    if self.is_forbidden(pc, page + more) {
                        return true;
                    }
                }
                Some(Names::Page(_, again)) if again == register => break,
                _ => {}
            }
        }
        !completed && !self.bounds.contains(&page)
    }

    fn function(&self, pc: u64) -> Option<Range<u64>> {
        let (start, (end, _)) = self.functions.range(..=pc).next_back()?;
        (pc < *end).then_some(*start..*end)
    }

    fn name(&self, address: u64) -> String {
        let function = self.functions.range(..=address).next_back();
        function.map_or_else(|| format!("{address:#x}"), |(_, (_, name))| name.clone())
    }
}

fn functions(file: &object::File<'_>) -> BTreeMap<u64, (u64, String)> {
    let all = file.symbols().filter(|symbol| symbol.size() > 0);
    all.filter_map(|symbol| {
        let name = addr2line::demangle_auto(symbol.name().ok()?.into(), None).into_owned();
        Some((symbol.address(), (symbol.address() + symbol.size(), name)))
    })
    .collect()
}

fn formatting(file: &object::File<'_>) -> BTreeSet<u64> {
    let all = file
        .symbols()
        .filter(|symbol| symbol.name().is_ok_and(super::graph::formats));
    all.map(|symbol| symbol.address()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Boot's part is two pages, one of them text; what stays follows. The words stand at 0x100 and 0x2000.
    fn image(boot: &[u32], stays: &[u32]) -> Image {
        let place = |start: u64, words: &[u32]| {
            (start..).step_by(4).zip(words.to_vec()).collect::<Vec<_>>()
        };
        Image {
            boot: 0..0x2000,
            boot_text: 0..0x1000,
            code: place(0x100, boot)
                .into_iter()
                .chain(place(0x2000, stays))
                .collect(),
            words: Vec::new(),
            bounds: [0, 0x1000].into(),
            entry: 0x40,
            functions: [
                (0x100, (0x200, "boot".into())),
                (0x2000, (0x3000, "stays".into())),
            ]
            .into(),
            formats: [0x380].into(),
        }
    }

    fn count(image: &Image) -> usize {
        image.violations().0.len()
    }

    #[test]
    fn branch_from_what_stays_into_boot_is_found() {
        assert_eq!(count(&image(&[], &[0x97ff_f840])), 1); // bl .-0x1f00
        assert_eq!(count(&image(&[], &[0x9400_0002])), 0); // bl .+8
    }

    #[test]
    fn branch_from_boot_to_what_stays_is_fine() {
        assert_eq!(count(&image(&[0x9400_07c0], &[])), 0); // bl .+0x1f00
    }

    #[test]
    fn address_of_boot_in_what_stays_is_found_but_not_its_bounds() {
        let adrp = 0xf0ff_ffe8; // adrp x8, .-0x1000: the second page, whose start is a bound
        assert_eq!(count(&image(&[], &[adrp, 0x9100_0108])), 0); // add x8, x8, #0
        assert_eq!(count(&image(&[], &[adrp, 0x9100_4108])), 1); // add x8, x8, #16
        assert_eq!(count(&image(&[], &[0x10ff_0080])), 1); // adr x0, .-0x1ff0
    }

    #[test]
    fn address_that_nothing_completes_is_found() {
        let mut one = image(&[], &[0xf0ff_ffe8, 0xd503_201f]);
        one.bounds.clear();
        assert_eq!(count(&one), 1);
    }

    #[test]
    fn boot_may_not_take_the_address_of_its_functions_but_of_its_entry() {
        let adrp = 0x9000_0000; // adrp x0, .
        assert_eq!(count(&image(&[adrp, 0x910c_0000], &[])), 1); // add x0, x0, #0x300
        assert_eq!(count(&image(&[adrp, 0x9101_0000], &[])), 0); // add x0, x0, #0x40
        assert_eq!(count(&image(&[adrp, 0x9104_8000], &[])), 0); // add x0, x0, #0x120: itself
        assert_eq!(count(&image(&[adrp, 0x910e_0000], &[])), 0); // add x0, x0, #0x380: formats
    }

    #[test]
    fn pointer_to_boot_in_data_that_stays_is_found() {
        let mut one = image(&[], &[]);
        one.words = vec![(0x3000, 0x104), (0x3008, 0x1000), (0x1008, 0x104)];
        assert_eq!(count(&one), 1);
    }
}
