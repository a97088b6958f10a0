//! List registers: what the hardware delivers while a vCPU runs.

use core::sync::atomic::Ordering;

use abi::GUEST_TIMER_PPI;

use super::irq::{Irq, NOBODY};
use super::{GicVersion, Kicks, PRIVATE, State, VCPUS, Vgic, bits};

/// Most list registers: GICv3 has at most 16, GICv2 (GIC-400) at most 64, of which we use 16.
const MAX_LISTS: usize = 16;

/// The virtual CPU interface of a vCPU: the values of GICH_* or ICH_* registers.
#[derive(Clone, Debug)]
pub struct CpuInterface {
    /// List registers, in the hardware's format.
    pub lists: [u64; MAX_LISTS],
    /// How many the hardware has.
    pub count: u8,
    /// How many are in use; the rest is zero.
    pub used: u8,
    /// GICH_HCR or ICH_HCR_EL2.
    pub hcr: u32,
    /// GICH_VMCR or ICH_VMCR_EL2.
    pub vmcr: u32,
    /// GICH_APR, or ICH_AP0R and ICH_AP1R.
    pub active_priorities: [[u32; 4]; 2],
    /// No register: whether the virtual timer's interrupt was asserted or active when the registers were
    /// taken back, or its line set: the physical one must not fire meanwhile.
    pub timer_in_flight: bool,
}

impl CpuInterface {
    /// As after reset, on hardware with `count` list registers.
    #[must_use]
    pub const fn new(count: u8) -> Self {
        Self {
            lists: [0; MAX_LISTS],
            count: if count > 16 { 16 } else { count },
            used: 0,
            hcr: HCR_EN,
            vmcr: 0,
            active_priorities: [[0; 4]; 2],
            timer_in_flight: false,
        }
    }
}

impl CpuInterface {
    /// The same as if it used all its list registers: who takes it back from the hardware empties them.
    #[must_use]
    pub const fn in_use(mut self) -> Self {
        self.used = self.count;
        self
    }

    /// As a core's reset leaves it: everything masked and nothing running (IHI 0069H, ICC_PMR_EL1 and
    /// `ICC_AP1R<n>_EL1`). An interrupt that is active stays so.
    pub const fn restart(&mut self) {
        self.vmcr = 0;
        self.active_priorities = [[0; 4]; 2];
    }

    /// Whether all list registers are in use.
    #[inline]
    const fn is_full(&self) -> bool {
        self.used >= self.count
    }

    /// Uses the next list register, if there is one.
    #[inline]
    fn push(&mut self, list: u64) {
        if let Some(place) = self.lists.get_mut(usize::from(self.used)) {
            *place = list;
            self.used += 1;
        }
    }

    /// Whether the registers that were read back have nothing to say: none was in use, and nothing
    /// was ended without one.
    #[inline]
    #[must_use]
    pub const fn shows_nothing(&self) -> bool {
        self.used == 0 && self.hcr >> HCR_EOI_COUNT == 0
    }

    /// Whether the registers that were read back show that the guest has ended `intid`. With a
    /// physical interrupt behind it, that one was deactivated by the hardware then.
    #[must_use]
    pub fn has_ended(&self, intid: u32, version: GicVersion) -> bool {
        let used = self.lists.get(..usize::from(self.used)).unwrap_or(&[]);
        for list in used {
            let (number, pending, active) = List::decode(*list, version);
            if number == intid as usize && !pending && !active {
                return true;
            }
        }
        false
    }
}

/// HCR: the interface is on.
const HCR_EN: u32 = 1;
/// HCR.UIE: maintenance interrupt when at most one list register is in use.
const HCR_UIE: u32 = 1 << 1;
/// HCR.LRENPIE: maintenance interrupt when an interrupt that is in no list register was ended.
const HCR_LRENPIE: u32 = 1 << 2;
/// HCR.EOIcount: how many such ends there were.
const HCR_EOI_COUNT: u32 = 27;

