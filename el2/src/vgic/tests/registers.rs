//! What the registers say, after a reset, too, and what the list registers are.

use super::*;

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
