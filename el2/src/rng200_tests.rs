//! The driver against a model of the device. One tick is one microsecond, in which the generator takes one sample.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::vec::Vec;
use std::{thread, vec};

use proptest::prelude::*;

use super::*;
use crate::guest::entropy::{self, EntropySource};

const SECOND: u64 = 1_000_000;
/// Words that the FIFO holds.
const DEPTH: usize = 16;
/// Words that are dropped when it is warm: a full FIFO, and the one that is held back.
const COLD: usize = DEPTH + 1;
/// Time for a full FIFO.
const REFILL: u64 = 32 * DEPTH as u64;

/// What a device does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Fault {
    #[default]
    None,
    /// Nothing is there: every register reads as this.
    Absent(u32),
    /// It takes orders, and makes no bits.
    Dead,
    /// Every word is this one.
    Stuck(u32),
    /// A test fails with these bits of INT_STATUS, whatever is done about it.
    Failing(u32),
}

/// A word, and when it was complete.
#[derive(Clone, Copy, Debug)]
struct Word {
    value: u32,
    born: u64,
}

/// The device. Its words differ from each other for 2^32 words.
#[derive(Debug, Default)]
struct Device {
    fault: Fault,
    now: u64,
    /// When it was last started.
    started: u64,
    control: u32,
    held: [u32; 2],
    status: u32,
    enable: u32,
    /// Since the reset.
    bits: u32,
    made: u32,
    fifo: VecDeque<Word>,
    /// Words that were read.
    read: Vec<Word>,
    /// The first word for which there was no room; it comes when there is.
    waiting: Option<Word>,
    /// Such a word is lost instead.
    holds_none: bool,
    /// A test fails when so many more words have been read.
    fails_behind: Option<usize>,
    accesses: usize,
}

impl Device {
    fn runs(&self) -> bool {
        self.control & RUNS != 0 && self.held == [0; 2] && self.fault != Fault::Dead
    }

    fn advance(&mut self, ticks: u64) {
        let (then, before) = (self.now, self.bits);
        self.now += ticks;
        if self.runs() {
            self.bits = before.saturating_add(u32::try_from(ticks).unwrap());
            for word in before / 32..self.bits / 32 {
                self.make(then + u64::from(32 * (word + 1) - before));
            }
        }
    }

    fn make(&mut self, born: u64) {
        self.made += 1;
        let value = match self.fault {
            Fault::Stuck(value) => value,
            _ => self.made.wrapping_mul(0x9e37_79b1),
        };
        let word = Word { value, born };
        if self.fifo.len() < DEPTH {
            self.fifo.push_back(word);
        } else if !self.holds_none {
            self.waiting.get_or_insert(word);
        }
    }

