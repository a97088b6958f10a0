//! Where things are in the source tree, and reading and writing files with errors that name them.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Root of the source tree: the parent of this crate's folder.
#[must_use]
pub fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}

/// `build/NAME` in the source tree: everything that is made and not committed.
#[must_use]
pub fn build(name: &str) -> PathBuf {
    root().join("build").join(name)
}

/// Reads a whole file.
///
/// # Errors
/// The file cannot be read; the message names it and `hint` says what to do about it.
pub fn read(path: &Path, hint: &str) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}: {hint}", path.display()))
}

/// Writes a whole file, making its folder if need be. Whoever opens it meanwhile gets the old file or the new one.
///
/// # Errors
/// The folder or the file cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    std::fs::write(&new, bytes)
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Makes a file of so many zeros, which take no room until they are written; a file that is there becomes that.
///
/// # Errors
/// The folder or the file cannot be written.
pub fn write_zeros(path: &Path, length: u64) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    std::fs::File::create(path)
        .and_then(|file| file.set_len(length))
        .with_context(|| format!("cannot write {}", path.display()))
}
