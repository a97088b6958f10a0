//! What a table refuses before anything moves, and what comes back. The life of a VM as a whole is the
//! reference model's (`tests/tests/reference_model`), and its races are loom's (`guest_memory_models.rs`).

use std::cell::Cell;
use std::vec::Vec;

use board::RangeList;
use stage2::MapError;

use super::*;
use crate::host_map::HostMapError;
use crate::page_state::PageStates;
use crate::sync::AtomicU32;

/// RAM: from 0, as on a Raspberry Pi.
const PAGES: u64 = 1024;

#[derive(Default)]
struct Host {
    /// Giving back lacks a table.
    lacks_tables: Cell<bool>,
}

impl HostReach for Host {
    fn take_away(&self, _: AddrRange, _: Owner) -> Result<(), HostMapError> {
        Ok(())
    }

    fn give_back(&self, _: AddrRange) -> Result<(), HostMapError> {
        if self.lacks_tables.get() {
            return Err(MapError::NoMemory { needed: 1 }.into());
        }
        Ok(())
    }
}

/// Counts the pages that were wiped.
#[derive(Default)]
struct Wiped(Cell<u64>);

impl Contents for Wiped {
    fn wipe(&self, pages: AddrRange) {
        self.0.set(self.0.get() + pages.size() / PAGE_SIZE);
    }

    fn settle(&self, _: AddrRange) {}

    fn show(&self, _: AddrRange, _: &mut dyn FnMut(&[u8])) {}
}

/// A VM that ends at once.
#[derive(Debug)]
struct Vm;

impl Teardown for Vm {
    type Left = ();

    fn begin(&self) {}

    fn go_on(&self, (): &mut ()) -> Progress {
        Progress::Done
    }
}

fn pages(first: u64, count: u64) -> AddrRange {
    AddrRange::with_size(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

fn on_a_board(check: impl FnOnce(&Estate<'_, '_, Host, Wiped>)) {
    let words: Vec<_> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    let mut memory = RangeList::new();
    memory.insert(pages(0, PAGES), "ram").unwrap();
    check(&Estate {
        ownership: &Ownership::new(PageStates::new(memory, &words).unwrap()),
        host: &Host::default(),
        contents: &Wiped::default(),
    });
}

fn code<T>(result: Result<T, Refusal>) -> Option<ErrorCode> {
    result.err().map(|refusal| refusal.code)
}

#[test]
fn a_number_that_was_never_a_handle_is_no_vm() {
    on_a_board(|estate| {
        let vms = VmTable::<Vm, 2>::new();
        for wrong in [
            0,
            FIRST_HANDLE - 1,
            FIRST_HANDLE + 2,
            FIRST_HANDLE + 256,
            u64::MAX,
        ] {
            let not_found = Some(ErrorCode::NotFound);
            assert_eq!(code(vms.with(wrong, |_| Ok(()))), not_found);
            assert_eq!(code(vms.destroy(estate.ownership, wrong)), not_found);
            assert_eq!(code(vms.reclaim(estate, wrong)), not_found);
            let build = |_| Some((Vm, ()));
            let created = vms.create(estate, wrong, (pages(1, 1), 1), build);
            assert_eq!(code(created), not_found);
        }
    });
}

#[test]
fn el2_takes_neither_address_0_nor_more_than_512_pages_at_once() {
    on_a_board(|estate| {
        for wrong in [pages(0, 1), pages(1, MAX_DONATION + 1)] {
            assert_eq!(estate.donate(wrong), Err(OwnershipError::NotOwned(wrong)));
        }
        assert_eq!(estate.donate(pages(1, MAX_DONATION)), Ok(()));
    });
}

#[test]
fn memory_that_is_too_small_for_a_vm_stays_the_hosts() {
    on_a_board(|estate| {
        let vms = VmTable::<Vm, 1>::new();
        let handle = vms.reserve().unwrap();
        let build = |_| Some((Vm, ()));
        let refused = vms.create(estate, handle, (pages(1, 2), 3), build);
        let (code, pages_needed) = (ErrorCode::NoMemory, 3);
        assert_eq!(
            refused,
            Err(Refusal {
                code,
                pages: pages_needed
            })
        );
        assert_eq!(estate.ownership.pages().owner(PAGE_SIZE), Some(Owner::Host));
    });
}

#[test]
fn memory_of_which_no_vm_can_be_built_goes_back_wiped() {
    on_a_board(|estate| {
        let vms = VmTable::<Vm, 1>::new();
        let handle = vms.reserve().unwrap();
        let refused = vms.create(estate, handle, (pages(1, 2), 1), |_| None::<(Vm, ())>);
        assert_eq!(code(refused), Some(ErrorCode::Invalid));
        assert_eq!(estate.contents.0.get(), 2);
        let host = estate.ownership.pages();
        assert!(host.all_owned_by(pages(1, 2), Owner::Host));
        // The handle is as it was.
        let created = vms.create(estate, handle, (pages(1, 2), 1), |_| Some((Vm, ())));
        assert_eq!(created, Ok(()));
    });
}

/// Neither could it be built nor its memory be given back: that is not forgotten, and the handle not reused before.
#[test]
fn memory_that_could_not_go_back_at_once_is_reclaimed() {
    on_a_board(|estate| {
        let vms = VmTable::<Vm, 1>::new();
        let handle = vms.reserve().unwrap();
        estate.host.lacks_tables.set(true);
        let create = || vms.create(estate, handle, (pages(1, 2), 1), |_| None::<(Vm, ())>);
        assert_eq!(code(create()), Some(ErrorCode::NoHeap));
        let owners = estate.ownership.pages();
        assert!(owners.all_owned_by(pages(1, 2), Owner::Hypervisor));
        assert_eq!(code(create()), Some(ErrorCode::Exists));
        assert_eq!(code(vms.reclaim(estate, handle)), Some(ErrorCode::NoHeap));
        assert_eq!(vms.reserve(), Err(ErrorCode::NoSpace));
        estate.host.lacks_tables.set(false);
        assert_eq!(vms.destroy(estate.ownership, handle), Ok(0));
        assert_eq!(vms.reclaim(estate, handle), Ok(Some(pages(1, 2))));
        assert!(owners.all_owned_by(pages(1, 2), Owner::Host));
        assert_eq!(vms.reclaim(estate, handle), Ok(None));
        assert_eq!(vms.reserve(), Ok(handle));
    });
}

#[test]
fn a_handle_is_reused_only_behind_the_last_page() {
    on_a_board(|estate| {
        let vms = VmTable::<Vm, 1>::new();
        let handle = vms.reserve().unwrap();
        let created = vms.create(estate, handle, (pages(1, 1), 1), |_| Some((Vm, ())));
        assert_eq!(created, Ok(()));
        assert_eq!(vms.top_up(estate, handle, pages(7, 2), |_| {}), Ok(0));
        assert_eq!(code(vms.reclaim(estate, handle)), Some(ErrorCode::Invalid));
        assert_eq!(vms.destroy(estate.ownership, handle), Ok(0));
        for back in [pages(7, 2), pages(1, 1)] {
            assert_eq!(vms.reserve(), Err(ErrorCode::NoSpace));
            assert_eq!(vms.reclaim(estate, handle), Ok(Some(back)));
        }
        assert_eq!(vms.reclaim(estate, handle), Ok(None));
        assert_eq!(vms.reserve(), Ok(handle));
    });
}
