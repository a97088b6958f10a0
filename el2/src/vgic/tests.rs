//! Behaviour, hand-typed values, and a model of the hardware's list registers as the oracle.

use proptest::prelude::*;
use std::vec::Vec;

use super::*;

const V2: GicVersion = GicVersion::V2;
const V3: GicVersion = GicVersion::V3;

/// What hardware does with list registers: a guest that acknowledges and ends interrupts.
struct Cpu {
    index: usize,
    version: GicVersion,
    interface: CpuInterface,
}

impl Cpu {
    fn new(index: usize, version: GicVersion, lists: u8) -> Self {
        Self {
            index,
            version,
            interface: CpuInterface::new(lists),
        }
    }

    fn state_shift(&self) -> u32 {
        if self.version == V3 { 62 } else { 28 }
    }

    fn priority(&self, list: u64) -> u64 {
        match self.version {
            GicVersion::V3 => list >> 48 & 0xff,
            GicVersion::V2 => (list >> 23 & 0x1f) << 3,
        }
    }

    /// Loads, and acknowledges the most urgent pending interrupt, if there is one.
    fn acknowledge(&mut self, vgic: &Vgic) -> Option<u32> {
        vgic.load(self.index, &mut self.interface);
        let intid = self.take();
        let _: Kicks = vgic.save(self.index, &mut self.interface);
        intid
    }

    /// Acknowledges the most urgent pending interrupt in a list register, if there is one.
    fn take(&mut self) -> Option<u32> {
        let shift = self.state_shift();
        let used = usize::from(self.interface.used);
        let lists = &self.interface.lists[..used];
        let pending = lists.iter().enumerate();
        let pending = pending.filter(|(_, list)| **list >> shift & 3 == 1);
        let best = pending.min_by_key(|(_, list)| self.priority(**list));
        let best = best.map(|(at, _)| at)?;
        let list = &mut self.interface.lists[best];
        *list ^= 3 << shift;
        Some((*list & 0x3ff) as u32)
    }

    /// Loads, and ends an interrupt.
    fn end(&mut self, vgic: &Vgic, intid: u32) {
        vgic.load(self.index, &mut self.interface);
        self.finish(intid);
        let _: Kicks = vgic.save(self.index, &mut self.interface);
    }

    /// Ends an interrupt: in its list register, or counted if it is in none.
    fn finish(&mut self, intid: u32) {
        let shift = self.state_shift();
        let used = usize::from(self.interface.used);
        let mut lists = self.interface.lists[..used].iter_mut();
        match lists.find(|list| (**list & 0x3ff) as u32 == intid && **list >> shift & 2 != 0) {
            Some(list) => *list &= !(2 << shift),
            None => self.interface.hcr += 1 << 27,
        }
    }

    /// Leaves what is not acknowledged where it is.
    fn pass(&mut self, vgic: &Vgic) {
        vgic.load(self.index, &mut self.interface);
        let _: Kicks = vgic.save(self.index, &mut self.interface);
    }
}

/// A distributor with both groups on and all interrupts enabled.
fn enabled(version: GicVersion, vcpus: u8) -> Vgic {
    let vgic = Vgic::new(version, vcpus);
    let _: Kicks = vgic.dist_write(0, 0, 4, 3);
    for word in 0..32u64 {
        let _: Kicks = vgic.dist_write(0, 0x100 + 4 * word, 4, 0xffff_ffff);
    }
    for vcpu in 0..usize::from(vcpus) {
        let offset = if version == V3 { 0x1_0100 } else { 0x100 };
        let _: Kicks = match version {
            GicVersion::V3 => vgic.redist_write(vcpu, offset, 4, 0xffff_ffff),
            GicVersion::V2 => vgic.dist_write(vcpu, offset, 4, 0xffff_ffff),
        };
    }
    if version == V2 {
        for spi in 32..1020u64 {
            let _: Kicks = vgic.dist_write(0, 0x800 + spi, 1, 1);
        }
    }
    vgic
}

fn kicked(kicks: Kicks) -> Vec<usize> {
    kicks.iter().collect()
}

