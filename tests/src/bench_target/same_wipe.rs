//! Whether what our host subtracts from a donation as "wiping" costs no more than EL2's wiping: else the row would show
//! less than the truth.
//!
//! Both fill memory with `memset`, and clean it by a loop over the cache's lines. The routines are compared in the two
//! ELF files: the same `memset`, and a loop that is not longer and cleans as many lines.

use crate::files;
use anyhow::{Context as _, Result, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol};

const MEMSET: &str = "memset";
/// In both, `arch::mem::clean_invalidate_to_poc`.
const CLEAN: &str = "4arch3mem23clean_invalidate_to_poc";
/// DC CIVAC but for its register (Arm ARM C6.2.94: SYS #3, C7, C14, #1).
const DC_CIVAC: u32 = 0xd50b_7e20;

/// Compares the images that were built.
///
/// # Errors
/// A routine is missing, or the host's takes more than EL2's.
pub(super) fn check() -> Result<()> {
    let el2 = files::read(&files::build("ravelin.elf"), "run `make build`")?;
    let host = files::read(&files::build("host-shim.elf"), "run `make build`")?;
    ensure!(
        routine(&el2, MEMSET)? == routine(&host, MEMSET)?,
        "our host's memset is not EL2's: what it subtracts from a donation is not what EL2 does"
    );
    no_longer(&routine(&host, CLEAN)?, &routine(&el2, CLEAN)?)
}

fn no_longer(host: &[u32], el2: &[u32]) -> Result<()> {
    ensure!(
        lines(host) == lines(el2) && lines(el2) != 0,
        "our host cleans {} lines at once, EL2 {}",
        lines(host),
        lines(el2)
    );
    ensure!(
        host.len() <= el2.len(),
        "our host cleans lines by {} instructions, EL2 by {}",
        host.len(),
        el2.len()
    );
    Ok(())
}

/// How many lines a routine's text cleans.
fn lines(routine: &[u32]) -> usize {
    let cleans = |word: &&u32| **word & !0x1f == DC_CIVAC;
    routine.iter().filter(cleans).count()
}

/// The instructions of the one function whose symbol contains `name`, or is it.
fn routine(elf: &[u8], name: &str) -> Result<Vec<u32>> {
    let file: ElfFile64<'_, object::Endianness> = ElfFile64::parse(elf)?;
    let fits = |found: &str| found == name || (name != MEMSET && found.contains(name));
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
        assert!(no_longer(&el2, &el2).is_ok());
        assert!(no_longer(&el2[..3], &el2).is_ok());
        assert!(no_longer(&[DC_CIVAC, ADD, DC_CIVAC, ADD, ADD], &el2).is_err());
        assert!(no_longer(&el2[..2], &el2).is_err());
        assert!(no_longer(&[ADD], &[ADD]).is_err());
    }
}
