//! A table in words, for the console.

use core::fmt;

use crate::addr::IpaRange;
use crate::attr::{Age, Combine, Device, LeafAttrs, MemType, Perms};
use crate::error::MapError;
use crate::format::TableFormat;
use crate::platform::Platform;
use crate::space::Stage2;
use crate::visit::{Run, RunKind};

/// Prints the runs of a range, one a line; see [`Stage2::dump`].
#[derive(Debug)]
pub struct Dump<'a, F: TableFormat, P: Platform> {
    space: &'a Stage2<F, P>,
    range: IpaRange,
}

impl<F: TableFormat, P: Platform> Stage2<F, P> {
    /// Something to print: each run of equal mappings of the range on a line of its own, as
    /// `first input - last input -> first output  size  permissions  type  level`.
    #[must_use]
    pub const fn dump(&self, range: IpaRange) -> Dump<'_, F, P> {
        Dump { space: self, range }
    }
}

impl<F: TableFormat, P: Platform> fmt::Display for Dump<'_, F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.space.runs(self.range) {
            Ok(mut runs) => runs.try_for_each(|run| writeln!(f, "{run}")),
            Err(MapError::OutOfInput(range)) => writeln!(f, "{range:?} is outside the table"),
            Err(error) => writeln!(f, "{error}"),
        }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.range.start().get(), self.range.end().get() - 1);
        write!(f, "{first:012x}-{last:012x} ")?;
        match self.kind {
            RunKind::Mapped { pa, attrs } => {
                write!(f, "-> {pa:012x} {:>10} {attrs} ", Size(self.range.len()))?;
            }
            RunKind::Annotated(note) => {
                write!(f, "note {:#x} {:>10} ", note.get(), Size(self.range.len()))?;
            }
        }
        write!(f, "L{}", self.level.number())
    }
}

impl fmt::Display for LeafAttrs {
    /// Permissions as `rwxu` (`x` kernel, `u` user), the memory type, `!` where stage 2 forces
    /// it, then age and software bits where they are unusual.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [
            (Perms::READ, 'r'),
            (Perms::WRITE, 'w'),
            (Perms::EXEC_KERNEL, 'x'),
            (Perms::EXEC_USER, 'u'),
        ];
        for (perm, letter) in letters {
            write!(
                f,
                "{}",
                if self.perms.contains(perm) {
                    letter
                } else {
                    '-'
                }
            )?;
        }
        let forced = if self.combine == Combine::ForceStage2 {
            "!"
        } else {
            ""
        };
        write!(f, " {}{forced}", type_name(self.mem))?;
        if self.age == Age::Old {
            write!(f, " old")?;
        }
        match self.sw.get() {
            0 => Ok(()),
            bits => write!(f, " sw={bits:x}"),
        }
    }
}

const fn type_name(mem: MemType) -> &'static str {
    match mem {
        MemType::WriteBack => "WB",
        MemType::WriteThrough => "WT",
        MemType::WriteProtected => "WP",
        MemType::NonCacheable => "NC",
        MemType::Uncached => "UC",
        MemType::Device(Device::NGnRnE) => "Dev-nGnRnE",
        MemType::Device(Device::NGnRE) => "Dev-nGnRE",
        MemType::Device(Device::NGRE) => "Dev-nGRE",
        MemType::Device(Device::GRE) => "Dev-GRE",
    }
}

/// Bytes in the largest unit that leaves no rest.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let fitting = units
            .iter()
            .find(|(shift, _)| self.0.trailing_zeros() >= *shift);
        match fitting {
            Some((shift, unit)) => {
                f.pad_integral(true, "", Text::new(self.0 >> shift, unit).as_str())
            }
            None => f.pad_integral(true, "", Text::new(self.0, "B").as_str()),
        }
    }
}

/// A number and its unit, built without a heap so that it can be padded.
struct Text {
    bytes: [u8; 28],
    len: usize,
}

impl Text {
    fn new(number: u64, unit: &str) -> Self {
        let mut text = Self {
            bytes: [0; 28],
            len: 0,
        };
        // 20 digits, a space and three letters always fit.
        let _ = fmt::Write::write_fmt(&mut text, format_args!("{number} {unit}"));
        text
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len + text.len();
        let free = self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?;
        free.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}