#[test]
fn a_level_interrupt_comes_again_until_its_line_is_low() {
    for version in [V2, V3] {
        let vgic = enabled(version, 1);
        let mut cpu = Cpu::new(0, version, 4);
        assert_eq!(kicked(vgic.set_spi(33, true).unwrap()), [0]);
        assert!(vgic.has_pending(0));
        assert_eq!(cpu.acknowledge(&vgic), Some(33));
        assert!(!vgic.has_pending(0), "active interrupts wake nobody");
        assert_eq!(cpu.acknowledge(&vgic), None);
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), Some(33));
        let _: Kicks = vgic.set_spi(33, false).unwrap();
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), None);
        assert!(!vgic.has_pending(0));
    }
}

#[test]
fn a_private_interrupts_trigger_is_fixed_and_the_timer_stays_in_flight() {
    for version in [V2, V3] {
        let vgic = enabled(version, 1);
        let mut cpu = Cpu::new(0, version, 4);
        let all_edges = 0xffff_ffff;
        let _: Kicks = match version {
            V3 => vgic.redist_write(0, 0x1_0c04, 4, all_edges),
            V2 => vgic.dist_write(0, 0xc04, 4, all_edges),
        };
        assert!(vgic.set_timer(0, true), "the physical one must not fire");
        assert_eq!(cpu.acknowledge(&vgic), Some(27));
        assert!(vgic.set_timer(0, false), "active");
        cpu.end(&vgic, 27);
        assert!(!vgic.set_timer(0, false));
        // Shared ones have the trigger that the guest chooses.
        let _: Kicks = vgic.dist_write(0, 0xc08, 4, 2);
        assert_eq!(vgic.dist_read(0, 0xc08, 4) & 3, 2);
    }
}

/// Arm IHI 0048B 4.3.7, GICD_ISPENDR: an active interrupt becomes active and pending, whatever its
/// trigger; acknowledging serves what was pending before.
#[test]
fn what_a_guest_asks_for_while_a_level_interrupt_is_active_comes_behind_its_end() {
    for version in [V2, V3] {
        let vgic = enabled(version, 1);
        let mut cpu = Cpu::new(0, version, 4);
        let _: Kicks = vgic.set_spi(33, true).unwrap();
        assert_eq!(cpu.acknowledge(&vgic), Some(33));
        let _: Kicks = vgic.set_spi(33, false).unwrap();
        let _: Kicks = vgic.dist_write(0, 0x204, 4, 1 << 1);
        for _ in 0..2 {
            cpu.pass(&vgic);
            assert_eq!(vgic.dist_read(0, 0x204, 4), 1 << 1);
        }
        vgic.load(0, &mut cpu.interface);
        let tells = if version == V3 { 41 } else { 19 };
        assert_eq!(
            cpu.interface.lists[0] >> tells & 1,
            1,
            "EL2 hears of the end"
        );
        let _: Kicks = vgic.save(0, &mut cpu.interface);
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), Some(33));
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), None);
        assert_eq!(vgic.dist_read(0, 0x204, 4), 0);
    }
}

/// GICD_ISPENDR, GICD_ICPENDR and GICD_ICACTIVER of INTID 33, as another vCPU writes them.
fn asks(vgic: &Vgic, offset: u64) {
    let kicks = vgic.dist_write(1, offset + 4, 4, 1 << 1);
    assert!(kicks.iter().all(|vcpu| vcpu == 0), "{kicks:?}");
}
const SET_PENDING: u64 = 0x200;
const CLEAR_PENDING: u64 = 0x280;
const CLEAR_ACTIVE: u64 = 0x380;