    fn pop(&mut self) -> u32 {
        if let Some(left) = &mut self.fails_behind {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.status |= 1 << 5;
                self.fails_behind = None;
            }
        }
        let word = self.fifo.pop_front().expect("an empty FIFO is read");
        self.read.push(word);
        self.fifo.extend(self.waiting.take());
        word.value
    }

    fn load(&mut self, offset: usize) -> u32 {
        self.accesses += 1;
        if let Fault::Absent(value) = self.fault {
            return value;
        }
        let failing = match self.fault {
            Fault::Failing(bits) => bits,
            _ => 0,
        };
        match offset {
            0x00 => self.control,
            0x0c => self.bits,
            0x18 => self.status | failing,
            0x20 => self.pop(),
            // The interrupt's level reads back above the count.
            0x24 => 0x200 | u32::try_from(self.fifo.len()).unwrap(),
            _ => panic!("{offset:#x} is no register to be read"),
        }
    }

    fn store(&mut self, offset: usize, value: u32) {
        self.accesses += 1;
        match offset {
            0x00 => {
                self.control = value;
                self.started = self.now;
            }
            0x04 | 0x08 => {
                self.held[offset / 4 - 1] = value;
                // The one empties the FIFO, the other starts the count anew.
                match (offset, value) {
                    (0x04, 1) => {
                        self.fifo.clear();
                        self.waiting = None;
                    }
                    (_, 1) => self.bits = 0,
                    _ => {}
                }
            }
            0x10 => assert_eq!(value, 0x4_0000),
            0x18 => self.status &= !value,
            0x1c => self.enable = value,
            0x24 => assert_eq!(value & 0xff, 0),
            _ => panic!("{offset:#x} is no register to be written"),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Registers(Arc<Mutex<Device>>);

impl Registers {
    fn with(fault: Fault) -> Self {
        let registers = Self::default();
        registers.device().fault = fault;
        registers
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.0.lock().unwrap()
    }
}

impl UartRegs for Registers {
    fn read(&self, offset: usize) -> u32 {
        self.device().load(offset)
    }

    fn write(&self, offset: usize, value: u32) {
        self.device().store(offset, value);
    }
}

/// A board: the device and its driver.
#[derive(Debug)]
struct Board {
    registers: Registers,
    driver: Rng200<Registers>,
}

impl Board {
    fn try_with(fault: Fault) -> Option<Self> {
        let registers = Registers::with(fault);
        let driver = Rng200::start(registers.clone(), 0, SECOND)?;
        Some(Self { registers, driver })
    }

    fn with(fault: Fault) -> Self {
        Self::try_with(fault).expect("it is there")
    }

    /// A board whose generator is warm, and full of words that may be given.
    fn warm(fault: Fault) -> Self {
        let board = Self::with(fault);
        board.warm_up();
        board
    }

    fn warm_up(&self) {
        self.pass(SECOND / 2);
        assert_eq!(self.next(), None, "what is there is dropped first");
        self.pass(32);
        assert_eq!(self.next(), None, "and one that was held back");
        self.pass(REFILL - 32);
    }

    fn pass(&self, ticks: u64) {
        self.registers.device().advance(ticks);
    }

    /// An answer; fails if that took too many accesses.
    fn next(&self) -> Option<u64> {
        self.fill().map(|[word]| word)
    }

    /// The same, of so many words.
    fn fill<const N: usize>(&self) -> Option<[u64; N]> {
        let now = {
            let mut device = self.registers.device();
            device.accesses = 0;
            device.now
        };
        let mut words = [u64::MAX; N];
        let is_filled = self.driver.fill(now, &mut words);
        assert!(self.registers.device().accesses <= MAX_ACCESSES);
        assert!(is_filled || words == [0; N], "a refusal tells something");
        is_filled.then_some(words)
    }

    /// Words read so far.
    fn read(&self) -> usize {
        self.registers.device().read.len()
    }
}

/// The source of a guest's calls: the driver, at the model's time.
impl EntropySource for Board {
    fn fill(&self, words: &mut [u64]) -> bool {
        let now = self.registers.device().now;
        self.driver.fill(now, words)
    }
}

/// What four words become.
fn conditioned(words: &[Word]) -> u64 {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.value.to_le_bytes()).collect();
    let digest = Sha256::digest(bytes);
    u64::from_le_bytes(digest[..8].try_into().unwrap())
}

#[test]
fn a_cold_generator_gives_nothing() {
    let board = Board::with(Fault::None);
    for _ in 0..SECOND / 2 / 1000 {
        assert_eq!(board.next(), None);
        board.pass(1000);
    }
    assert_eq!(board.read(), 0);
}

#[test]
fn what_it_made_while_it_warmed_up_is_dropped() {
    let board = Board::with(Fault::None);
    board.pass(SECOND / 2);
    assert_eq!((board.next(), board.read()), (None, DEPTH));
    board.pass(REFILL);
    assert!(board.next().is_some());
    let device = board.registers.device();
    assert!(device.read[DEPTH].born < SECOND / 2, "none was held back");
    let given = &device.read[COLD..];
    assert!(given.iter().all(|word| word.born >= SECOND / 2));
}

/// The device may have nothing more for a while, or forever: an empty FIFO is not read for it.
#[test]
fn a_word_that_was_held_back_is_waited_for() {
    let board = Board::with(Fault::None);
    board.registers.device().holds_none = true;
    board.pass(SECOND / 2);
    for _ in 0..3 {
        assert_eq!((board.next(), board.read()), (None, DEPTH));
    }
    board.pass(32);
    assert_eq!((board.next(), board.read()), (None, COLD));
    board.pass(128);
    assert!(board.next().is_some());
}

/// The value is that of Python's hashlib over the model's words 15,626 to 15,629.
#[test]
fn an_answer_is_the_hash_of_four_words() {
    let board = Board::warm(Fault::None);
    let first = board.next();
    let device = board.registers.device();
    let words = &device.read[COLD..];
    assert_eq!(words.len(), 4);
    assert_eq!(words[0].value, 15_626_u32.wrapping_mul(0x9e37_79b1));
    assert_eq!(first, Some(0x2557_d2ab_2d0d_791d));
}

#[test]
fn a_full_fifo_serves_a_call_for_192_bits() {
    let board = Board::warm(Fault::None);
    let answers: Vec<_> = (0..5).map(|_| board.next()).collect();
    assert!(answers[..4].iter().all(Option::is_some));
    assert_eq!(answers[4], None, "nobody waits for more");
    board.pass(REFILL);
    assert!(board.next().is_some());
}

#[test]
fn too_few_words_are_left_where_they_are() {
    let board = Board::warm(Fault::None);
    (0..4).for_each(|_| assert!(board.next().is_some()));
    let before = board.read();
    board.pass(96); // three words
    assert_eq!((board.next(), board.read()), (None, before));
    board.pass(32);
    assert!(board.next().is_some());
}

#[test]
fn a_refusal_for_more_than_there_is_takes_nothing() {
    let board = Board::warm(Fault::None);
    assert!(board.fill::<3>().is_some());
    let before = board.read();
    for _ in 0..8 {
        assert_eq!((board.fill::<3>(), board.read()), (None, before));
        board.pass(32);
    }
    assert!(board.fill::<3>().is_some());
    assert_eq!(board.read(), before + 12);
    board.pass(10 * REFILL);
    assert_eq!(board.fill::<5>(), None, "more than the FIFO holds");
}

/// Linux's way: 192 bits at once, and again if there are none.
#[test]
fn who_polls_for_192_bits_gets_what_the_generator_makes() {
    let board = Board::warm(Fault::None);
    let before = board.read();
    let mut answers = 0;
    for _ in 0..10_000 {
        board.pass(4);
        answers += usize::from(board.fill::<3>().is_some());
    }
    assert_eq!(board.read(), before + 12 * answers);
    // A word in 32 ticks, 12 for an answer.
    assert!(answers >= 10_000 * 4 / (32 * 12), "{answers}");
}

#[test]
fn two_cores_that_poll_for_192_bits_get_all_that_there_is() {
    let board = Board::warm(Fault::None);
    let core = || -> Vec<[u64; 3]> {
        let ask = |_| {
            board.pass(4);
            let mut words = [0; 3];
            EntropySource::fill(&board, &mut words).then_some(words)
        };
        (0..10_000).filter_map(ask).collect()
    };
    let answers: Vec<_> = thread::scope(|scope| {
        let cores = [(); 2].map(|()| scope.spawn(core));
        cores.into_iter().flat_map(|c| c.join().unwrap()).collect()
    });
    let device = board.registers.device();
    assert_eq!(device.read.len(), COLD + 12 * answers.len());
    let expected = device.read[COLD..].chunks(4).map(conditioned);
    let (mut expected, mut answers): (Vec<_>, Vec<_>) = (expected.collect(), answers.concat());
    answers.sort_unstable();
    expected.sort_unstable();
    assert_eq!(answers, expected);
    // Some 600 of them, less what gets lost when a core is preempted with the lock.
    assert!(answers.len() >= 30, "{}", answers.len());
}

#[test]
fn a_guests_calls_are_answered_from_it() {
    let board = Board::warm(Fault::None);
    let ask = |id, bits| entropy::call(id, bits, Some(&board)).unwrap();
    let answer = ask(0xc400_0053, 192);
    let expected = {
        let device = board.registers.device();
        let mut words = device.read[COLD..].chunks(4).map(conditioned);
        [(); 3].map(|()| words.next().unwrap())
    };
    assert_eq!(answer, [0, expected[2], expected[1], expected[0]]);
    let before = board.read();
    assert_eq!(ask(0xc400_0053, 65), [u64::MAX - 2, 0, 0, 0]);
    assert_eq!(board.read(), before, "what there is stays");
    assert_eq!(ask(0x8400_0053, 32)[0], 0);
    let mut answers = 0;
    for _ in 0..1000 {
        board.pass(5);
        answers += u32::from(ask(0xc400_0053, 192)[0] == 0);
    }
    assert!(answers >= 12, "{answers}");
}

#[test]
fn a_failed_test_resets_the_generator_which_warms_up_anew() {
    for bit in [1, 5, 31] {
        let board = Board::warm(Fault::None);
        board.registers.device().status |= 1 << bit;
        let before = board.read();
        assert_eq!((board.next(), board.read()), (None, before));
        assert_eq!(board.registers.device().status, 0);
        board.pass(SECOND / 2 - 1);
        assert_eq!((board.next(), board.read()), (None, before));
        board.pass(1);
        assert_eq!(board.next(), None);
        board.pass(REFILL);
        assert!(board.next().is_some());
    }
}

/// Bits that tell of no failure: enough bits, a full FIFO, enough transitions at the start.
#[test]
fn other_bits_of_the_status_are_no_failure() {
    let board = Board::warm(Fault::None);
    board.registers.device().status = 1 | 1 << 2 | 1 << 17;
    assert!(board.next().is_some());
}

#[test]
fn words_during_which_a_test_fails_are_not_given() {
    for words in 1..=4 {
        let board = Board::warm(Fault::None);
        board.registers.device().fails_behind = Some(words);
        assert_eq!(board.next(), None);
        assert_eq!(board.read(), COLD + 4);
        assert!(board.registers.device().fifo.is_empty());
        board.warm_up();
        assert!(board.next().is_some());
    }
}

#[test]
fn a_generator_that_stays_locked_out_is_asked_again_and_never_believed() {
    let board = Board::with(Fault::Failing(1 << 31));
    for _ in 0..100 {
        board.pass(SECOND / 20);
        assert_eq!(board.next(), None);
    }
    assert_eq!(board.read(), 0);
}

#[test]
fn equal_words_in_a_row_are_refused() {
    for value in [0, 1, 0x5555_5555, u32::MAX] {
        let board = Board::warm(Fault::Stuck(value));
        for _ in 0..3 {
            assert_eq!(board.next(), None);
            board.warm_up();
        }
        board.registers.device().fault = Fault::None;
        assert_eq!(board.next(), None, "these are old ones");
        board.warm_up();
        assert!(board.next().is_some());
    }
}

/// The last word of an answer and the first of the next one, or any two within one.
#[test]
fn a_repetition_is_seen_wherever_it_is() {
    for second in 1..8 {
        let board = Board::warm(Fault::None);
        {
            let mut device = board.registers.device();
            device.fifo[second].value = device.fifo[second - 1].value;
        }
        let answers = [board.next(), board.next()];
        assert_eq!(answers[0].is_some(), second >= 4, "{second}");
        assert_eq!(answers[1], None, "{second}");
    }
}

#[test]
fn what_does_not_answer_is_no_generator() {
    for value in [0, u32::MAX] {
        assert!(Board::try_with(Fault::Absent(value)).is_none());
    }
}

#[test]
fn a_generator_that_goes_away_gives_nothing() {
    for value in [0, u32::MAX] {
        let board = Board::warm(Fault::None);
        board.registers.device().fault = Fault::Absent(value);
        for _ in 0..20 {
            assert_eq!(board.next(), None);
            board.pass(SECOND / 10);
        }
    }
}

#[test]
fn a_generator_that_makes_no_bits_gives_nothing() {
    let board = Board::with(Fault::Dead);
    for _ in 0..20 {
        board.pass(SECOND / 10);
        assert_eq!(board.next(), None);
    }
    assert_eq!(board.read(), 0);
}

#[test]
fn words_are_not_read_before_it_counts_more_than_16_bits() {
    let board = Board::warm(Fault::None);
    let before = board.read();
    for (bits, is_read) in [(0, false), (16, false), (17, true)] {
        board.registers.device().bits = bits;
        assert_eq!(board.next().is_some(), is_read, "{bits}");
        assert_eq!(board.read() > before, is_read, "{bits}");
    }
}

/// Firmware leaves it running, with interrupts, and with words that it may know.
#[test]
fn what_firmware_left_is_reset() {
    let registers = Registers::default();
    {
        let mut device = registers.device();
        (device.control, device.enable, device.status) = (START, 0x8000_0022, 1 << 31);
        device.advance(REFILL);
    }
    let driver = Rng200::start(registers.clone(), REFILL, SECOND).unwrap();
    let device = registers.device();
    assert_eq!((device.enable, device.status), (0, 0));
    assert!(device.fifo.is_empty() && device.bits == 0 && device.runs());
    drop(device);
    assert!(!driver.fill(SECOND / 2, &mut [0]));
    assert_eq!(registers.device().read.len(), 0);
}

#[test]
fn a_core_does_not_wait_for_another_one() {
    let board = Board::warm(Fault::None);
    let held = board.driver.state.lock();
    assert_eq!(board.next(), None);
    assert_eq!(board.registers.device().accesses, 0);
    drop(held);
    assert!(board.next().is_some());
}

#[test]
fn cores_share_no_word() {
    let board = Board::warm(Fault::None);
    let core = || -> Vec<u64> {
        let ask = |_| {
            board.pass(64);
            let now = board.registers.device().now;
            let mut word = [0];
            board.driver.fill(now, &mut word).then_some(word[0])
        };
        (0..2000).filter_map(ask).collect()
    };
    let mut answers: Vec<u64> = thread::scope(|scope| {
        let cores: Vec<_> = (0..4).map(|_| scope.spawn(core)).collect();
        cores.into_iter().flat_map(|c| c.join().unwrap()).collect()
    });
    let device = board.registers.device();
    assert_eq!(device.read.len(), COLD + 4 * answers.len());
    let mut expected: Vec<u64> = device.read[COLD..].chunks(4).map(conditioned).collect();
    answers.sort_unstable();
    expected.sort_unstable();
    assert_eq!(answers, expected);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Pass(u64),
    Ask,
    AskForMost,
    Fail(u32),
    FailBehind(usize),
    Change(Fault),
    Mend,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fault = prop_oneof![
        Just(Fault::Dead),
        Just(Fault::Absent(0)),
        Just(Fault::Absent(u32::MAX)),
        any::<u32>().prop_map(Fault::Stuck),
        (0u32..32).prop_map(|bit| Fault::Failing(1 << bit)),
    ];
    let step = prop_oneof![
        15 => Just(Step::Ask),
        10 => Just(Step::AskForMost),
        10 => (0..2 * REFILL).prop_map(Step::Pass),
        3 => (SECOND / 4..SECOND).prop_map(Step::Pass),
        1 => (0u32..32).prop_map(|bit| Step::Fail(1 << bit)),
        1 => (1usize..6).prop_map(Step::FailBehind),
        1 => fault.prop_map(Step::Change),
        2 => Just(Step::Mend),
    ];
    prop::collection::vec(step, 1..80)
}

/// An answer is made of the last words, four for each of its own, which are warm, all different in a row, and had no
/// failure about them. Before them at most one was dropped.
fn check_answer(device: &Device, answer: &[u64], before: usize) {
    let read = &device.read[before..];
    let dropped = read.len() - 4 * answer.len();
    assert!(dropped <= 1);
    let words = &read[dropped..];
    let expected: Vec<u64> = words.chunks(4).map(conditioned).collect();
    assert_eq!(answer, expected);
    assert_eq!(device.status & 0x8000_0022, 0);
    let warm = device.started + u64::from(WARM_UP_BITS);
    assert!(words.iter().all(|word| word.born >= warm));
    assert!(words.windows(2).all(|pair| pair[0].value != pair[1].value));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the device does: each word goes into one answer at most, nothing cold, repeated or doubtful into any,
    /// and no call takes too long.
    #[test]
    fn no_word_is_given_twice(steps in steps()) {
        let board = Board::with(Fault::None);
        let mut given = vec![];
        for step in steps {
            match step {
                Step::Pass(ticks) => board.pass(ticks),
                Step::Fail(bits) => board.registers.device().status |= bits,
                Step::FailBehind(words) => board.registers.device().fails_behind = Some(words),
                Step::Change(fault) => board.registers.device().fault = fault,
                Step::Mend => board.registers.device().fault = Fault::None,
                Step::Ask | Step::AskForMost => {
                    let before = board.read();
                    let answer = match step {
                        Step::Ask => board.fill::<1>().map(Vec::from),
                        _ => board.fill::<3>().map(Vec::from),
                    };
                    if let Some(answer) = answer {
                        check_answer(&board.registers.device(), &answer, before);
                        given.extend(answer);
                    }
                }
            }
        }
        let all = given.len();
        given.sort_unstable();
        given.dedup();
        prop_assert_eq!(given.len(), all);
    }
}
