//! Arm stage-2 and EPT page tables whose maintenance order is tested.
#![no_std]
#![deny(unsafe_code)]

#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod addr;
pub mod attr;
mod bbm;
pub mod entry;
mod erase;
pub mod error;
mod export;
mod fault;
pub mod format;
mod job;
pub mod level;
mod map;
pub mod platform;
mod reserve;
mod space;
mod sync;
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod zap;

pub use addr::{Gfn, Ipa, IpaRange, Pa, PaRange, Pfn};
pub use attr::{Age, Combine, Device, LeafAttrs, MemType, Perms, SwBits};
pub use entry::{Annotation, Entry, Lookup};
pub use erase::DetachedLeaf;
pub use error::{ConfigError, EncodeError, MapError};
pub use fault::{FaultOutcome, FaultRequest};
pub use format::{
    ArmConfig, ArmFeatures, ArmStage2, Execute, ForceWriteBack, Granule, TableFormat,
    WideAddresses, WordKind,
};
pub use level::{Geometry, Level};
pub use map::{Blocks, CmoMode, MapOutcome, MapRequest};
pub use platform::{
    CacheMaintenance, DetachedTable, EntryRef, Platform, RangeOps, TableMemory, TlbCaps,
    TlbInvalidate,
};
pub use space::Stage2;
pub use sync::AtomicEntry;
