//! The virtual interrupt controller of one VM: distributor, redistributors, list registers.
//!
//! Invariant: an interrupt is in at most one list register of one vCPU, and only between that
//! vCPU's [`Vgic::load`] and [`Vgic::save`]; everything else about it is in this object. So no
//! interrupt is lost when a vCPU moves, and none is delivered twice.
//!
//! ```text
//!            line or latch              guest acknowledges            guest ends it
//! inactive ───────────────▶ pending ───────────────▶ active ───────────────────────▶ inactive
//!                              ▲      (again while active: active and pending)  │
//!                              └────────── the line is still high ──────────────┘
//! ```
//!
//! The guest's CPU interface is the hardware's (GICV, or ICV_* registers). Distributor and
//! redistributors are emulated here, in both versions with one security state. Sources: GICv2 (Arm
//! IHI 0048B), GICv3 and v4 (IHI 0069H); docs/guests.md.

mod irq;
mod lists;
mod registers;
#[cfg(test)]
mod tests;

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::sync::SpinLock;
use abi::{GUEST_TIMER_PPI, MAX_VCPUS};

use irq::Irq;
pub use lists::CpuInterface;

/// Number of shared interrupts: INTIDs 32 to 1019.
pub const SPIS: usize = 988;
/// INTIDs below this are private to a vCPU: 16 SGIs, 16 PPIs.
const PRIVATE: usize = 32;
const VCPUS: usize = MAX_VCPUS as usize;

/// Architecture version of the guest's controller, which is the machine's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GicVersion {
    /// Memory-mapped CPU interface, SGIs through the distributor.
    V2,
    /// System-register interface, one redistributor per vCPU.
    V3,
}

/// vCPUs whose interrupts may have changed while they run elsewhere, or sleep.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use]
pub struct Kicks(u8);

impl Kicks {
    /// None.
    pub const NONE: Self = Self(0);

    /// Indices of the vCPUs.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        bits(u64::from(self.0))
    }

    fn add(&mut self, vcpu: u8) {
        if usize::from(vcpu) < VCPUS {
            self.0 |= 1 << vcpu;
        }
    }
}

/// There is no such shared interrupt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NoSuchInterrupt(pub u32);

/// The controller.
#[derive(Debug)]
pub struct Vgic {
    version: GicVersion,
    vcpus: u8,
    /// vCPUs that have a live interrupt, or had one at their last load; written under the lock.
    busy: AtomicU8,
    /// Whether an interrupt was ended that the host waits for; written under the lock.
    ended: AtomicBool,
    state: SpinLock<State>,
}

/// What the lock guards.
#[derive(Debug)]
struct State {
    /// GICD_CTLR's enables: bit 0 group 0, bit 1 group 1.
    enabled: u8,
    private: [[Irq; PRIVATE]; VCPUS],
    spis: [Irq; SPIS],
    /// Private interrupts that are pending or active.
    live_private: [u32; VCPUS],
    /// Shared interrupts that are pending or active, INTID 32 in bit 0 of the first word.
    live_spis: [u64; SPIS.div_ceil(64)],
    /// Which of those words are not zero.
    live_words: u32,
    /// Shared interrupts whose end the host is to be told.
    ended_spis: [u64; SPIS.div_ceil(64)],
}

impl Vgic {
    /// A controller for `vcpus` vCPUs (1 to 8) after reset.
    #[must_use]
    pub const fn new(version: GicVersion, vcpus: u8) -> Self {
        Self {
            version,
            vcpus,
            busy: AtomicU8::new(0),
            ended: AtomicBool::new(false),
            state: SpinLock::new(State::new()),
        }
    }

    /// Makes it another controller, before anyone uses it.
    pub const fn configure(&mut self, version: GicVersion, vcpus: u8) {
        self.version = version;
        self.vcpus = vcpus;
    }

