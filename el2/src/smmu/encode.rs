//! Words that the SMMU reads: commands, stream table entries.

/// A command (IHI 0070 4).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// CFGI_STE: forget what is cached of a stream's entry (4.3.1).
    Stream(u32),
    /// CFGI_ALL: forget what is cached of any entry (4.3.2).
    AllStreams,
    /// TLBI_S2_IPA: forget translations of `pages` pages of 4 KiB from `ipa`, and steps to them
    /// (4.4.1). More than one only where ranges are offered: `(num + 1) << scale` pages.
    Pages {
        /// VMID.
        vmid: u16,
        /// First address.
        ipa: u64,
        /// The range's NUM and SCALE; `None` for one page without a range.
        range: Option<(u8, u8)>,
    },
    /// TLBI_S12_VMALL: forget all of a VMID (4.4.2).
    Vmid(u16),
    /// TLBI_NSNH_ALL: forget everything (4.4.2).
    All,
    /// CMD_SYNC: complete all commands before it, and the accesses that used what they made
    /// forgotten (4.7). No interrupt.
    Sync,
}

impl Command {
    /// The two words.
    #[must_use]
    pub const fn encode(self) -> [u64; 2] {
        match self {
            Self::Stream(stream) => [0x03 | (stream as u64) << 32, 1],
            Self::AllStreams => [0x04, 31],
            Self::Pages { vmid, ipa, range } => {
                let (first, second) = match range {
                    // TG: 4 KiB. The level is not told: TTL 0.
                    Some((num, scale)) => ((num as u64) << 12 | (scale as u64) << 20, 1 << 10),
                    None => (0, 0),
                };
                let address = ipa & 0x000f_ffff_ffff_f000;
                [0x2a | first | (vmid as u64) << 32, second | address]
            }
            Self::Vmid(vmid) => [0x28 | (vmid as u64) << 32, 0],
            Self::All => [0x30, 0],
            Self::Sync => [0x46, 0],
        }
    }
}

/// A stream table entry (IHI 0070 5.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StreamEntry {
    /// Aborts without a record.
    Abort,
    /// Goes through a stage 2; attributes of the access are the device's own.
    Stage2 {
        /// VMID of its translations.
        vmid: u16,
        /// VTCR_EL2 of the tables.
        vtcr: u64,
        /// The root's address.
        root: u64,
        /// The tables are written for forced write-back.
        fwb: bool,
    },
}

/// V: the entry is valid.
const VALID: u64 = 1;
/// Config: abort, 0b000; stage 1 bypass with stage 2, 0b110.
const STAGE2: u64 = 0b110 << 1;
/// SHCFG: the shareability that comes in.
const SHARE_INCOMING: u64 = 1 << 44;
/// S2FWB.
const FORCE_WRITE_BACK: u64 = 1 << 25;
/// S2AA64, S2AFFD (an access flag of 0 is no fault: the CPUs use it for ageing, and a device can't
/// be told to try again), S2R (a fault is recorded; without S2S it aborts at once).
const FLAGS: u64 = 1 << 51 | 1 << 53 | 1 << 58;
/// Words of an entry.
pub(super) const ENTRY_WORDS: usize = 8;

impl StreamEntry {
    /// The eight words.
    #[must_use]
    pub const fn encode(self) -> [u64; ENTRY_WORDS] {
        match self {
            Self::Abort => [VALID, 0, 0, 0, 0, 0, 0, 0],
            Self::Stage2 {
                vmid,
                vtcr,
                root,
                fwb,
            } => {
                // S2T0SZ to S2PS lie as in VTCR_EL2: T0SZ, SL0, IRGN0, ORGN0, SH0, TG0, PS.
                let shape = (vtcr & 0x7_ffff) << 32;
                let second = SHARE_INCOMING | if fwb { FORCE_WRITE_BACK } else { 0 };
                let third = vmid as u64 | shape | FLAGS;
                [VALID | STAGE2, second, third, root, 0, 0, 0, 0]
            }
        }
    }
}

/// A first-level descriptor of a stream table: a table of 256 entries (IHI 0070 5.1).
pub(super) const fn first_level(table: u64) -> u64 {
    table | (SPLIT as u64 + 1)
}

/// Base-two logarithm of the entries of a second-level table.
pub(super) const SPLIT: u32 = 8;