/// Level-triggered or not, with its line high before or its own request: what another vCPU asks for
/// behind the acknowledgement is delivered behind the end.
#[test]
fn a_request_between_acknowledgement_and_save_is_not_lost() {
    for (version, edge, by_line) in [
        (V2, false, false),
        (V2, false, true),
        (V2, true, false),
        (V3, false, false),
        (V3, false, true),
        (V3, true, false),
    ] {
        let vgic = enabled(version, 2);
        let mut cpu = Cpu::new(0, version, 4);
        let _: Kicks = vgic.dist_write(0, 0xc08, 4, u64::from(edge) << 3);
        if by_line {
            let _: Kicks = vgic.set_spi(33, true).unwrap();
        } else {
            asks(&vgic, SET_PENDING);
        }
        vgic.load(0, &mut cpu.interface);
        let _: Kicks = vgic.set_spi(33, false).unwrap();
        assert_eq!(cpu.take(), Some(33));
        asks(&vgic, SET_PENDING);
        let _: Kicks = vgic.save(0, &mut cpu.interface);
        assert_eq!(cpu.acknowledge(&vgic), None, "still active");
        cpu.end(&vgic, 33);
        assert_eq!(
            cpu.acknowledge(&vgic),
            Some(33),
            "{version:?} {edge} {by_line}"
        );
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), None);
    }
}

#[test]
fn a_withdrawal_while_it_is_in_a_list_register_counts() {
    for (version, edge) in [(V2, false), (V2, true), (V3, false), (V3, true)] {
        let vgic = enabled(version, 2);
        let mut cpu = Cpu::new(0, version, 4);
        let _: Kicks = vgic.dist_write(0, 0xc08, 4, u64::from(edge) << 3);
        asks(&vgic, SET_PENDING);
        vgic.load(0, &mut cpu.interface);
        asks(&vgic, CLEAR_PENDING);
        let _: Kicks = vgic.save(0, &mut cpu.interface);
        assert!(!vgic.has_pending(0), "{version:?} {edge}");
        assert_eq!(cpu.acknowledge(&vgic), None);
        // It is forgotten with the register: the next one comes and goes as ever.
        asks(&vgic, SET_PENDING);
        assert_eq!(cpu.acknowledge(&vgic), Some(33));
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), None);
    }
}

#[test]
fn another_vcpus_end_of_an_active_interrupt_counts_and_keeps_its_request() {
    for (version, edge) in [(V2, false), (V2, true), (V3, false), (V3, true)] {
        let vgic = enabled(version, 2);
        let mut cpu = Cpu::new(0, version, 4);
        let _: Kicks = vgic.dist_write(0, 0xc08, 4, u64::from(edge) << 3);
        asks(&vgic, SET_PENDING);
        assert_eq!(cpu.acknowledge(&vgic), Some(33));
        asks(&vgic, SET_PENDING);
        vgic.load(0, &mut cpu.interface);
        asks(&vgic, CLEAR_ACTIVE);
        let _: Kicks = vgic.save(0, &mut cpu.interface);
        assert_eq!(vgic.dist_read(0, 0x304, 4), 0, "{version:?} {edge}");
        assert_eq!(cpu.acknowledge(&vgic), Some(33), "{version:?} {edge}");
        cpu.end(&vgic, 33);
        assert_eq!(cpu.acknowledge(&vgic), None);
    }
}

#[test]
fn a_line_that_is_high_until_the_end_is_delivered_once_and_told_once() {
    for version in [V2, V3] {
        let vgic = enabled(version, 1);
        let mut cpu = Cpu::new(0, version, 4);
        for _ in 0..2 {
            assert_eq!(kicked(vgic.set_spi_until_end(900).unwrap()), [0]);
            assert_eq!(vgic.take_ended(), None);
            assert_eq!(cpu.acknowledge(&vgic), Some(900));
            vgic.load(0, &mut cpu.interface);
            let _: Kicks = vgic.save(0, &mut cpu.interface);
            assert_eq!(vgic.take_ended(), None, "active, not ended");
            cpu.end(&vgic, 900);
            assert_eq!(vgic.take_ended(), Some(900));
            assert_eq!(vgic.take_ended(), None);
            assert_eq!(cpu.acknowledge(&vgic), None);
        }
        assert!(vgic.set_spi_until_end(31).is_err());
        assert!(vgic.set_spi_until_end(1020).is_err());
    }
}

