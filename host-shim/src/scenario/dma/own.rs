//! DMA to memory of the host: what a driver wants.

use board::AddrRange;

use super::setup::Setup;
use crate::arch::mem;
use crate::edu::{Direction, MAX_BYTES};
use crate::scenario::kit::expect;

/// Lets every device read a pattern of its own, and write it elsewhere.
pub(super) fn reached(setup: &Setup<'_>) -> Result<(), &'static str> {
    let numbers = 0..setup.devices.len();
    let from = |number: usize| setup.page(2 * number);
    let to = |number: usize| setup.page(2 * number + 1);
    for number in numbers.clone() {
        fill(from(number)?, number);
        mem::bytes_mut(to(number)?).fill(0x77);
    }
    let starts = |page: &dyn Fn(usize) -> Result<AddrRange, &'static str>| {
        let pages: Result<alloc::vec::Vec<_>, _> = numbers.clone().map(page).collect();
        Ok::<_, &'static str>(pages?.into_iter().map(AddrRange::start))
    };
    setup.transfers(Direction::FromMemory, starts(&from)?, MAX_BYTES)?;
    setup.transfers(Direction::ToMemory, starts(&to)?, MAX_BYTES)?;
    for number in numbers.clone() {
        check(to(number)?, number)?;
    }
    Ok(())
}

/// Bytes that are different at every place and for every device.
fn byte(at: usize, number: usize) -> u8 {
    let [low, high, ..] = at.to_le_bytes();
    low ^ high.rotate_left(4) ^ number.to_le_bytes()[0].wrapping_mul(0x3b)
}

fn fill(page: AddrRange, number: usize) {
    for (at, place) in mem::bytes_mut(page).iter_mut().enumerate() {
        *place = byte(at, number);
    }
}

fn check(page: AddrRange, number: usize) -> Result<(), &'static str> {
    let (moved, rest) = mem::bytes(page).split_at(MAX_BYTES as usize);
    let right = (0..)
        .zip(moved)
        .all(|(at, found)| *found == byte(at, number));
    expect(right, "what a device wrote is not what it had read")?;
    expect(rest.iter().all(|byte| *byte == 0x77), "it wrote too much")
}
