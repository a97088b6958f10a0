//! Whether what our host subtracts from a donation as "wiping" costs no more than EL2's wiping: else the row would show
//! less than the truth.
//!
//! Both fill memory with zeros by a loop over the blocks of DC ZVA, and clean it by one over the cache's lines. The
//! routines are compared in the two ELF files: the host's is not longer, and does as much at once.

use crate::files;
use anyhow::{Context as _, Result, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol};

/// In both: the routine, the instruction that it repeats, but for its register (Arm ARM C6.2.94: SYS #3, C7, ...), and
/// what that does.
const ROUTINES: [(&str, u32, &str); 2] = [
    ("4arch3mem11zero_blocks", 0xd50b_7420, "fills blocks"), // DC ZVA: C4, #1
    (
        "4arch3mem23clean_invalidate_to_poc",
        DC_CIVAC,
        "cleans lines",
    ),
];
/// C14, #1.
const DC_CIVAC: u32 = 0xd50b_7e20;

/// Compares the images that were built.
///
/// # Errors
/// A routine is missing, or the host's takes more than EL2's.
pub(super) fn check() -> Result<()> {
    let el2 = files::read(&files::build("ravelin.elf"), "run `make build`")?;
    let host = files::read(&files::build("host-shim.elf"), "run `make build`")?;
    for (name, instruction, does) in ROUTINES {
        let (host, el2) = (routine(&host, name)?, routine(&el2, name)?);
        no_longer(&host, &el2, instruction).with_context(|| format!("what {does}"))?;
    }
    Ok(())
}

fn no_longer(host: &[u32], el2: &[u32], instruction: u32) -> Result<()> {
    let count = |routine: &[u32]| {
        let does = |word: &&u32| **word & !0x1f == instruction;
        routine.iter().filter(does).count()
    };
    ensure!(
        count(host) == count(el2) && count(el2) != 0,
        "our host does {} at once, EL2 {}",
        count(host),
        count(el2)
    );
    ensure!(
        host.len() <= el2.len(),
        "our host does it by {} instructions, EL2 by {}",
        host.len(),
        el2.len()
    );
    Ok(())
}

/// The instructions of the one function whose symbol contains `name`.
fn routine(elf: &[u8], name: &str) -> Result<Vec<u32>> {
    let file: ElfFile64<'_, object::Endianness> = ElfFile64::parse(elf)?;
    let fits = |found: &str| found.contains(name);
    let mut symbols = file
        .symbols()
        .filter(|symbol| symbol.size() > 0 && symbol.name().is_ok_and(fits));
    let symbol = symbols.next().with_context(|| format!("no {name}"))?;
    ensure!(symbols.next().is_none(), "more than one {name}");
    let index = symbol.section_index().context("a symbol without section")?;
    let section = file.section_by_index(index)?;
    let code = section.data_range(symbol.address(), symbol.size())?;
    let code = code.with_context(|| format!("{name} is not in its section"))?;
    let words = code.chunks_exact(4);
    Ok(words
        .map(|word| {
            word.iter()
                .rfold(0, |all, byte| all << 8 | u32::from(*byte))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: u32 = 0x8b08_0129;

    #[test]
    fn a_loop_that_cleans_less_or_takes_more_is_found() {
        let el2 = [DC_CIVAC | 9, ADD, DC_CIVAC | 12, ADD];
        assert!(no_longer(&el2, &el2, DC_CIVAC).is_ok());
        assert!(no_longer(&el2[..3], &el2, DC_CIVAC).is_ok());
        assert!(no_longer(&[DC_CIVAC, ADD, DC_CIVAC, ADD, ADD], &el2, DC_CIVAC).is_err());
        assert!(no_longer(&el2[..2], &el2, DC_CIVAC).is_err());
        assert!(no_longer(&[ADD], &[ADD], DC_CIVAC).is_err());
    }
}