#[test]
fn several_ends_are_told_one_by_one_and_a_reset_forgets_them() {
    let vgic = enabled(V3, 1);
    let mut cpu = Cpu::new(0, V3, 4);
    for round in 0..2 {
        for spi in [40, 33] {
            let _: Kicks = vgic.set_spi_until_end(spi).unwrap();
        }
        while let Some(spi) = cpu.acknowledge(&vgic) {
            cpu.end(&vgic, spi);
        }
        if round == 1 {
            vgic.reset();
            assert_eq!(vgic.take_ended(), None);
        } else {
            assert_eq!(vgic.take_ended(), Some(33));
            assert_eq!(vgic.take_ended(), Some(40));
        }
    }
}

#[test]
fn an_edge_while_active_is_delivered_once_more() {
    let vgic = enabled(V3, 1);
    let mut cpu = Cpu::new(0, V3, 4);
    let _: Kicks = vgic.dist_write(0, 0xc08, 4, 2 << 2);
    let _: Kicks = vgic.set_spi(33, true).unwrap();
    assert_eq!(cpu.acknowledge(&vgic), Some(33));
    for _ in 0..3 {
        let _: Kicks = vgic.set_spi(33, true).unwrap();
        let _: Kicks = vgic.set_spi(33, false).unwrap();
    }
    cpu.end(&vgic, 33);
    assert_eq!(cpu.acknowledge(&vgic), Some(33));
    cpu.end(&vgic, 33);
    assert_eq!(cpu.acknowledge(&vgic), None);
}

#[test]
fn more_pending_than_list_registers_are_all_delivered_by_priority() {
    for version in [V2, V3] {
        let vgic = enabled(version, 1);
        let mut cpu = Cpu::new(0, version, 4);
        for spi in 40..60u32 {
            let priority = u64::from(60 - spi) * 8;
            let _: Kicks = vgic.dist_write(0, 0x400 + u64::from(spi), 1, priority);
            let _: Kicks = vgic.set_spi(spi, true).unwrap();
        }
        vgic.load(0, &mut cpu.interface);
        assert_eq!((cpu.interface.used, cpu.interface.hcr & 2), (4, 2));
        let _: Kicks = vgic.save(0, &mut cpu.interface);
        let mut order = Vec::new();
        while let Some(intid) = cpu.acknowledge(&vgic) {
            let _: Kicks = vgic.set_spi(intid, false).unwrap();
            cpu.end(&vgic, intid);
            order.push(intid);
        }
        assert_eq!(order, (40..60).rev().collect::<Vec<u32>>());
        vgic.load(0, &mut cpu.interface);
        assert_eq!(cpu.interface.hcr & 2, 0, "nothing waits any more");
    }
}

#[test]
fn intids_above_255_are_routed_configured_and_delivered() {
    let vgic = enabled(V3, 2);
    for intid in [256u32, 511, 1019] {
        let router = 0x6000 + 8 * u64::from(intid);
        assert_eq!(kicked(vgic.dist_write(0, router, 8, 1)), [0usize; 0]);
        assert_eq!(vgic.dist_read(0, router, 8), 1);
        assert_eq!(kicked(vgic.set_spi(intid, true).unwrap()), [1]);
        assert_eq!(Cpu::new(1, V3, 4).acknowledge(&vgic), Some(intid));
        let _: Kicks = vgic.set_spi(intid, false).unwrap();
    }
    assert_eq!(vgic.set_spi(1020, true), Err(NoSuchInterrupt(1020)));
    assert_eq!(vgic.set_spi(31, true), Err(NoSuchInterrupt(31)));
}

#[test]
fn sgis_of_a_gicv2_carry_their_sender_and_come_one_by_one() {
    let vgic = enabled(V2, 4);
    // Filter "list": SGI 5 to CPU 1, from CPUs 0, 3 and 1 itself.
    for from in [3, 0, 1] {
        assert_eq!(kicked(vgic.dist_write(from, 0xf00, 4, 1 << 17 | 5)), [1]);
    }
    let mut cpu = Cpu::new(1, V2, 4);
    let mut senders = Vec::new();
    for _ in 0..3 {
        vgic.load(1, &mut cpu.interface);
        senders.push(cpu.interface.lists[0] >> 10 & 7);
        let _: Kicks = vgic.save(1, &mut cpu.interface);
        assert_eq!(cpu.acknowledge(&vgic), Some(5));
        cpu.end(&vgic, 5);
    }
    assert_eq!(senders, [0, 1, 3]);
    assert_eq!(cpu.acknowledge(&vgic), None);
}

