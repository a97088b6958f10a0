//! A vCPU's local interrupt controller: an x2APIC, reached through MSRs only, so that nothing
//! has to decode a guest's instructions (SDM vol. 3A 11.12).
//!
//! Interrupts between vCPUs go through mailboxes of the VM: the sender leaves a message, the
//! receiver looks before each entry.

use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// First MSR of the x2APIC.
pub const FIRST: u32 = 0x800;
/// Last one.
pub const LAST: u32 = 0x83f;

const ID: u32 = 0x802;
const VERSION: u32 = 0x803;
const TASK_PRIORITY: u32 = 0x808;
const END: u32 = 0x80b;
const LOGICAL_ID: u32 = 0x80d;
const SPURIOUS: u32 = 0x80f;
const IN_SERVICE: u32 = 0x810;
const REQUESTED: u32 = 0x820;
const ERROR: u32 = 0x828;
const COMMAND: u32 = 0x830;
const TIMER: u32 = 0x832;
const LAST_VECTOR: u32 = 0x837;
const INITIAL_COUNT: u32 = 0x838;
const CURRENT_COUNT: u32 = 0x839;
const DIVIDE: u32 = 0x83e;
const SELF: u32 = 0x83f;
/// Version 0x14, seven local vectors, no suppression of end-of-interrupt broadcasts.
const VERSION_WORD: u64 = 0x0006_0014;
const ENABLED: u64 = 1 << 8;
const MASKED: u64 = 1 << 16;
const PERIODIC: u64 = 1 << 17;

/// A register that does not exist, or a value that it does not take: #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// A message to other vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it says.
    pub kind: MessageKind,
    /// To whom: bit N for vCPU N.
    pub to: u64,
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageKind {
    /// An interrupt with this vector.
    Interrupt(u8),
    /// Reset and wait for a start-up message.
    Init,
    /// Start at this page.
    StartUp(u8),
}

/// What others have sent to one vCPU.
#[derive(Debug)]
pub struct Mailbox {
    vectors: [AtomicU64; 4],
    init: AtomicBool,
    /// 0: nothing; else 0x100 + page.
    start: AtomicU64,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self {
            vectors: core::array::from_fn(|_| AtomicU64::new(0)),
            init: AtomicBool::new(false),
            start: AtomicU64::new(0),
        }
    }
}

impl Mailbox {
    /// Leaves a message.
    pub fn post(&self, kind: MessageKind) {
        match kind {
            MessageKind::Interrupt(vector) => {
                let word = &self.vectors[usize::from(vector >> 6)];
                word.fetch_or(1 << (vector & 63), Ordering::Release);
            }
            MessageKind::Init => {
                self.start.store(0, Ordering::Relaxed);
                self.init.store(true, Ordering::Release);
            }
            MessageKind::StartUp(page) => {
                self.start.store(0x100 | u64::from(page), Ordering::Release);
            }
        }
    }

    /// Whether the vCPU was told to reset; forgets it.
    pub fn take_init(&self) -> bool {
        self.init.swap(false, Ordering::Acquire)
    }

    /// The page at which the vCPU was told to start; forgets it. Only a vCPU that waits for it
    /// looks.
    pub fn take_start(&self) -> Option<u8> {
        match self.start.swap(0, Ordering::Acquire) {
            0 => None,
            word => Some(word.to_le_bytes()[0]),
        }
    }
}

/// The controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    number: u8,
    requested: [u64; 4],
    in_service: [u64; 4],
    task_priority: u8,
    spurious: u64,
    vectors: [u64; 6],
    initial_count: u64,
    divide: u64,
    /// Time-stamp at which the timer fires next.
    deadline: Option<u64>,
}

impl LocalApic {
    /// After reset, of vCPU `number`.
    #[must_use]
    pub const fn new(number: u8) -> Self {
        Self {
            number,
            requested: [0; 4],
            in_service: [0; 4],
            task_priority: 0,
            spurious: 0xff,
            vectors: [MASKED; 6],
            initial_count: 0,
            divide: 0,
            deadline: None,
        }
    }

