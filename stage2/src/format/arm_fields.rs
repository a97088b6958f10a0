//! Attribute fields of Arm stage-2 leaves (Arm ARM D8.4 to D8.6), tabled at compile time.
//!
//! Faults encode and decode attributes once each, so both are one look-up in a table that the
//! functions below fill. What cannot be said has no place in the tables; [`refusal`] says why.

use super::{Execute, ForceWriteBack};
use crate::attr::{Age, Combine, Device, LeafAttrs, Maintenance, MemType, Perms, SwBits};
use crate::bits::join;
use crate::error::EncodeError;

pub(super) const VALID: u64 = 1;
const MEM_ATTR_SHIFT: u32 = 2;
const S2AP_SHIFT: u32 = 6;
pub(super) const S2AP_WRITE: u64 = 1 << 7;
pub(super) const INNER_SHAREABLE: u64 = 0b11 << 8;
pub(super) const ACCESS_FLAG: u64 = 1 << 10;
/// XN\[0\] and XN\[1\] (Arm ARM D8.4, stage 2 execute-never).
const XN_SHIFT: u32 = 53;
const XN_LOW: u64 = 1 << 53;
const XN_HIGH: u64 = 1 << 54;
const SW_SHIFT: u32 = 55;

/// Marks in the tables, in bits that belong to the address. In a permission: something may be
/// fetched. In a memory type: nothing may. Both together carry into `REFUSED` when added.
const EXECUTION: u64 = 1 << 13;
/// Cannot be said.
const REFUSED: u64 = 1 << 14;
/// Either or both cannot.
const ANY_REFUSED: u64 = join([REFUSED, REFUSED << 1]);
/// In a memory type: the data cache is owed.
const OWES_DATA: u64 = 1 << 16;
/// Marks that what can be said may bear.
pub(super) const MARKS: u64 = join([EXECUTION, OWES_DATA]);

/// Stage-2 MemAttr (Arm ARM D8.6): what it says without and with forced write-back.
mod mem_attr {
    pub(super) const DEVICE_NGNRNE: u8 = 0b0000;
    pub(super) const DEVICE_NGNRE: u8 = 0b0001;
    pub(super) const DEVICE_NGRE: u8 = 0b0010;
    pub(super) const DEVICE_GRE: u8 = 0b0011;
    pub(super) const NORMAL_NC: u8 = 0b0101;
    pub(super) const NORMAL_WT: u8 = 0b1010;
    pub(super) const NORMAL_WB: u8 = 0b1111;
    pub(super) const FWB_FORCE_WB: u8 = 0b0110;
    pub(super) const FWB_AS_STAGE_1: u8 = 0b0111;
}

/// One CPU's meaning of the fields.
#[derive(PartialEq, Eq)]
pub(super) struct Fields {
    fwb: ForceWriteBack,
    execute: Execute,
    /// Descriptor bits by [`memory_index`], or `REFUSED`; `EXECUTION` where none is allowed.
    memory: [u64; MEMORY_KINDS],
    /// Descriptor bits by permissions, or `REFUSED`; `EXECUTION` where there is any.
    perms: [u64; 16],
    /// By MemAttr.
    types: [(MemType, Combine); 16],
    /// By XN\[1:0\].
    fetches: [Perms; 4],
    /// MemAttr values that are memory and not a device, one bit each.
    ram: u16,
    /// Those of them that a guest can reach around the cache.
    uncached: u16,
}

const TYPES: [MemType; 9] = [
    MemType::Device(Device::NGnRnE),
    MemType::Device(Device::NGnRE),
    MemType::Device(Device::NGRE),
    MemType::Device(Device::GRE),
    MemType::WriteBack,
    MemType::WriteThrough,
    MemType::WriteProtected,
    MemType::NonCacheable,
    MemType::Uncached,
];
const COMBINES: [Combine; 2] = [Combine::HonourGuest, Combine::ForceStage2];
const MEMORY_KINDS: usize = TYPES.len() * COMBINES.len();

/// Place in [`TYPES`] and [`COMBINES`].
#[inline]
const fn memory_index(mem: MemType, combine: Combine) -> usize {
    mem.number() * COMBINES.len() + combine as usize
}

