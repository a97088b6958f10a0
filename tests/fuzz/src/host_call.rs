//! What the host puts into registers: calls of the ABI, firmware calls, and the words with fields.

use abi::{Call, ErrorCode, Exit, Features, LeafInfo, SlotWord, VmConfig};
use arbitrary::{Result, Unstructured};
use el2::counters::Counters;
use el2::hvc::{self, Answer, Host};
use el2::psci;
use el2::smc::{self, Verdict};

/// Runs one input.
pub(crate) fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    while !input.is_empty() {
        if step(&mut input).is_err() {
            return;
        }
    }
}

fn step(input: &mut Unstructured<'_>) -> Result<()> {
    match input.int_in_range(0..=3u8)? {
        0 => call(input),
        1 => firmware(input),
        2 => words(input),
        _ => power(input),
    }
}

/// One in four ids is any number, one immediate in eight isn't 0: most calls reach a handler.
fn call(input: &mut Unstructured<'_>) -> Result<()> {
    let immediate = if input.ratio(1, 8u8)? {
        input.arbitrary()?
    } else {
        0
    };
    let id = if input.ratio(1, 4u8)? {
        input.arbitrary()?
    } else {
        u64::from(*input.choose(Call::ALL)? as u32)
    };
    let counters = Counters::new();
    let host = Host {
        features: Features::HOST_COUNTERS,
        counters: &counters,
    };
    match hvc::answer(immediate, id, input.arbitrary()?, &host) {
        Answer::AboutVms(call) => {
            assert_eq!((immediate, u64::from(call as u32)), (0, id));
        }
        Answer::Now([status, ..]) => {
            let uid = immediate == 0 && id == 0x8600_ff01;
            assert!(uid || status == 0 || status == u64::MAX);
            let ours = immediate == 0 && id >> 32 == 0 && id >> 16 == 0xc600;
            assert!(uid || ours || status == u64::MAX, "{id:#x} was served");
        }
    }
    Ok(())
}

/// Only identification, workarounds and random numbers go to firmware: fast calls of owners 0 (Arm
/// architecture) and 4 (standard services), DEN 0028 section 6, never PSCI.
fn firmware(input: &mut Unstructured<'_>) -> Result<()> {
    let immediate = if input.ratio(1, 8u8)? {
        input.arbitrary()?
    } else {
        0
    };
    let x0: u64 = if input.ratio(1, 4u8)? {
        input.arbitrary()?
    } else {
        u64::from(*input.choose(&[0x8000_0000u32, 0x8400_0000, 0xc400_0000])?)
            | u64::from(input.arbitrary::<u16>()?)
    };
    let verdict = smc::judge(immediate, x0);
    if verdict == Verdict::Refuse {
        return Ok(());
    }
    assert_eq!((immediate, x0 >> 32), (0, 0), "{verdict:?} for {x0:#x}");
    assert_eq!(x0 >> 31, 1, "a yielding call got {verdict:?}");
    let (owner, number) = (x0 >> 24 & 0x3f, x0 & 0xffff);
    match verdict {
        Verdict::Psci => assert!(owner == 4 && number < 0x20, "{x0:#x}"),
        Verdict::Forward => {
            assert!(owner == 0 || owner == 4, "{x0:#x}");
            assert!(owner == 0 || (0x50..0x60).contains(&number), "{x0:#x}");
        }
        _ => assert_eq!(owner, 0),
    }
    let _: Option<u64> = smc::arch_feature(input.arbitrary()?);
    Ok(())
}

/// What is decoded from a word is encoded as that word again, so that no bit is silently ignored.
fn words(input: &mut Unstructured<'_>) -> Result<()> {
    let word: u64 = input.arbitrary()?;
    for word in [word, word & 0x1ff, word & 0xffff_ffff_0001_ffff] {
        if let Some(config) = VmConfig::from_bits(word) {
            assert_eq!(config.bits(), word);
            assert!((1..=8).contains(&config.vcpus));
        }
        if let Some(slot) = SlotWord::from_bits(word) {
            assert_eq!(slot.bits(), word);
        }
        let leaf = LeafInfo::from_bits(word);
        assert_eq!(LeafInfo::from_bits(leaf.bits()), leaf);
    }
    let registers = [input.int_in_range(0..=12)?, word, input.arbitrary()?, word];
    if let Some(exit) = Exit::from_registers(registers) {
        assert_eq!(Exit::from_registers(exit.to_registers()), Some(exit));
    }
    if let Some(error) = ErrorCode::from_register(word) {
        assert_eq!(error.to_register(), word);
    }
    match abi::from_register(word) {
        Ok(value) => assert_eq!(value, word),
        Err(_) => assert!(word >> 63 == 1),
    }
    Ok(())
}

/// An id that PSCI_FEATURES names is one that is decoded, and the other way round.
fn power(input: &mut Unstructured<'_>) -> Result<()> {
    let wide = if input.arbitrary()? { 1 << 30 } else { 0 };
    let id = 0x8400_0000 | wide | u32::from(input.arbitrary::<u8>()? & 0x1f);
    let request = psci::decode(id, input.arbitrary()?);
    let unknown = request == psci::Request::Unknown;
    assert_eq!(
        unknown,
        psci::features(id) == u64::MAX,
        "{id:#x}: {request:?}"
    );
    Ok(())
}