#[test]
fn a_gicv2_reads_and_clears_pending_senders() {
    let vgic = enabled(V2, 2);
    let _: Kicks = vgic.dist_write(1, 0xf00, 4, 1 << 16 | 2);
    assert_eq!(vgic.dist_read(0, 0xf12, 1), 2);
    assert_eq!(vgic.dist_read(0, 0x200, 4), 1 << 2);
    let _: Kicks = vgic.dist_write(0, 0xf12, 1, 2);
    assert_eq!(vgic.dist_read(0, 0x200, 4), 0);
    let _: Kicks = vgic.dist_write(0, 0xf22, 1, 1);
    assert_eq!(Cpu::new(0, V2, 4).acknowledge(&vgic), Some(2));
}

#[test]
fn sgi1r_reaches_a_list_or_all_others_and_no_other_cluster() {
    let vgic = enabled(V3, 4);
    assert_eq!(kicked(vgic.sgi1r(0, 7 << 24 | 0b1010)), [1, 3]);
    assert_eq!(kicked(vgic.sgi1r(2, 1 << 40 | 3 << 24)), [0, 1, 3]);
    assert_eq!(kicked(vgic.sgi1r(0, 7 << 24 | 1 << 16 | 1)), [0usize; 0]);
    assert_eq!(kicked(vgic.sgi1r(0, 7 << 24 | 1 << 44 | 1)), [0usize; 0]);
    let mut cpu = Cpu::new(1, V3, 4);
    assert_eq!(cpu.acknowledge(&vgic), Some(3));
    assert_eq!(cpu.acknowledge(&vgic), Some(7));
}

#[test]
fn an_sgi_to_oneself_is_delivered() {
    let vgic = enabled(V3, 1);
    let _: Kicks = vgic.sgi1r(0, 9 << 24 | 1);
    let mut cpu = Cpu::new(0, V3, 4);
    assert_eq!(cpu.acknowledge(&vgic), Some(9));
    let _: Kicks = vgic.sgi1r(0, 9 << 24 | 1);
    cpu.end(&vgic, 9);
    assert_eq!(cpu.acknowledge(&vgic), Some(9));
}

#[test]
fn the_timers_interrupt_is_backed_by_the_physical_one() {
    let vgic = enabled(V3, 1);
    let _: Kicks = vgic.set_ppi(0, 27, true);
    assert!(vgic.has_pending(0));
    let mut cpu = Cpu::new(0, V3, 4);
    vgic.load(0, &mut cpu.interface);
    // Pending, HW, physical INTID 27, virtual INTID 27.
    assert_eq!(cpu.interface.lists[0], 1 << 62 | 1 << 61 | 27 << 32 | 27);
    let _: Kicks = vgic.save(0, &mut cpu.interface);
    assert_eq!(cpu.acknowledge(&vgic), Some(27));
    let _: Kicks = vgic.set_ppi(0, 27, false);
    assert!(cpu.interface.timer_in_flight, "active");
    cpu.end(&vgic, 27);
    assert!(!cpu.interface.timer_in_flight && !vgic.has_pending(0));
}

#[test]
fn the_timers_interrupt_is_in_flight_while_its_line_is_high_or_it_is_active() {
    let vgic = enabled(V3, 1);
    assert!(vgic.set_timer(0, true));
    let mut cpu = Cpu::new(0, V3, 4);
    assert_eq!(cpu.acknowledge(&vgic), Some(27));
    assert!(cpu.interface.timer_in_flight && vgic.set_timer(0, false));
    cpu.end(&vgic, 27);
    assert!(!cpu.interface.timer_in_flight && !vgic.set_timer(0, false));
}