/// A list register, taken apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct List {
    pub(super) intid: u16,
    pub(super) pending: bool,
    pub(super) active: bool,
    pub(super) group1: bool,
    pub(super) priority: u8,
    /// Ends it in the physical controller, too: INTID there.
    pub(super) hardware: Option<u16>,
    /// Maintenance interrupt when the guest ends it.
    pub(super) tell_end: bool,
    /// GICv2: sender of an SGI.
    pub(super) source: u8,
}

impl List {
    #[inline]
    pub(super) fn encode(self, version: GicVersion) -> u64 {
        match version {
            GicVersion::V3 => self.encode_v3(),
            GicVersion::V2 => self.encode_v2(),
        }
    }

    /// ICH_LR<n>_EL2 (IHI 0069H 12.4.8).
    #[inline]
    fn encode_v3(self) -> u64 {
        let behind = match self.hardware {
            Some(physical) => 1 << 61 | u64::from(physical) << 32,
            None => u64::from(self.tell_end) << 41,
        };
        u64::from(self.active) << 63
            | u64::from(self.pending) << 62
            | u64::from(self.group1) << 60
            | u64::from(self.priority) << 48
            | behind
            | u64::from(self.intid)
    }

    /// GICH_LR<n> (IHI 0048B 5.3, table of the list register bits).
    #[inline(never)] // One of the two is never used on a machine.
    fn encode_v2(self) -> u64 {
        let behind = match self.hardware {
            Some(physical) => 1 << 31 | u64::from(physical) << 10,
            None => u64::from(self.tell_end) << 19 | u64::from(self.source & 7) << 10,
        };
        u64::from(self.group1) << 30
            | u64::from(self.active) << 29
            | u64::from(self.pending) << 28
            | u64::from(self.priority >> 3) << 23
            | behind
            | u64::from(self.intid)
    }

    /// INTID, and whether it is pending and active, of a register that was in use.
    fn decode(value: u64, version: GicVersion) -> (usize, bool, bool) {
        let state = match version {
            GicVersion::V3 => value >> 62,
            GicVersion::V2 => value >> 28,
        };
        let [low, high, ..] = value.to_le_bytes();
        let intid = usize::from(low) | usize::from(high & 3) << 8;
        (intid, state & 1 != 0, state & 2 != 0)
    }
}

impl Vgic {
    /// Puts what this vCPU must see into its list registers.
    #[inline]
    pub fn load(&self, vcpu: usize, interface: &mut CpuInterface) {
        interface.used = 0;
        interface.hcr = HCR_EN;
        if self.is_busy(vcpu) {
            self.load_live(vcpu, interface);
        }
    }

    #[inline(never)]
    fn load_live(&self, vcpu: usize, interface: &mut CpuInterface) {
        let mut state = self.state.lock();
        let state = &mut *state;
        // In any order: the hardware delivers by priority.
        if !self.load_private(state, vcpu, interface) || !self.load_shared(state, vcpu, interface) {
            self.load_chosen(state, vcpu, interface);
        }
        if interface.used == 0 && !state.has_live(vcpu, self.version) {
            let busy = self.busy.load(Ordering::Relaxed) & !(1 << vcpu);
            self.busy.store(busy, Ordering::Release);
        }
    }

    /// The vCPU's own interrupts into list registers; says whether there were enough.
    #[inline]
    fn load_private(&self, state: &mut State, vcpu: usize, interface: &mut CpuInterface) -> bool {
        let groups = state.enabled;
        let irqs = &mut state.private[vcpu % VCPUS];
        for number in bits(state.live_private[vcpu % VCPUS].into()) {
            let Some(irq) = irqs.get_mut(number).filter(|irq| irq.is_for_list(groups)) else {
                continue;
            };
            if interface.is_full() {
                return false;
            }
            interface.push(self.place(irq, vcpu, number, groups));
        }
        true
    }

