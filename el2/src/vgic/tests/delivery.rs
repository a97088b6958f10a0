//! Who gets which interrupt, and in what order: priorities, routes, SGIs, the timers, kicks.

use super::*;

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