#[test]
fn list_registers_tell_that_the_timers_interrupt_was_ended() {
    for version in [V2, V3] {
        let vgic = enabled(version, 1);
        let mut cpu = Cpu::new(0, version, 4);
        assert!(!cpu.interface.has_ended(27, version), "nothing was loaded");
        let _: Kicks = vgic.set_ppi(0, 27, true);
        vgic.load(0, &mut cpu.interface);
        assert!(!cpu.interface.has_ended(27, version), "pending");
        let shift = cpu.state_shift();
        cpu.interface.lists[0] ^= 3 << shift;
        assert!(!cpu.interface.has_ended(27, version), "active");
        cpu.interface.lists[0] &= !(3 << shift);
        assert!(cpu.interface.has_ended(27, version));
        assert!(!cpu.interface.has_ended(30, version), "another");
    }
}

#[test]
fn eoi_of_an_interrupt_without_a_list_register_is_counted_and_ends_it() {
    let vgic = enabled(V3, 1);
    let mut cpu = Cpu::new(0, V3, 1);
    for (spi, priority) in [(40u64, 0x80u64), (41, 0x40)] {
        let _: Kicks = vgic.dist_write(0, 0x400 + spi, 1, priority);
    }
    let _: Kicks = vgic.set_spi(40, true).unwrap();
    assert_eq!(cpu.acknowledge(&vgic), Some(40));
    // Made active by the guest, so both are active, with room for one.
    let _: Kicks = vgic.dist_write(0, 0x304, 4, 1 << 9);
    vgic.load(0, &mut cpu.interface);
    assert_eq!(cpu.interface.hcr & 4, 4);
    let _: Kicks = vgic.save(0, &mut cpu.interface);
    let _: Kicks = vgic.set_spi(40, false).unwrap();
    cpu.end(&vgic, 40);
    assert_eq!(vgic.dist_read(0, 0x304, 4), 1 << 9);
}

#[test]
fn a_disabled_or_moved_interrupt_kicks_who_holds_it() {
    let vgic = enabled(V3, 2);
    let _: Kicks = vgic.set_spi(50, true).unwrap();
    let mut cpu = Cpu::new(0, V3, 4);
    vgic.load(0, &mut cpu.interface);
    assert_eq!(cpu.interface.used, 1);
    assert_eq!(kicked(vgic.dist_write(1, 0x184, 4, 1 << 18)), [0]);
    let _: Kicks = vgic.dist_write(1, 0x104, 4, 1 << 18);
    assert_eq!(kicked(vgic.dist_write(1, 0x6000 + 8 * 50, 8, 1)), [0, 1]);
    assert_eq!(kicked(vgic.save(0, &mut cpu.interface)), [1]);
    vgic.load(0, &mut cpu.interface);
    assert_eq!(cpu.interface.used, 0);
    assert_eq!(Cpu::new(1, V3, 4).acknowledge(&vgic), Some(50));
}

#[test]
fn registers_read_as_the_manuals_say() {
    let vgic = Vgic::new(V3, 4);
    assert_eq!(vgic.dist_read(0, 0, 4), 0x50);
    assert_eq!(vgic.dist_read(0, 4, 4), 31 | 9 << 19);
    assert_eq!(vgic.dist_read(0, 0xffe8, 4), 0x3b);
    assert_eq!(vgic.redist_read(3, 8, 8), 3 << 32 | 3 << 8 | 1 << 4);
    assert_eq!(vgic.redist_read(2, 8, 8), 2 << 32 | 2 << 8);
    assert_eq!(vgic.redist_read(2, 12, 4), 2);
    assert_eq!(vgic.redist_read(0, 0x14, 4), 0);
    assert_eq!(vgic.redist_read(0, 0xffe8, 4), 0x3b);
    let vgic = Vgic::new(V2, 4);
    assert_eq!(vgic.dist_read(0, 0, 4), 0);
    assert_eq!(vgic.dist_read(0, 4, 4), 31 | 3 << 5);
    assert_eq!(vgic.dist_read(2, 0x800, 4), 0x0404_0404);
    assert_eq!(vgic.dist_read(0, 0xfe8, 4), 0x2b);
    // SGIs are edge-triggered, and nothing changes that.
    let _: Kicks = vgic.dist_write(0, 0xc00, 4, 0);
    assert_eq!(vgic.dist_read(0, 0xc00, 4), 0xaaaa_aaaa);
}

