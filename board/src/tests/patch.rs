//! What the host is told of the board: its device tree, patched.

use proptest::prelude::*;
use std::vec;

use super::*;

#[test]
fn patched_virt_tree_reserves_el2_and_routes_psci_through_hvc() {
    let tree = patched(&virt(3), &[0, 2]);
    assert_eq!(prop(&tree, "/psci", "method"), Some(&b"hvc\0"[..]));
    let reg = [0x5fe0_0000u64.to_be_bytes(), 0x20_0000u64.to_be_bytes()].concat();
    let node = "/reserved-memory/ravelin@5fe00000";
    assert_eq!(prop(&tree, node, "reg"), Some(&reg[..]));
    assert_eq!(prop(&tree, node, "no-map"), Some(&[][..]));
    assert_eq!(
        prop(&tree, "/reserved-memory", "#size-cells"),
        Some(&[0, 0, 0, 2][..])
    );
    assert_eq!(prop(&tree, "/cpus/cpu@1", "status"), Some(&b"fail\0"[..]));
    assert_eq!(prop(&tree, "/cpus/cpu@2", "status"), Some(&b"okay\0"[..]));
}

#[test]
fn patched_pi_tree_gets_a_psci_node_and_loses_spin_tables() {
    let tree = patched(&pi(), &[0, 1, 2, 3]);
    assert_eq!(prop(&tree, "/psci", "method"), Some(&b"hvc\0"[..]));
    assert_eq!(
        prop(&tree, "/cpus/cpu@3", "enable-method"),
        Some(&b"psci\0"[..])
    );
    assert_eq!(prop(&tree, "/cpus/cpu@3", "cpu-release-addr"), None);
    let reg = [
        &[0, 0, 0, 0][..],
        &0x5fe0_0000u32.to_be_bytes(),
        &0x20_0000u32.to_be_bytes(),
    ];
    let node = "/reserved-memory/ravelin@5fe00000";
    assert_eq!(prop(&tree, node, "reg"), Some(&reg.concat()[..]));
    assert!(prop(&tree, "/reserved-memory/secret@3000000", "no-map").is_some());
}

/// An ITS, and what is not in the first region of redistributors: their tables are past stage 2.
#[test]
fn what_makes_the_interrupt_controller_use_tables_is_found_and_the_host_has_no_its() {
    let blob = virt(4);
    let tables = [
        range(0x40_0000_0000, 0x40_0400_0000),
        range(0x808_0000, 0x80a_0000),
    ];
    let board = read(&blob);
    assert_eq!(board.gic_tables, tables);
    assert_eq!(board.gic_tables_left_out, 0);
    let tree = patched(&blob, &[0]);
    let its = "/its@8080000";
    assert_eq!(prop(&tree, its, "status"), Some(&b"disabled\0"[..]));
    assert_eq!(prop(&tree, "/intc@8000000", "status"), None);
    assert!(read(&pi()).gic_tables.is_empty());
}

#[test]
fn a_patched_tree_describes_the_same_board_less_el2() {
    for blob in [virt(4), pi()] {
        let before = read(&blob);
        let tree = patched(&blob, &[0, 1, 2, 3]);
        let after = read(&tree);
        assert_eq!(before.memory.as_slice(), after.memory.as_slice());
        assert_eq!(before.gic, after.gic);
        assert_eq!(before.console, after.console);
        assert_eq!(before.cpus.len(), after.cpus.len());
        assert_eq!(after.psci, Some(PsciConduit::Hvc));
        let el2 = range(0x5fe0_0000, 0x6000_0000);
        assert!(after.no_map.as_slice().contains(&el2));
    }
}

/// Bit 31 of MPIDR_EL1 is one, and firmware may leave it in `reg`: it is no part of the affinity.
#[test]
fn a_cpu_whose_reg_is_its_whole_mpidr_stays_usable() {
    let mut blob = virt(1);
    let reg = prop(&blob, "/cpus/cpu@0", "reg").unwrap();
    let at = reg.as_ptr().addr() - blob.as_ptr().addr();
    blob[at] = 0x80;
    assert_eq!(read(&blob).cpus[0].mpidr, 0);
    let blob = patched(&blob, &[0]);
    assert_eq!(prop(&blob, "/cpus/cpu@0", "status"), Some(&b"okay\0"[..]));
}

/// A `/reserved-memory` in which EL2's memory would not be seen by any host.
#[test]
fn reserved_memory_with_cells_of_its_own_is_refused() {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("#address-cells", 2).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    let node = fdt.begin_node("reserved-memory").unwrap();
    fdt.property_u32("#address-cells", 3).unwrap();
    fdt.property_u32("#size-cells", 2).unwrap();
    fdt.end_node(node).unwrap();
    let node = fdt.begin_node("cpus").unwrap();
    fdt.end_node(node).unwrap();
    fdt.end_node(root).unwrap();
    let blob = fdt.finish().unwrap();
    let mut buffer = vec![0; blob.len() + 8192];
    let tree = Tree::new(&blob).unwrap();
    let el2 = range(0x5fe0_0000, 0x6000_0000);
    let told = host(el2, &[]);
    let refused = patch_for_host(tree.fdt(), &mut buffer, &told);
    assert_eq!(refused, Err(EditError::Cells(3, 2)));
}

#[test]
fn a_buffer_that_is_too_small_is_refused() {
    let blob = virt(1);
    let tree = Tree::new(&blob).unwrap();
    let el2 = range(0x5fe0_0000, 0x6000_0000);
    for size in [0, 1, 100, blob.len(), blob.len() + 64] {
        let mut buffer = vec![0; size];
        let told = host(el2, &[0]);
        assert!(
            patch_for_host(tree.fdt(), &mut buffer, &told).is_err(),
            "{size}"
        );
    }
}

proptest! {
    /// Flipped trees give an error or the host's tree, never a panic.
    #[test]
    fn corrupt_trees_are_patched_or_refused(
        flips in prop::collection::vec((0usize..1500, any::<u8>()), 1..6), other: bool,
    ) {
        let mut blob = if other { virt(4) } else { pi() };
        for (at, value) in flips {
            let at = at % blob.len();
            blob[at] = value;
        }
        if let Ok(tree) = Tree::new(&blob) {
            let mut buffer = vec![0; blob.len() + 0x8000];
            let el2 = range(0x5fe0_0000, 0x6000_0000);
            let told = host(el2, &[0]);
            let _: Result<usize, EditError> = patch_for_host(tree.fdt(), &mut buffer, &told);
        }
    }
}
