//! Host-side tools and tests of Ravelin: what `make` calls whenever something must be parsed or decided.
//!
//! * Files: [`image`] (ELF to flat image), [`kernel_image`] (Debian's kernel to a raw Image), [`initramfs`],
//!   [`fit`], [`device_tree`], [`launcher`], [`sdcard`].
//! * Emulator: [`machine`] describes one, [`process`] runs it under a time limit and keeps its console,
//!   [`verdict`] says what must come out, [`runner`] runs many and reports; [`output`] is where to.
//! * [`suite`] lists the scenarios, [`bench_boot`] measures the boot, [`symbolise`] reads backtraces,
//!   [`tcb`] counts what runs at EL2, [`smmu_trace`] reads what QEMU's SMMU did.
//! * [`x86`]: the x86 machine's disk image and its emulator.

pub mod bench_boot;
pub mod bench_disk;
pub mod bench_target;
pub mod boot_only;
pub mod device_tree;
pub mod emulate;
pub mod files;
pub mod fit;
pub mod image;
pub mod initramfs;
pub mod interactive;
pub mod kernel_image;
pub mod launcher;
pub mod machine;
pub mod map_svg;
pub mod output;
pub mod payload;
pub mod process;
pub mod runner;
pub mod sdcard;
pub mod smmu_trace;
pub mod suite;
pub mod symbolise;
pub mod tcb;
pub mod two_machines;
pub mod verdict;
pub mod x86;