#[test]
fn priorities_have_five_bits_and_byte_access() {
    let vgic = Vgic::new(V2, 1);
    let _: Kicks = vgic.dist_write(0, 0x421, 1, 0xff);
    assert_eq!(vgic.dist_read(0, 0x420, 4), 0xf800);
    let _: Kicks = vgic.dist_write(0, 0x420, 4, 0x1020_30a7);
    assert_eq!(vgic.dist_read(0, 0x420, 4), 0x1020_30a0);
}

#[test]
fn gicv2_targets_are_masked_to_the_vcpus_there_are() {
    let vgic = enabled(V2, 2);
    let _: Kicks = vgic.dist_write(0, 0x820, 4, 0xffff_ffff);
    assert_eq!(vgic.dist_read(0, 0x820, 4), 0x0303_0303);
    let _: Kicks = vgic.dist_write(0, 0x820, 1, 0);
    assert_eq!(kicked(vgic.set_spi(32, true).unwrap()), [0usize; 0]);
}

#[test]
fn a_core_that_is_turned_on_again_runs_no_interrupt() {
    let mut interface = CpuInterface::new(4);
    interface.vmcr = 0xf80f_0003;
    interface.active_priorities = [[1; 4], [2; 4]];
    interface.restart();
    assert_eq!((interface.vmcr, interface.count), (0, 4));
    assert_eq!(interface.active_priorities, [[0; 4]; 2]);
}

#[test]
fn reset_forgets_everything() {
    let vgic = enabled(V3, 2);
    let _: Kicks = vgic.set_spi(99, true).unwrap();
    let _: Kicks = vgic.sgi1r(0, 1 << 40);
    vgic.reset();
    assert!(!vgic.has_pending(0) && !vgic.has_pending(1));
    assert_eq!(vgic.dist_read(0, 0, 4), 0x50);
    assert_eq!(vgic.dist_read(0, 0x10c, 4), 0);
}

#[test]
fn it_fits_the_pages_that_a_vm_reserves_for_it() {
    assert!(size_of::<Vgic>() <= 8192, "{}", size_of::<Vgic>());
}

#[test]
fn list_registers_are_those_of_the_manuals() {
    let list = lists::List {
        intid: 300,
        pending: true,
        active: true,
        group1: true,
        priority: 0xa0,
        hardware: None,
        tell_end: true,
        source: 5,
    };
    let v3 = 3 << 62 | 1 << 60 | 0xa0 << 48 | 1 << 41 | 300;
    assert_eq!(list.encode(V3), v3);
    assert_eq!(
        list.encode(V2),
        1 << 30 | 3 << 28 | 0x14 << 23 | 1 << 19 | 5 << 10 | 300
    );
    let backed = lists::List {
        hardware: Some(27),
        ..list
    };
    assert_eq!(backed.encode(V2) >> 10 & 0x3ff, 27);
    assert_eq!(backed.encode(V2) >> 31 & 1, 1);
}

/// What a step of the random test does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Line(u32, bool),
    Sgi(usize, usize, u32),
    Acknowledge(usize),
    End(usize),
    Pass(usize),
    Enable(u32, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (32u32..40, any::<bool>()).prop_map(|(i, l)| Step::Line(i, l)),
        (0usize..2, 0usize..2, 0u32..4).prop_map(|(f, t, i)| Step::Sgi(f, t, i)),
        (0usize..2).prop_map(Step::Acknowledge),
        (0usize..2).prop_map(Step::End),
        (0usize..2).prop_map(Step::Pass),
        (32u32..40, any::<bool>()).prop_map(|(i, e)| Step::Enable(i, e)),
    ];
    prop::collection::vec(step, 1..120)
}

/// The architecture's view, without list registers: lines, latched SGIs, what is active where.
#[derive(Default)]
struct Oracle {
    lines: [bool; 8],
    enabled: [bool; 8],
    active: [Option<usize>; 8],
    sgis: [[bool; 4]; 2],
    active_sgis: [[bool; 4]; 2],
}

