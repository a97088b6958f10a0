//! Emulated accesses: what a data abort's syndrome says about the instruction, and how a read is
//! completed.
//!
//! Only single loads and stores of a general register have a valid syndrome. What has none (pairs,
//! write-back, vectors, exclusives, DC ZVA) can't be emulated without reading the guest's code,
//! which EL2 does not do: the guest gets an external abort, as from a device that does not take
//! such an access.
//!
//! Source: Arm ARM (DDI 0487) D24.2.40 "ISS encoding for an exception from a Data Abort".

const ISV: u64 = 1 << 24;
const SIGN_EXTEND: u64 = 1 << 21;
const SIXTY_FOUR: u64 = 1 << 15;
const CACHE_MAINTENANCE: u64 = 1 << 8;
const ON_WALK: u64 = 1 << 7;
const WRITE: u64 = 1 << 6;

/// How a loaded value reaches its register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Extension {
    /// Zeros above.
    Zero,
    /// Copies of the sign up to bit 31, then zeros: a load into a W register.
    SignTo32,
    /// Copies of the sign up to bit 63.
    SignTo64,
}

/// A load or store to emulate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MmioAccess {
    /// A load.
    Read {
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// General register, 31 for none.
        rt: u8,
        /// How it is extended.
        extension: Extension,
    },
    /// A store.
    Write {
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// General register, 31 for zero.
        rt: u8,
    },
}

/// What to do with a data abort at an address where the guest has no memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Decoded {
    /// Emulate it, then step over the instruction.
    Access(MmioAccess),
    /// Cache maintenance by address: step over it. Nothing of a device is ever cached, and guests
    /// clean whole ranges without knowing their holes.
    SkipMaintenance,
    /// Inject an external abort; the guest's own walk met it if the abort says so.
    ExternalAbort,
}

/// Decodes ESR_EL2 of a data abort (class 0x24).
#[must_use]
#[inline]
pub const fn decode(esr: u64) -> Decoded {
    // A table in a device's registers: no hardware would walk it either.
    if esr & ON_WALK != 0 {
        return Decoded::ExternalAbort;
    }
    if esr & CACHE_MAINTENANCE != 0 {
        return Decoded::SkipMaintenance;
    }
    if esr & ISV == 0 {
        return Decoded::ExternalAbort;
    }
    let size = 1 << (esr >> 22 & 3);
    let rt = (esr >> 16).to_le_bytes()[0] & 31;
    Decoded::Access(if esr & WRITE != 0 {
        MmioAccess::Write { size, rt }
    } else {
        let extension = extension(esr);
        MmioAccess::Read {
            size,
            rt,
            extension,
        }
    })
}

const fn extension(esr: u64) -> Extension {
    match (esr & SIGN_EXTEND != 0, esr & SIXTY_FOUR != 0) {
        (false, _) => Extension::Zero,
        (true, false) => Extension::SignTo32,
        (true, true) => Extension::SignTo64,
    }
}

impl MmioAccess {
    /// Bytes: 1, 2, 4 or 8.
    #[must_use]
    pub const fn size(&self) -> u8 {
        match *self {
            Self::Read { size, .. } | Self::Write { size, .. } => size,
        }
    }

    /// General register, 31 for the zero register.
    #[must_use]
    pub const fn rt(&self) -> u8 {
        match *self {
            Self::Read { rt, .. } | Self::Write { rt, .. } => rt,
        }
    }

    /// The access at `ipa` lies in one naturally aligned unit of its size. Others, which guests can
    /// make if they map a device as normal memory, reach no register: external abort.
    #[must_use]
    pub const fn is_aligned(&self, ipa: u64) -> bool {
        ipa & (self.size() as u64 - 1) == 0
    }

    /// What a store sends: the register's lower bytes.
    #[must_use]
    pub const fn stored(&self, register: u64) -> u64 {
        register & mask(self.size())
    }

    /// What a load puts into its register; bits of `value` above the access's size are ignored,
    /// because the host supplies it.
    #[must_use]
    pub const fn loaded(&self, value: u64) -> u64 {
        let unused = 64 - 8 * self.size() as u32;
        let extended = ((value << unused).cast_signed() >> unused).cast_unsigned();
        match *self {
            Self::Read {
                extension: Extension::SignTo64,
                ..
            } => extended,
            Self::Read {
                extension: Extension::SignTo32,
                ..
            } => extended & 0xffff_ffff,
            _ => value & mask(self.size()),
        }
    }
}

const fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * size as u32)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn access(esr: u64) -> MmioAccess {
        match decode(esr) {
            Decoded::Access(access) => access,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn word_store_of_w3() {
        // EC 0x24, IL, ISV, SAS 2, SRT 3, WnR, DFSC 0b000111.
        let store = access(0x9383_0047);
        assert_eq!(store, MmioAccess::Write { size: 4, rt: 3 });
        assert_eq!(store.stored(0x1234_5678_9abc_def0), 0x9abc_def0);
    }

    #[test]
    fn double_word_load_of_x30() {
        // EC 0x24, IL, ISV, SAS 3, SRT 30, SF, DFSC 0b000110.
        let load = access(0x93de_8006);
        assert_eq!((load.size(), load.rt()), (8, 30));
        assert_eq!(load.loaded(u64::MAX), u64::MAX);
    }

    #[test]
    fn loads_extend_as_the_instruction_says() {
        let byte = |bits: u64| access(0x9300_0006 | bits);
        assert_eq!(byte(0).loaded(0xf80), 0x80); // LDRB
        assert_eq!(byte(SIGN_EXTEND).loaded(0xf80), 0xffff_ff80); // LDRSB Wt
        let wide = SIGN_EXTEND | SIXTY_FOUR;
        assert_eq!(byte(wide).loaded(0xf80), 0xffff_ffff_ffff_ff80); // LDRSB Xt
        assert_eq!(byte(wide | 2 << 22).loaded(0x7fff_ffff), 0x7fff_ffff); // LDRSW
    }

    #[test]
    fn zero_register_is_told_by_its_number() {
        assert_eq!(access(0x931f_0046).rt(), 31);
    }

    #[test]
    fn instructions_without_syndrome_abort() {
        assert_eq!(decode(0x9200_0046), Decoded::ExternalAbort);
        assert_eq!(decode(0x9200_0006), Decoded::ExternalAbort);
    }

    #[test]
    fn maintenance_is_skipped_and_walks_abort() {
        assert_eq!(decode(0x9200_0147), Decoded::SkipMaintenance);
        assert_eq!(decode(0x9200_0087), Decoded::ExternalAbort);
        assert_eq!(decode(0x9300_0187), Decoded::ExternalAbort);
    }

    #[test]
    fn alignment_is_natural() {
        let word = access(0x9383_0047);
        assert!(word.is_aligned(0x0900_0018) && !word.is_aligned(0x0900_001a));
        assert!(access(0x9303_0047).is_aligned(0x0900_001b));
    }

    proptest! {
        #[test]
        fn any_syndrome_decodes_and_values_stay_in_their_width(esr: u64, value: u64) {
            if let Decoded::Access(access) = decode(esr) {
                prop_assert!(access.rt() < 32);
                prop_assert!([1, 2, 4, 8].contains(&access.size()));
                prop_assert_eq!(access.stored(value), access.stored(access.stored(value)));
                prop_assert_eq!(access.loaded(value), access.loaded(access.stored(value)));
            }
        }
    }
}