    /// Back to reset: nothing pending, nothing enabled. No vCPU is loaded.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        state.enabled = 0;
        for irqs in &mut state.private {
            *irqs = State::reset_private();
        }
        state.spis.fill(Irq::SPI);
        state.live_private = [0; VCPUS];
        state.live_spis.fill(0);
        state.live_words = 0;
        state.ended_spis.fill(0);
        self.ended.store(false, Ordering::Relaxed);
        self.busy.store(0, Ordering::Relaxed);
    }

    /// Sets the line of a device's interrupt. For an edge-triggered one a high line is a pulse.
    ///
    /// # Errors
    ///
    /// [`NoSuchInterrupt`].
    pub fn set_spi(&self, intid: u32, level: bool) -> Result<Kicks, NoSuchInterrupt> {
        let number = intid as usize;
        if !(PRIVATE..PRIVATE + SPIS).contains(&number) {
            return Err(NoSuchInterrupt(intid));
        }
        Ok(self.change(0, number, |irq| irq.set_line(level)))
    }

    /// Makes the line of a device's interrupt high until the guest has ended the interrupt, which
    /// [`Self::take_ended`] tells then.
    ///
    /// # Errors
    ///
    /// [`NoSuchInterrupt`].
    pub fn set_spi_until_end(&self, intid: u32) -> Result<Kicks, NoSuchInterrupt> {
        let number = intid as usize;
        if !(PRIVATE..PRIVATE + SPIS).contains(&number) {
            return Err(NoSuchInterrupt(intid));
        }
        Ok(self.change(0, number, Irq::set_line_until_end))
    }

    /// Whether [`Self::take_ended`] has something to tell.
    #[inline]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// An interrupt that the guest has ended since [`Self::set_spi_until_end`]. Each is told once.
    pub fn take_ended(&self) -> Option<u32> {
        if !self.has_ended() {
            return None;
        }
        let mut state = self.state.lock();
        let mut words = (32u32..).step_by(64).zip(&mut state.ended_spis);
        let first = words.find(|(_, word)| **word != 0).map(|(intid, word)| {
            let bit = word.trailing_zeros();
            *word &= *word - 1;
            intid + bit
        });
        let more = state.ended_spis.iter().any(|word| *word != 0);
        self.ended.store(more, Ordering::Relaxed);
        first
    }

    /// Remembers for the host that an interrupt is `done`.
    #[inline]
    fn note_end(&self, state: &mut State, number: usize, done: bool) {
        let spi = number.wrapping_sub(PRIVATE);
        if done && let Some(word) = state.ended_spis.get_mut(spi / 64) {
            *word |= 1 << (spi % 64);
            self.ended.store(true, Ordering::Relaxed);
        }
    }

    /// Sets the line of a private interrupt (16 to 31); others are ignored.
    pub fn set_ppi(&self, vcpu: usize, intid: u32, level: bool) -> Kicks {
        if vcpu >= usize::from(self.vcpus) || !(16..32).contains(&intid) {
            return Kicks::NONE;
        }
        self.change(vcpu, intid as usize, |irq| irq.set_line(level))
    }

    /// Sets the line of the virtual timer's interrupt; says whether it is asserted or active now: the
    /// physical one must not fire meanwhile. The caller, on whose core the vCPU is, loads it anew.
    #[must_use]
    pub fn set_timer(&self, vcpu: usize, level: bool) -> bool {
        let number = GUEST_TIMER_PPI as usize;
        let mut state = self.state.lock();
        let _: Kicks = self.change_in(&mut state, vcpu, number, |irq| irq.set_line(level));
        state.irq(vcpu, number).is_in_flight()
    }

    /// Whether an interrupt could be delivered to this vCPU: what ends its WFI. The guest's own
    /// priority mask is not looked at: it may wake for nothing, as the architecture allows.
    pub fn has_pending(&self, vcpu: usize) -> bool {
        if !self.is_busy(vcpu) {
            return false;
        }
        let state = self.state.lock();
        let deliverable = |number: usize| {
            let irq = state.irq(vcpu, number);
            let mine = number < PRIVATE || usize::from(irq.target(self.version)) == vcpu;
            mine && irq.is_deliverable(state.enabled)
        };
        state.live(vcpu).any(deliverable)
    }

    /// ICC_SGI1R_EL1 of a GICv3 guest: affinities are vCPU n = 0.0.0.n (IHI 0069H 12.2.19).
    #[inline]
    pub fn sgi1r(&self, from: usize, value: u64) -> Kicks {
        /// IRM: all but the sender.
        const ALL_OTHERS: u64 = 1 << 40;
        /// Aff3 (55:48), Aff2 (39:32), Aff1 (23:16), and RS (47:44): other clusters.
        const ELSEWHERE: u64 = 0x00ff_f0ff_00ff_0000;
        let number = (value >> 24 & 0xf) as usize;
        let list = value.to_le_bytes()[0];
        let targets = if value & ALL_OTHERS != 0 {
            !(1 << from)
        } else if value & ELSEWHERE != 0 {
            0
        } else {
            list
        };
        self.send_sgi(from, number, targets)
    }

    /// Makes an SGI pending on each vCPU of `targets`.
    fn send_sgi(&self, from: usize, number: usize, targets: u8) -> Kicks {
        let present = 0xff >> (VCPUS - usize::from(self.vcpus));
        let mut kicks = Kicks::NONE;
        for target in bits(u64::from(targets & present)) {
            let changed = self.change(target, number, |irq| irq.add_source(from));
            kicks.0 |= changed.0;
        }
        kicks
    }

    /// Changes one interrupt and says whom that concerns.
    fn change(&self, vcpu: usize, number: usize, change: impl FnOnce(&mut Irq)) -> Kicks {
        self.change_in(&mut self.state.lock(), vcpu, number, change)
    }

    #[inline]
    fn change_in(
        &self,
        state: &mut State,
        vcpu: usize,
        number: usize,
        change: impl FnOnce(&mut Irq),
    ) -> Kicks {
        let irq = state.irq_mut(vcpu, number);
        let before = *irq;
        change(irq);
        let after = *irq;
        if before == after {
            return Kicks::NONE;
        }
        let mut kicks = self.settle(state, vcpu, number, after);
        kicks.add(before.holder());
        kicks
    }

    /// An interrupt has changed: it is live or not, and so is its vCPU, which has to look at it.
    #[inline(always)] // Where it is called, what has changed is in registers.
    fn settle(&self, state: &mut State, vcpu: usize, number: usize, irq: Irq) -> Kicks {
        state.mark(vcpu, number, irq.is_live());
        let mut kicks = Kicks::NONE;
        let target = if number < PRIVATE {
            vcpu.to_le_bytes()[0]
        } else {
            irq.target(self.version)
        };
        if irq.is_live() && usize::from(target) < VCPUS {
            // No exchange: who writes it holds the lock.
            let busy = self.busy.load(Ordering::Relaxed) | 1 << target;
            self.busy.store(busy, Ordering::Release);
        }
        if irq.is_deliverable(state.enabled) {
            kicks.add(target);
        }
        kicks
    }

    #[inline]
    fn is_busy(&self, vcpu: usize) -> bool {
        self.busy.load(Ordering::Acquire) & 1 << vcpu != 0
    }
}

