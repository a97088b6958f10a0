//! Starting Linux by its 64-bit boot protocol (kernel documentation, `arch/x86/boot.rst`): the
//! segments of `vmlinux`, and the boot parameters that the kernel finds through RSI.

/// Where things stand in the guest's memory.
pub mod places {
    /// Descriptor table: code at 0x10, data at 0x18.
    pub const GDT: u64 = 0x500;
    /// The page table that the kernel starts with: the first GiB one to one.
    pub const PML4: u64 = 0x2000;
    /// Its second level.
    pub const PDPT: u64 = 0x3000;
    /// Its third level.
    pub const DIRECTORY: u64 = 0x4000;
    /// Boot parameters.
    pub const PARAMETERS: u64 = 0x7000;
    /// Command line.
    pub const COMMAND_LINE: u64 = 0x9000;
    /// End of the stack.
    pub const STACK: u64 = 0x8f00;
}

/// Bytes of the boot parameters.
pub const PARAMETERS_BYTES: usize = 4096;
/// Longest command line, without the zero at its end.
pub const COMMAND_LINE_MOST: usize = 2047;

/// This is no kernel that can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKernel {
    /// Not a 64-bit x86 ELF executable.
    #[error("not an x86-64 ELF file")]
    NotElf,
    /// A header or segment lies outside the file.
    #[error("the ELF file is cut short")]
    CutShort,
    /// Nothing to load.
    #[error("no loadable segment")]
    Empty,
}

/// A part of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Guest-physical address.
    pub at: u64,
    /// What the file has for it; the rest of its memory is zero.
    pub bytes: &'a [u8],
    /// Bytes of memory.
    pub memory: u64,
}

/// A kernel's ELF file.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    file: &'a [u8],
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    headers: usize,
    count: usize,
}

/// ELF-64: sizes and places of the fields that are read.
const HEADER_BYTES: usize = 56;
const LOAD: u64 = 1;
const X86_64: u64 = 62;

impl<'a> Kernel<'a> {
    /// Reads the file's header.
    ///
    /// # Errors
    /// [`BadKernel`].
    pub fn parse(file: &'a [u8]) -> Result<Self, BadKernel> {
        let is_elf = file.starts_with(b"\x7fELF\x02\x01");
        if !is_elf || number(file, 18, 2) != Some(X86_64) {
            return Err(BadKernel::NotElf);
        }
        let field = |at, bytes| number(file, at, bytes).ok_or(BadKernel::CutShort);
        let size = |value: u64| usize::try_from(value).map_err(|_| BadKernel::CutShort);
        let kernel = Self {
            file,
            entry: field(24, 8)?,
            headers: size(field(32, 8)?)?,
            count: size(field(56, 2)?)?,
        };
        let mut segments = kernel.segments();
        if segments.any(|segment| segment.is_err()) {
            Err(BadKernel::CutShort)
        } else if kernel.segments().count() == 0 {
            Err(BadKernel::Empty)
        } else {
            Ok(kernel)
        }
    }

    /// What is to be loaded.
    pub fn segments(&self) -> impl Iterator<Item = Result<Segment<'a>, BadKernel>> + use<'a> {
        let this = *self;
        (0..this.count).filter_map(move |n| this.segment(n).transpose())
    }

    fn segment(&self, n: usize) -> Result<Option<Segment<'a>>, BadKernel> {
        let short = BadKernel::CutShort;
        let at = n
            .checked_mul(HEADER_BYTES)
            .and_then(|o| o.checked_add(self.headers));
        let at = at.ok_or(short)?;
        let header = at
            .checked_add(HEADER_BYTES)
            .and_then(|end| self.file.get(at..end));
        let header = header.ok_or(short)?;
        let field = |offset, bytes| number(header, offset, bytes).ok_or(short);
        if field(0, 4)? != LOAD {
            return Ok(None);
        }
        let place = |value: u64| usize::try_from(value).map_err(|_| short);
        let (start, size) = (place(field(8, 8)?)?, place(field(32, 8)?)?);
        let end = start.checked_add(size).ok_or(short)?;
        Ok(Some(Segment {
            at: field(24, 8)?,
            bytes: self.file.get(start..end).ok_or(short)?,
            memory: field(40, 8)?,
        }))
    }
}