    /// The same for shared interrupts that go to this vCPU.
    #[inline]
    fn load_shared(&self, state: &mut State, vcpu: usize, interface: &mut CpuInterface) -> bool {
        state.live_words == 0 || self.load_some_shared(state, vcpu, interface)
    }

    #[inline(never)]
    fn load_some_shared(
        &self,
        state: &mut State,
        vcpu: usize,
        interface: &mut CpuInterface,
    ) -> bool {
        let groups = state.enabled;
        for at in bits(state.live_words.into()) {
            let word = state.live_spis.get(at).copied().unwrap_or(0);
            for number in bits(word).map(|bit| PRIVATE + at * 64 + bit) {
                let irq = state.irq_mut(vcpu, number);
                if usize::from(irq.target(self.version)) != vcpu || !irq.is_for_list(groups) {
                    continue;
                }
                if interface.is_full() {
                    return false;
                }
                interface.push(self.place(irq, vcpu, number, groups));
            }
        }
        true
    }

    /// There are more interrupts than registers: those that are in one come back as they went, and the most
    /// urgent of all go, with maintenance for the others.
    #[cold]
    #[inline(never)]
    fn load_chosen(&self, state: &mut State, vcpu: usize, interface: &mut CpuInterface) {
        for list in interface.lists.iter().take(usize::from(interface.used)) {
            let (number, pending, active) = List::decode(*list, self.version);
            let irq = state.irq_mut(vcpu, number);
            irq.release(pending, active, self.version);
        }
        interface.used = 0;
        let mut chosen = [(0u16, 0u16); MAX_LISTS];
        let room = interface.count;
        let (count, all, left_active) = self.choose(state, vcpu, room, &mut chosen);
        if !all {
            interface.hcr |= HCR_UIE;
        }
        if left_active {
            interface.hcr |= HCR_LRENPIE;
        }
        let groups = state.enabled;
        for (_, number) in chosen.iter().take(count) {
            let number = usize::from(*number);
            let irq = state.irq_mut(vcpu, number);
            interface.push(self.place(irq, vcpu, number, groups));
        }
    }

    /// The interrupts for the list registers, sorted; whether all are among them, and whether an
    /// active one is not.
    fn choose(
        &self,
        state: &State,
        vcpu: usize,
        room: u8,
        chosen: &mut [(u16, u16); 16],
    ) -> (usize, bool, bool) {
        let (mut count, mut all, mut left_active) = (0, true, false);
        let room = usize::from(room).min(chosen.len());
        for number in state.live(vcpu) {
            let irq = state.irq(vcpu, number);
            if !self.concerns(irq, vcpu, number, state.enabled) {
                continue;
            }
            // Active ones first: the guest may end them at any time.
            let urgency = u16::from(irq.priority()) | u16::from(!irq.is_active()) << 8;
            let entry = (urgency, number.to_le_bytes16());
            let at = chosen[..count].partition_point(|other| *other <= entry);
            if count == room {
                all = false;
                let dropped = if at == count {
                    entry
                } else {
                    chosen[count - 1]
                };
                left_active |= dropped.0 < 0x100;
                if at == count {
                    continue;
                }
                count -= 1;
            }
            chosen.copy_within(at..count, at + 1);
            chosen[at] = entry;
            count += 1;
        }
        (count, all, left_active)
    }

    /// Whether this interrupt belongs into a list register of this vCPU now.
    fn concerns(&self, irq: &Irq, vcpu: usize, number: usize, groups: u8) -> bool {
        let mine = number < PRIVATE || usize::from(irq.target(self.version)) == vcpu;
        mine && irq.is_for_list(groups)
    }