static PLAIN_JOINT: Fields = Fields::new(ForceWriteBack::Off, Execute::Joint);
static PLAIN_SPLIT: Fields = Fields::new(ForceWriteBack::Off, Execute::Split);
static FORCED_JOINT: Fields = Fields::new(ForceWriteBack::On, Execute::Joint);
static FORCED_SPLIT: Fields = Fields::new(ForceWriteBack::On, Execute::Split);

impl Fields {
    /// The tables for a CPU.
    pub(super) const fn of(fwb: ForceWriteBack, execute: Execute) -> &'static Self {
        match (fwb, execute) {
            (ForceWriteBack::Off, Execute::Joint) => &PLAIN_JOINT,
            (ForceWriteBack::Off, Execute::Split) => &PLAIN_SPLIT,
            (ForceWriteBack::On, Execute::Joint) => &FORCED_JOINT,
            (ForceWriteBack::On, Execute::Split) => &FORCED_SPLIT,
        }
    }

    const fn new(fwb: ForceWriteBack, execute: Execute) -> Self {
        let mut fields = Self {
            fwb,
            execute,
            memory: [REFUSED; MEMORY_KINDS],
            perms: [REFUSED; 16],
            types: [(MemType::Device(Device::NGnRnE), Combine::HonourGuest); 16],
            fetches: [Perms::empty(); 4],
            ram: 0,
            uncached: 0,
        };
        fields.fill_memory();
        fields.fill_perms();
        fields
    }

    /// Reserved MemAttr values keep the strictest type (Arm ARM: they behave as some device
    /// type).
    const fn fill_memory(&mut self) {
        let mut n = 0;
        while n < MEMORY_KINDS {
            let (mem, combine) = (TYPES[n / COMBINES.len()], COMBINES[n % COMBINES.len()]);
            if let Ok(field) = mem_attr(self.fwb, mem, combine) {
                let owed = LeafAttrs::new(Perms::RW, mem, combine).maintenance();
                let device = matches!(mem, MemType::Device(_));
                let never_fetched = device || matches!(mem, MemType::NonCacheable);
                self.types[field as usize] = (mem, combine);
                self.ram |= (!device as u16) << field;
                self.uncached |= (owed.data as u16) << field;
                self.memory[n] = join([
                    (field as u64) << MEM_ATTR_SHIFT,
                    if device { 0 } else { INNER_SHAREABLE },
                    if never_fetched { EXECUTION } else { 0 },
                    if owed.data { OWES_DATA } else { 0 },
                ]);
            }
            n += 1;
        }
    }

    const fn fill_perms(&mut self) {
        let mut n = 0;
        while n < 16 {
            let perms = Perms::from_bits_retain(n);
            if let Ok(xn) = execute_never(self.execute, perms) {
                let fetched = if perms.may_execute() { EXECUTION } else { 0 };
                let access = perms.intersection(Perms::RW).bits() as u64;
                self.perms[n as usize] = join([VALID, access << S2AP_SHIFT, xn, fetched]);
                self.fetches[(xn >> XN_SHIFT) as usize] = perms.intersection(Perms::EXEC);
            }
            n += 1;
        }
        if matches!(self.execute, Execute::Joint) {
            // XN[0] is ignored.
            self.fetches[1] = self.fetches[0];
            self.fetches[3] = self.fetches[2];
        }
    }

    /// The descriptor bits of a leaf, with some of [`MARKS`], and what it owes; nothing when it
    /// cannot be said.
    #[inline]
    pub(super) fn encode(&self, attrs: &LeafAttrs) -> Option<(u64, Maintenance)> {
        let memory = self.memory[memory_index(attrs.mem, attrs.combine)];
        let perms = self.perms[usize::from(attrs.perms.bits() & 0xf)];
        let said = memory + perms; // they share no bits but the marks
        if said & ANY_REFUSED != 0 {
            return None;
        }
        let age = match attrs.age {
            Age::Young => ACCESS_FLAG,
            Age::Old => 0,
        };
        let owed = Maintenance {
            data: memory & OWES_DATA != 0,
            fetch: perms & EXECUTION != 0, // what is no memory was refused
        };
        let software = u64::from(attrs.sw.get()) << SW_SHIFT;
        Some((join([said, age, software]), owed))
    }

    #[inline]
    pub(super) fn decode(&self, raw: u64) -> LeafAttrs {
        let (mem, combine) = self.types[(raw >> MEM_ATTR_SHIFT & 0xf) as usize];
        let access = Perms::from_bits_truncate((raw >> S2AP_SHIFT & 0b11) as u8);
        LeafAttrs {
            perms: access.union(self.fetches[(raw >> XN_SHIFT & 0b11) as usize]),
            mem,
            combine,
            sw: SwBits::from_field(raw >> SW_SHIFT),
            age: if raw & ACCESS_FLAG != 0 {
                Age::Young
            } else {
                Age::Old
            },
        }
    }

    #[inline]
    pub(super) fn maintenance(&self, raw: u64) -> Maintenance {
        let mem = raw >> MEM_ATTR_SHIFT & 0xf;
        let fetches = self.fetches[(raw >> XN_SHIFT & 0b11) as usize];
        Maintenance {
            data: self.uncached >> mem & 1 != 0,
            fetch: self.ram >> mem & 1 != 0 && !fetches.is_empty(),
        }
    }

    /// Why [`encode`](Self::encode) found nothing.
    #[cold]
    pub(super) fn refusal(&self, attrs: &LeafAttrs) -> EncodeError {
        if attrs.perms.may_execute() {
            match attrs.mem {
                MemType::Device(device) => return EncodeError::ExecutableDevice(device),
                MemType::NonCacheable => return EncodeError::ExecutableNonCacheable,
                _ => {}
            }
        }
        match mem_attr(self.fwb, attrs.mem, attrs.combine) {
            Err(error) => error,
            Ok(_) => EncodeError::UnsupportedPerms(attrs.perms),
        }
    }
}