impl State {
    const fn new() -> Self {
        Self {
            enabled: 0,
            private: [Self::reset_private(); VCPUS],
            spis: [Irq::SPI; SPIS],
            live_private: [0; VCPUS],
            live_spis: [0; SPIS.div_ceil(64)],
            live_words: 0,
            ended_spis: [0; SPIS.div_ceil(64)],
        }
    }

    /// SGIs are edge-triggered and, in a GICv2, always enabled or not as the guest says.
    const fn reset_private() -> [Irq; PRIVATE] {
        let mut irqs = [Irq::PPI; PRIVATE];
        let mut number = 0;
        while number < 16 {
            irqs[number] = Irq::SGI;
            number += 1;
        }
        irqs
    }

    /// The interrupt; numbers beyond the last are that of the last.
    fn irq(&self, vcpu: usize, number: usize) -> &Irq {
        match number.checked_sub(PRIVATE) {
            None => &self.private[vcpu % VCPUS][number],
            Some(spi) => &self.spis[spi.min(SPIS - 1)],
        }
    }

    fn irq_mut(&mut self, vcpu: usize, number: usize) -> &mut Irq {
        match number.checked_sub(PRIVATE) {
            None => &mut self.private[vcpu % VCPUS][number],
            Some(spi) => &mut self.spis[spi.min(SPIS - 1)],
        }
    }

    fn mark(&mut self, vcpu: usize, number: usize, live: bool) {
        match number.checked_sub(PRIVATE) {
            None => set_bit32(&mut self.live_private[vcpu % VCPUS], number, live),
            Some(spi) => {
                let word = &mut self.live_spis[spi / 64];
                *word = *word & !(1 << (spi % 64)) | u64::from(live) << (spi % 64);
                let any = *word != 0;
                set_bit32(&mut self.live_words, spi / 64, any);
            }
        }
    }

    /// INTIDs that are pending or active: the vCPU's private ones, and all shared ones.
    fn live(&self, vcpu: usize) -> impl Iterator<Item = usize> {
        let private = bits(u64::from(self.live_private[vcpu % VCPUS]));
        let words = bits(u64::from(self.live_words));
        let spis = words.flat_map(|at| {
            let word = self.live_spis.get(at).copied().unwrap_or(0);
            bits(word).map(move |bit| PRIVATE + at * 64 + bit)
        });
        private.chain(spis)
    }
}

fn set_bit32(word: &mut u32, bit: usize, value: bool) {
    *word = *word & !(1 << bit) | u32::from(value) << bit;
}

/// Numbers of the bits that are set.
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(bit as usize)
    })
}