impl Oracle {
    fn deliverable(&self, cpu: usize) -> Vec<u32> {
        let sgis = (0..4u32)
            .filter(|i| self.sgis[cpu][*i as usize] && !self.active_sgis[cpu][*i as usize]);
        let spis = (0..8u32).filter(|i| {
            let n = *i as usize;
            cpu == 0 && self.lines[n] && self.enabled[n] && self.active[n].is_none()
        });
        sgis.chain(spis.map(|i| i + 32)).collect()
    }

    fn acknowledge(&mut self, cpu: usize, intid: u32) {
        match (intid as usize).checked_sub(32) {
            None => {
                self.sgis[cpu][intid as usize] = false;
                self.active_sgis[cpu][intid as usize] = true;
            }
            Some(spi) => self.active[spi] = Some(cpu),
        }
    }

    fn end(&mut self, cpu: usize, intid: u32) {
        match (intid as usize).checked_sub(32) {
            None => self.active_sgis[cpu][intid as usize] = false,
            Some(spi) => self.active[spi] = None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever happens, with few or many list registers: what is acknowledged was deliverable,
    /// and nothing deliverable is withheld.
    #[test]
    fn nothing_is_lost_and_nothing_comes_twice(steps in steps(), lists in 2u8..6) {
        let vgic = enabled(V3, 2);
        let mut oracle = Oracle { enabled: [true; 8], ..Oracle::default() };
        let mut cpus = [Cpu::new(0, V3, lists), Cpu::new(1, V3, lists)];
        let mut stacks: [Vec<u32>; 2] = [Vec::new(), Vec::new()];
        for step in steps {
            match step {
                Step::Line(intid, level) => {
                    let _: Kicks = vgic.set_spi(intid, level).unwrap();
                    oracle.lines[intid as usize - 32] = level;
                }
                Step::Sgi(from, to, intid) => {
                    let _: Kicks = vgic.sgi1r(from, u64::from(intid) << 24 | 1 << to);
                    oracle.sgis[to][intid as usize] = true;
                }
                Step::Acknowledge(cpu) => {
                    let possible = oracle.deliverable(cpu);
                    // Real guests run an interrupt to its end before many others: as many may be
                    // active as there are list registers.
                    if stacks[cpu].len() + 1 >= usize::from(lists) {
                        continue;
                    }
                    prop_assert_eq!(vgic.has_pending(cpu), !possible.is_empty());
                    let got = cpus[cpu].acknowledge(&vgic);
                    prop_assert_eq!(got.is_some(), !possible.is_empty());
                    if let Some(intid) = got {
                        prop_assert!(possible.contains(&intid), "{} of {:?}", intid, possible);
                        oracle.acknowledge(cpu, intid);
                        stacks[cpu].push(intid);
                    }
                }
                Step::End(cpu) => {
                    if let Some(intid) = stacks[cpu].pop() {
                        cpus[cpu].end(&vgic, intid);
                        oracle.end(cpu, intid);
                    }
                }
                Step::Pass(cpu) => cpus[cpu].pass(&vgic),
                Step::Enable(intid, on) => {
                    let offset = if on { 0x104 } else { 0x184 };
                    let _: Kicks = vgic.dist_write(1, offset, 4, 1 << (intid - 32));
                    oracle.enabled[intid as usize - 32] = on;
                }
            }
        }
    }

    /// No access panics, whatever its offset and width, and reads fit the width.
    #[test]
    fn any_access_is_answered(offset in 0u64..0x2_0000, width in 0u32..4, value: u64, v3: bool) {
        let vgic = enabled(if v3 { V3 } else { V2 }, 3);
        let size = 1u8 << width;
        let _: Kicks = vgic.dist_write(1, offset, size, value);
        let _: Kicks = vgic.redist_write(2, offset, size, value);
        let read = vgic.dist_read(0, offset, size) | vgic.redist_read(2, offset, size);
        prop_assert!(size == 8 || read >> (u32::from(size) * 8) == 0);
        let mut cpu = Cpu::new(1, vgic.version, 4);
        let _: Option<u32> = cpu.acknowledge(&vgic);
    }
}