impl core::fmt::Debug for Fields {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?}, {:?}", self.fwb, self.execute)
    }
}

const fn mem_attr(fwb: ForceWriteBack, mem: MemType, combine: Combine) -> Result<u8, EncodeError> {
    use Combine::{ForceStage2, HonourGuest};
    let fwb = matches!(fwb, ForceWriteBack::On);
    Ok(match (mem, combine) {
        (MemType::WriteBack, HonourGuest) if fwb => mem_attr::FWB_AS_STAGE_1,
        (MemType::WriteBack, HonourGuest) => mem_attr::NORMAL_WB,
        (MemType::WriteBack, ForceStage2) if fwb => mem_attr::FWB_FORCE_WB,
        (MemType::WriteThrough, HonourGuest) if !fwb => mem_attr::NORMAL_WT,
        (MemType::NonCacheable, HonourGuest) => mem_attr::NORMAL_NC,
        (MemType::Device(device), HonourGuest) => match device {
            Device::NGnRnE => mem_attr::DEVICE_NGNRNE,
            Device::NGnRE => mem_attr::DEVICE_NGNRE,
            Device::NGRE => mem_attr::DEVICE_NGRE,
            Device::GRE => mem_attr::DEVICE_GRE,
        },
        (MemType::WriteProtected | MemType::Uncached, _) => {
            return Err(EncodeError::UnsupportedType(mem));
        }
        (MemType::WriteThrough, _) if fwb => return Err(EncodeError::UnsupportedType(mem)),
        _ => return Err(EncodeError::CannotCombine(mem, combine)),
    })
}

/// XN\[1:0\]: 00 all, 01 EL0 only, 10 nobody, 11 EL1 only; without FEAT_XNX only bit 54 counts,
/// so a split request is refused instead of widened.
const fn execute_never(execute: Execute, perms: Perms) -> Result<u64, EncodeError> {
    let joint = matches!(execute, Execute::Joint);
    let kernel = perms.contains(Perms::EXEC_KERNEL);
    let user = perms.contains(Perms::EXEC_USER);
    match (kernel, user) {
        (true, true) => Ok(0),
        (false, false) => Ok(XN_HIGH),
        _ if joint => Err(EncodeError::UnsupportedPerms(perms)),
        (false, true) => Ok(XN_LOW),
        (true, false) => Ok(join([XN_HIGH, XN_LOW])),
    }
}
