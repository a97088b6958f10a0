//! Host-side tools and tests of Ravelin: what `make` calls whenever something must be parsed or decided.
//!
//! * Files: [`image`] (ELF to flat image), [`kernel_image`] (Debian's kernel to a raw Image), [`initramfs`],
//!   [`fit`], [`device_tree`], [`sdcard`].
//! * Emulator: [`machine`] describes one, [`process`] runs it under a time limit and keeps its console,
//!   [`scenario`] says what must come out, [`runner`] runs many and reports.
//! * [`suite`] lists the scenarios, [`bench_boot`] measures the boot, [`symbolise`] reads backtraces.

pub mod files;
pub mod image;
pub mod initramfs;
pub mod kernel_image;
pub mod symbolise;