    /// Reads a register at time-stamp `now`.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn read(&self, msr: u32, now: u64) -> Result<u64, Refused> {
        Ok(match msr {
            ID => u64::from(self.number),
            VERSION => VERSION_WORD,
            TASK_PRIORITY => u64::from(self.task_priority),
            LOGICAL_ID => u64::from(self.number >> 4) << 16 | 1 << (self.number & 0xf),
            SPURIOUS => self.spurious,
            IN_SERVICE..=0x817 => half(&self.in_service, msr - IN_SERVICE),
            // Trigger modes: all edge.
            0x818..=0x81f | ERROR | COMMAND => 0,
            REQUESTED..=0x827 => half(&self.requested, msr - REQUESTED),
            TIMER..=LAST_VECTOR => self.vectors[(msr - TIMER) as usize],
            INITIAL_COUNT => self.initial_count,
            CURRENT_COUNT => {
                let left = self.deadline.map_or(0, |at| at.saturating_sub(now));
                left >> self.divide_shift()
            }
            DIVIDE => self.divide,
            _ => return Err(Refused),
        })
    }

    /// Writes a register at time-stamp `now`; the message that leaves, if any.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn write(&mut self, msr: u32, value: u64, now: u64) -> Result<Option<Message>, Refused> {
        let [low, ..] = value.to_le_bytes();
        let short = value >> 32 == 0;
        match msr {
            COMMAND => return self.command(value).map(Some).ok_or(Refused),
            SELF if value < 256 => set(&mut self.requested, low),
            END if value == 0 => self.end(),
            TASK_PRIORITY if value < 256 => self.task_priority = low,
            SPURIOUS if value < 1 << 13 => self.spurious = value,
            ERROR if value == 0 => {}
            TIMER..=LAST_VECTOR if short => self.vectors[(msr - TIMER) as usize] = value,
            INITIAL_COUNT if short => {
                self.initial_count = value;
                self.arm(now);
            }
            DIVIDE if value < 16 => self.divide = value,
            _ => return Err(Refused),
        }
        Ok(None)
    }

    /// The interrupt command register (SDM vol. 3A 11.12.9): destination in bits 63:32,
    /// shorthand in 19:18, mode in 10:8.
    fn command(&self, value: u64) -> Option<Message> {
        let [vector, mode, ..] = value.to_le_bytes();
        let me = 1u64 << (self.number & 63);
        let to = match value >> 18 & 3 {
            1 => me,
            2 => !0,
            3 => !me,
            _ => match value >> 32 {
                0xffff_ffff => !0,
                logical if value & 1 << 11 != 0 => (logical & 0xffff) << (logical >> 16 << 4 & 63),
                id => 1u64.checked_shl(u32::try_from(id).ok()?).unwrap_or(0),
            },
        };
        let kind = match mode & 7 {
            0 | 1 => MessageKind::Interrupt(vector),
            5 => MessageKind::Init,
            6 => MessageKind::StartUp(vector),
            _ => return None,
        };
        Some(Message { kind, to })
    }

    /// Takes over what others have sent, and the timer's interrupt if it is due.
    pub fn collect(&mut self, mail: &Mailbox, now: u64) {
        for (word, sent) in self.requested.iter_mut().zip(&mail.vectors) {
            if sent.load(Ordering::Relaxed) != 0 {
                *word |= sent.swap(0, Ordering::Acquire);
            }
        }
        if self.deadline.is_some_and(|at| at <= now) {
            let timer = self.vectors[0];
            if timer & MASKED == 0 {
                set(&mut self.requested, timer.to_le_bytes()[0]);
            }
            self.deadline = None;
            if timer & PERIODIC != 0 {
                self.arm(now);
            }
        }
    }

    /// The vector that the CPU should take now, if its priority is above what runs.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        let vector = highest(&self.requested)?;
        let running = highest(&self.in_service)
            .unwrap_or(0)
            .max(self.task_priority);
        let enabled = self.spurious & ENABLED != 0;
        (enabled && vector >> 4 > running >> 4).then_some(vector)
    }

    /// The CPU takes this vector.
    pub fn accept(&mut self, vector: u8) {
        clear(&mut self.requested, vector);
        set(&mut self.in_service, vector);
    }

    /// When the timer fires next.
    #[must_use]
    pub const fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// CR8: the task priority's class.
    #[must_use]
    pub const fn task_class(&self) -> u8 {
        self.task_priority >> 4
    }

    /// Sets CR8, 0 to 15.
    pub const fn set_task_class(&mut self, class: u8) {
        self.task_priority = class << 4;
    }

    fn end(&mut self) {
        if let Some(vector) = highest(&self.in_service) {
            clear(&mut self.in_service, vector);
        }
    }

    /// Ticks are those of the time-stamp counter, divided.
    fn arm(&mut self, now: u64) {
        self.deadline = (self.initial_count != 0)
            .then(|| now.saturating_add(self.initial_count << self.divide_shift()));
    }

    /// Divide configuration (SDM vol. 3A figure 11-10): bits 3, 1, 0; 111 divides by 1.
    const fn divide_shift(&self) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "three bits")]
        let code = ((self.divide >> 1 & 4) | self.divide & 3) as u32;
        if code == 7 { 0 } else { code + 1 }
    }
}

fn set(words: &mut [u64; 4], vector: u8) {
    words[usize::from(vector >> 6)] |= 1 << (vector & 63);
}

fn clear(words: &mut [u64; 4], vector: u8) {
    words[usize::from(vector >> 6)] &= !(1 << (vector & 63));
}