/// A little-endian number of 2, 4 or 8 bytes.
fn number(file: &[u8], at: usize, bytes: usize) -> Option<u64> {
    let mut word = [0; 8];
    let end = at.checked_add(bytes)?;
    word.get_mut(..bytes)?.copy_from_slice(file.get(at..end)?);
    Some(u64::from_le_bytes(word))
}

/// What the kernel is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Bytes of RAM from address 0.
    pub ram: u64,
    /// Address and bytes of the initial file system.
    pub ramdisk: (u32, u32),
}

/// The boot parameters ("zero page").
#[must_use]
pub fn parameters(boot: &Boot) -> [u8; PARAMETERS_BYTES] {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    const LOW_END: u64 = 0x9_f000;
    const MIB: u64 = 1 << 20;
    let mut page = [0; PARAMETERS_BYTES];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // protocol 2.15
    put(0x210, &[0xff, 1]); // unknown loader; kernel loaded high
    put(0x218, &boot.ramdisk.0.to_le_bytes());
    put(0x21c, &boot.ramdisk.1.to_le_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "below 64 KiB")]
    put(0x228, &(places::COMMAND_LINE as u32).to_le_bytes());
    put(0x230, &(2u32 << 20).to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    let map = [
        (0, LOW_END, RAM),
        (LOW_END, MIB - LOW_END, RESERVED),
        (MIB, boot.ram.saturating_sub(MIB), RAM),
    ];
    put(0x1e8, &[3]);
    for (n, (start, size, kind)) in map.into_iter().enumerate() {
        let at = 0x2d0 + 20 * n;
        put(at, &start.to_le_bytes());
        put(at + 8, &size.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn elf(segments: &[(u32, u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64, 0);
        file[18] = 62;
        file[24..32].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        file[32] = 64;
        file[56] = u8::try_from(segments.len()).unwrap();
        let mut at = 64 + 56 * segments.len() as u64;
        for (kind, address, bytes, memory) in segments {
            file.extend(kind.to_le_bytes());
            file.extend([0; 4]);
            for word in [at, 0, *address, bytes.len() as u64, *memory, 0] {
                file.extend(word.to_le_bytes());
            }
            at += bytes.len() as u64;
        }
        segments.iter().for_each(|s| file.extend(s.2));
        file
    }

    #[test]
    fn loadable_segments_are_found_and_others_skipped() {
        let file = elf(&[
            (1, 0x100_0000, b"text", 4),
            (4, 0, b"note", 4),
            (1, 0x200_0000, b"data", 100),
        ]);
        let kernel = Kernel::parse(&file).unwrap();
        assert_eq!(kernel.entry, 0x100_0000);
        let segments: Vec<_> = kernel.segments().map(Result::unwrap).collect();
        assert_eq!(segments.len(), 2);
        assert_eq!(
            (segments[1].at, segments[1].bytes, segments[1].memory),
            (0x200_0000, &b"data"[..], 100)
        );
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert_eq!(Kernel::parse(b"MZ").unwrap_err(), BadKernel::NotElf);
        assert_eq!(Kernel::parse(&elf(&[])).unwrap_err(), BadKernel::Empty);
        let mut short = elf(&[(1, 0, b"text", 4)]);
        short.pop();
        assert_eq!(Kernel::parse(&short).unwrap_err(), BadKernel::CutShort);
    }

    #[test]
    fn parameters_stand_where_the_protocol_wants_them() {
        let page = parameters(&Boot {
            ram: 64 << 20,
            ramdisk: (0x123_0000, 77),
        });
        assert_eq!(page[0x1fe..0x206], *b"\x55\xaa\0\0HdrS");
        assert_eq!(page[0x218..0x220], [0, 0, 0x23, 1, 77, 0, 0, 0]);
        assert_eq!(page[0x1e8], 3);
        assert_eq!(
            page[0x2d0 + 40..0x2d0 + 60],
            [
                0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0xf0, 3, 0, 0, 0, 0, 1, 0, 0, 0
            ]
        );
    }

    proptest! {
        #[test]
        fn no_file_panics(mut bytes in prop::collection::vec(any::<u8>(), 64..300), count in 0u8..4) {
            bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            bytes[18] = 62;
            bytes[19] = 0;
            bytes[56] = count;
            bytes[57] = 0;
            if let Ok(kernel) = Kernel::parse(&bytes) {
                prop_assert!(kernel.segments().count() > 0);
            }
        }
    }
}
