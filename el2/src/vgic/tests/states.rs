//! One interrupt through its states: line, request, list register, active, end.

use super::*;

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
