#![doc = include_str!("../README.md")]
#![no_std]
#![deny(unsafe_code)]

#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod addr;
pub mod arm;
pub mod attr;
mod bbm;
mod bits;
mod dump;
pub mod entry;
mod erase;
pub mod error;
pub mod export;
mod fault;
pub mod format;
mod gather;
mod job;
pub mod level;
mod map;
pub mod platform;
mod protect;
mod replace;
mod request;
mod reserve;
mod resize;
mod short;
mod space;
mod sweep;
mod sync;
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod visit;
#[cfg(feature = "x86")]
pub mod vmx;
mod walk_cache;
mod zap;

pub use addr::{Gfn, Ipa, IpaRange, Pa, PaRange, Pfn};
pub use attr::{Age, Combine, Device, LeafAttrs, MemType, Perms, SwBits};
pub use dump::Dump;
pub use entry::{Annotation, Entry, Lookup};
pub use error::{ConfigError, EncodeError, MapError};
pub use export::{ExportError, ExportedRoot, Importer, InvalidateListener, RootMeta};
pub use fault::FaultOutcome;
pub use format::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, TableFormat,
    WideAddresses, WordKind,
};
#[cfg(feature = "x86")]
pub use format::{Ept, EptConfig, Offered};
pub use level::{Geometry, Level};
pub use platform::{
    CacheMaintenance, DetachedTable, EntryRef, Platform, RangeOps, TableMemory, TlbCaps,
    TlbInvalidate,
};
pub use protect::Aging;
pub use request::{Blocks, CmoMode, FaultRequest, MapOutcome, MapRequest, Met};
pub use space::Stage2;
pub use sweep::DetachedLeaf;
pub use sync::AtomicEntry;
pub use visit::{Run, RunKind, Runs};
