//! What comes from the guest and its core. Mostly what means something, sometimes anything.

use arbitrary::{Result, Unstructured};
use el2::exits::testing::{
    DEVICE, DEVICE_PAGES, GICC, Lines, OWNED_PAGES, RAM, RAM_PAGES, READ_ONLY, READ_ONLY_PAGES,
    TAKEN_PAGE,
};

use super::PAGE;
use super::oracle::Before;

/// The vector of a synchronous exception from where the guest was.
pub(super) fn vector(before: &Before) -> u64 {
    if before.pstate & 0x10 != 0 { 12 } else { 8 }
}

/// ESR_EL2 of an abort.
pub(super) fn abort(input: &mut Unstructured<'_>) -> Result<u64> {
    let class = if input.ratio(1, 6u8)? { 0x20 } else { 0x24 };
    let mut iss = u64::from(input.arbitrary::<u32>()? & 0x3ff_ffff);
    if !input.ratio(1, 8u8)? {
        // A translation, access flag or permission fault at one of four levels, by an access with a syndrome.
        let status = *input.choose(&[0b0001, 0b0001, 0b0001, 0b0011, 0b0010])? << 2;
        iss = iss & !0x3c | status;
        iss = iss & !0x20 | 1 << 24;
    }
    if !input.ratio(1, 8u8)? {
        // Not on a walk, no maintenance, with an address.
        iss &= !(1 << 7 | 1 << 8 | 1 << 10);
    }
    Ok(class << 26 | iss)
}

/// An address near what is there.
pub(super) fn ipa(input: &mut Unstructured<'_>) -> Result<u64> {
    let starts = [
        (RAM, RAM_PAGES),
        (RAM, OWNED_PAGES),
        (RAM + TAKEN_PAGE * PAGE, 1),
        (READ_ONLY, READ_ONLY_PAGES),
        (DEVICE, DEVICE_PAGES),
        (GICC, 2),
        (0x0800_0000, 16),
        (0x080a_0000, 8 * 32),
        (0x0900_0000, 4),
        (0x0900_0000, 4),
    ];
    if input.ratio(1, 16u8)? {
        return Ok(input.arbitrary::<u64>()? & 0xf_ffff_ffff_ffff);
    }
    let (start, pages) = *input.choose(&starts)?;
    // The page before it and the one behind it, too.
    let page = input.int_in_range(0..=pages + 1)?;
    let mut offset = u64::from(input.arbitrary::<u16>()? & 0xfff);
    if !input.ratio(1, 4u8)? {
        offset &= !7;
    }
    Ok(start - PAGE + page * PAGE + offset)
}

/// The ISS of a system register's trap.
pub(super) fn register(input: &mut Unstructured<'_>) -> Result<u32> {
    let known: [(u32, u32, u32, u32, u32); 14] = [
        (3, 0, 12, 11, 5), // ICC_SGI1R_EL1
        (3, 0, 12, 11, 7), // ICC_SGI0R_EL1
        (3, 0, 12, 11, 1), // ICC_DIR_EL1
        (3, 0, 12, 12, 5), // ICC_SRE_EL1
        (3, 0, 0, 4, 0),   // ID_AA64PFR0_EL1
        (3, 0, 1, 0, 0),   // SCTLR_EL1
        (3, 0, 1, 0, 0),
        (3, 0, 2, 0, 0),  // TTBR0_EL1
        (1, 0, 7, 14, 2), // DC CISW
        (1, 0, 7, 14, 2),
        (3, 3, 14, 2, 0), // CNTP_TVAL_EL0
        (3, 3, 14, 2, 1), // CNTP_CTL_EL0
        (3, 3, 14, 2, 2), // CNTP_CVAL_EL0
        (3, 3, 14, 0, 1), // CNTPCT_EL0
    ];
    let any: u32 = input.arbitrary::<u32>()? & 0x1ff_ffff;
    if input.ratio(1, 4u8)? {
        return Ok(any);
    }
    let (op0, op1, crn, crm, op2) = *input.choose(&known)?;
    let named = op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | crm << 1;
    Ok(named | any & (31 << 5 | 1))
}

/// x0 to x3 of a call.
pub(super) fn call(input: &mut Unstructured<'_>) -> Result<[u64; 4]> {
    let id = match input.int_in_range(0..=7u8)? {
        0 => input.arbitrary::<u32>()?.into(),
        1 | 2 => *input.choose(&[
            0x8400_0000,
            0xc400_0001,
            0x8400_0002,
            0xc400_0003,
            0x8400_0008,
            0x8400_0009,
            0xc400_0012,
            0x8000_8000,
            u64::from(abi::GUEST_MEMORY_ATTRIBUTES),
            u64::from(abi::GUEST_MEASUREMENT),
        ])?,
        _ => input.int_in_range(0xc600_0002..=0xc600_000b)?,
    };
    let address = if input.ratio(1, 4u8)? {
        // A number; or CPU_SUSPEND's state, which may be a power down.
        input.int_in_range(0..=9)? | u64::from(input.arbitrary::<bool>()?) << 16
    } else {
        let address = ipa(input)?;
        address & if input.ratio(1, 16u8)? { !0 } else { !0xfff }
    };
    let third = if input.ratio(1, 2u8)? {
        RAM + u64::from(input.arbitrary::<u8>()? & !3)
    } else {
        input.int_in_range(0..=9)?
    };
    // HYP_MEMINFO, MMIO_GUARD_INFO and MMIO_GUARD_ENROLL have no argument.
    if matches!(id, 0xc600_0002 | 0xc600_0005 | 0xc600_0006) && third & 1 == 0 {
        return Ok([id, 0, 0, 0]);
    }
    let last = if input.ratio(1, 8u8)? {
        input.arbitrary()?
    } else {
        0
    };
    Ok([id, address, third, last])
}

/// What the core's interrupt controller shows.
pub(super) fn lines(input: &mut Unstructured<'_>) -> Result<Lines> {
    let bits: u8 = input.arbitrary()?;
    let bit = |n: u8| bits >> n & 1 != 0;
    Ok(Lines {
        maintenance: bit(0),
        virtual_timer: bit(1),
        timer_active: bit(2),
        kick: bit(3),
        host_kick: bit(4),
        pending: bit(5),
    })
}