    /// Makes an interrupt's list register.
    #[inline(never)] // From several places; not short.
    fn place(&self, irq: &mut Irq, vcpu: usize, number: usize, groups: u8) -> u64 {
        let hardware = (number == GUEST_TIMER_PPI as usize).then_some(number.to_le_bytes16());
        let again = irq.is_pending() && irq.may_signal(groups);
        // A level that is still high is seen again when the guest ends the interrupt; a pending
        // and active one would be delivered twice.
        let other_sender = self.version == GicVersion::V2 && irq.sources() != 0;
        let pending = again && (!irq.is_active() || (irq.is_edge() && !other_sender));
        let list = List {
            intid: number.to_le_bytes16(),
            pending,
            active: irq.is_active(),
            group1: irq.is_group1(),
            priority: irq.priority(),
            hardware,
            tell_end: false,
            source: irq.next_source(),
        };
        if pending {
            irq.take(vcpu.to_le_bytes()[0], self.version);
        } else {
            irq.hold(vcpu.to_le_bytes()[0]);
        }
        let tell_end = irq.wants_end();
        List { tell_end, ..list }.encode(self.version)
    }

    /// Takes back what the list registers say after the vCPU has left the guest.
    pub fn save(&self, vcpu: usize, interface: &mut CpuInterface) -> Kicks {
        let ended = interface.hcr >> HCR_EOI_COUNT;
        if interface.shows_nothing() {
            return Kicks::NONE;
        }
        let mut state = self.state.lock();
        let state = &mut *state;
        // First what was ended without a list register: what is in one is not among it.
        let mut kicks = if ended == 0 {
            Kicks::NONE
        } else {
            self.end_elsewhere(state, vcpu, ended)
        };
        let version = self.version;
        for list in interface.lists.iter().take(usize::from(interface.used)) {
            let (number, pending, active) = List::decode(*list, version);
            let irq = state.irq_mut(vcpu, number);
            irq.release(pending, active, version);
            let done = !pending && irq.lower_at_end();
            let irq = *irq;
            kicks.0 |= self.settle(state, vcpu, number, irq).0;
            self.note_end(state, number, done);
        }
        interface.timer_in_flight = state.irq(vcpu, GUEST_TIMER_PPI as usize).is_in_flight();
        // Itself it does not concern: it loads again before it runs.
        kicks.0 &= !(1 << vcpu);
        kicks
    }

    /// Ends the most urgent ones of those that are active in no list register.
    #[cold]
    #[inline(never)]
    fn end_elsewhere(&self, state: &mut State, vcpu: usize, count: u32) -> Kicks {
        let mut kicks = Kicks::NONE;
        for _ in 0..count {
            let Some(number) = state.most_urgent_active(vcpu, self.version) else {
                break;
            };
            let irq = state.irq_mut(vcpu, number);
            irq.set_active(false);
            let done = irq.lower_at_end();
            let irq = *irq;
            kicks.0 |= self.settle(state, vcpu, number, irq).0;
            self.note_end(state, number, done);
        }
        kicks
    }
}

impl State {
    /// Whether anything is left that this vCPU may get.
    fn has_live(&self, vcpu: usize, version: GicVersion) -> bool {
        self.live(vcpu).any(|number| {
            number < PRIVATE || usize::from(self.irq(vcpu, number).target(version)) == vcpu
        })
    }

    /// The active interrupt that an EOI without a list register ends (IHI 0069H 4.8: the one with
    /// the highest priority).
    fn most_urgent_active(&self, vcpu: usize, version: GicVersion) -> Option<usize> {
        let mine = |number: &usize| {
            let irq = self.irq(vcpu, *number);
            let here = *number < PRIVATE || usize::from(irq.target(version)) == vcpu;
            here && irq.is_active() && irq.holder() == NOBODY
        };
        let active = self.live(vcpu).filter(mine);
        active.min_by_key(|number| self.irq(vcpu, *number).priority())
    }
}

/// INTIDs have ten bits.
trait Narrow {
    fn to_le_bytes16(self) -> u16;
}

impl Narrow for usize {
    fn to_le_bytes16(self) -> u16 {
        let [low, high, ..] = self.to_le_bytes();
        u16::from_le_bytes([low, high])
    }
}