fn highest(words: &[u64; 4]) -> Option<u8> {
    let at = words.iter().rposition(|word| *word != 0)?;
    let bit = 63 - words[at].leading_zeros();
    u8::try_from(64 * at)
        .ok()?
        .checked_add(u8::try_from(bit).ok()?)
}

/// 32 of 256 bits.
fn half(words: &[u64; 4], nth: u32) -> u64 {
    let word = words[((nth / 2) & 3) as usize];
    word >> (32 * (nth & 1)) & 0xffff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn enabled() -> LocalApic {
        let mut apic = LocalApic::new(1);
        assert_eq!(apic.write(SPURIOUS, 0x1ff, 0), Ok(None));
        apic
    }

    #[test]
    fn priorities_nest_and_end_pops_the_highest() {
        let mut apic = enabled();
        let mail = Mailbox::default();
        mail.post(MessageKind::Interrupt(0x31));
        apic.collect(&mail, 0);
        assert_eq!(apic.pending(), Some(0x31));
        apic.accept(0x31);
        mail.post(MessageKind::Interrupt(0x3f));
        mail.post(MessageKind::Interrupt(0xf0));
        apic.collect(&mail, 0);
        assert_eq!(apic.pending(), Some(0xf0));
        apic.accept(0xf0);
        assert_eq!(apic.pending(), None);
        apic.write(END, 0, 0).unwrap();
        assert_eq!(apic.pending(), None, "same class as the one in service");
        apic.write(END, 0, 0).unwrap();
        assert_eq!(apic.pending(), Some(0x3f));
        apic.write(TASK_PRIORITY, 0x40, 0).unwrap();
        assert_eq!(apic.pending(), None);
    }

    #[test]
    fn commands_name_their_targets() {
        let mut apic = enabled();
        let sent = |apic: &mut LocalApic, value| apic.write(COMMAND, value, 0).unwrap().unwrap();
        let init = sent(&mut apic, 0x0000_0002_0000_4500);
        assert_eq!((init.kind, init.to), (MessageKind::Init, 1 << 2));
        let start = sent(&mut apic, 0x0000_0003_0000_4608);
        assert_eq!((start.kind, start.to), (MessageKind::StartUp(8), 1 << 3));
        let others = sent(&mut apic, 0x000c_4041);
        assert_eq!(others.kind, MessageKind::Interrupt(0x41));
        assert_eq!(others.to, !2);
        assert_eq!(sent(&mut apic, 0x0004_0041).to, 2);
        assert_eq!(sent(&mut apic, 0x0008_0041).to, !0);
        assert_eq!(sent(&mut apic, 0x0000_0004_0000_0841).to, 4);
        assert_eq!(apic.write(COMMAND, 0x300, 0), Err(Refused));
    }

    #[test]
    fn init_and_start_up_arrive_once() {
        let mail = Mailbox::default();
        assert!(!mail.take_init());
        mail.post(MessageKind::StartUp(1));
        mail.post(MessageKind::Init);
        assert!(mail.take_init() && !mail.take_init());
        assert_eq!(mail.take_start(), None, "INIT forgets an earlier start-up");
        mail.post(MessageKind::StartUp(0));
        assert_eq!(mail.take_start(), Some(0));
        assert_eq!(mail.take_start(), None);
    }

    #[test]
    fn the_timer_fires_once_or_again_and_again() {
        let mut apic = enabled();
        let mail = Mailbox::default();
        apic.write(DIVIDE, 0b1011, 0).unwrap();
        apic.write(TIMER, 0x50, 0).unwrap();
        apic.write(INITIAL_COUNT, 100, 1000).unwrap();
        assert_eq!(apic.deadline(), Some(1100));
        assert_eq!(apic.read(CURRENT_COUNT, 1040), Ok(60));
        apic.collect(&mail, 1099);
        assert_eq!(apic.pending(), None);
        apic.collect(&mail, 1100);
        assert_eq!(apic.pending(), Some(0x50));
        assert_eq!(apic.deadline(), None);
        apic.write(TIMER, PERIODIC | 0x50, 0).unwrap();
        apic.write(DIVIDE, 0, 0).unwrap();
        apic.write(INITIAL_COUNT, 100, 2000).unwrap();
        apic.collect(&mail, 2300);
        assert_eq!(apic.deadline(), Some(2500));
    }

    proptest! {
        #[test]
        fn no_access_panics_and_the_highest_vector_wins(
            writes in prop::collection::vec((FIRST..=LAST, any::<u64>()), 0..40),
        ) {
            let mut apic = enabled();
            for (msr, value) in writes {
                let before = apic.clone();
                if apic.write(msr, value, 7).is_err() {
                    prop_assert_eq!(&apic, &before);
                }
                let _ = apic.read(msr, 9);
                let all = (0..=255u8).rev();
                let oracle = all.into_iter().find(|v| apic.requested[usize::from(v >> 6)] >> (v & 63) & 1 == 1);
                prop_assert_eq!(highest(&apic.requested), oracle);
            }
        }
    }
}
