//! Two parties that want the same page, or the same VM, in every order that can make a difference, without
//! a bound on how often one interrupts the other.
//!
//! The code is the real one: the VM table, transitions, ownership, page states, the guest's memory.
//! The host's and the guests' tables are maps of pages (`stage2` has models of its own). A guest has one
//! slot, and a party does one thing, or two: more parties and longer calls are not explored.

#[path = "guest_memory_world.rs"]
mod world;

use std::sync::Arc;

use loom::thread;

use super::*;
use world::*;

/// Two parties, in every order of their steps; then both tables and the states must agree.
fn race<R: 'static + Send, S: 'static>(
    world: impl Fn() -> &'static World + Send + Sync + 'static,
    first: impl Fn(&World) -> R + Send + Sync + Copy + 'static,
    second: impl Fn(&World) -> S + Send + Sync + Copy + 'static,
    after: impl Fn(&World, R, S) + Send + Sync + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.max_branches = 20_000;
    // loom's own would be part of the model.
    let orders = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&orders);
    model.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let world = world();
        let other = thread::spawn(move || first(world));
        let mine = second(world);
        let theirs = other.join().unwrap();
        world.agree();
        after(world, theirs, mine);
    });
    let orders = orders.load(std::sync::atomic::Ordering::Relaxed);
    std::println!("{orders} orders");
    assert!(orders > 1, "the two have nothing in common");
}

#[test]
fn share_against_donate() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.donate(B, 0),
        |_, shared, donated| {
            assert_eq!(shared, Some(Moved::Pages(1)));
            assert!(!donated, "shared memory is still the guest's");
        },
    );
}

#[test]
fn share_of_a_page_that_is_just_donated() {
    race(
        World::new,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.donate(A, 0),
        |world, shared, donated| {
            assert!(donated);
            let missing = Moved::After(Exit::MemoryMissing { ipa: ipa(0) });
            assert!(shared == Some(Moved::Pages(1)) || shared == Some(missing));
            assert_eq!(world.owner(0), Owner::Guest(A));
        },
    );
}

#[test]
fn share_against_reclaim() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.reclaim(0),
        |world, _, mut taken| {
            // It is refused where the guest shares behind its first step: repeated, it is not.
            if !taken {
                taken = world.reclaim(0);
                world.agree();
            }
            assert!(taken);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn unshare_against_reclaim() {
    race(
        World::with_shared_page,
        |world| world.call(A, MemoryCall::Unshare, 0),
        |world| world.reclaim(0),
        |world, _, taken| {
            if !taken {
                assert!(world.reclaim(0));
                world.agree();
            }
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn relinquish_against_reclaim() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.reclaim(0),
        |world, _, _| assert_eq!(world.owner(0), Owner::Host),
    );
}

#[test]
fn relinquish_against_teardown() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.end(A),
        |world, given, ended| {
            assert!(ended || given == DONE);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn relinquish_against_share() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.call(A, MemoryCall::Share, 0),
        |world, given, shared| {
            assert!((given == DONE) != (shared == DONE), "one of them gets it");
            assert_eq!(world.owner(0) == Owner::Host, given == DONE);
        },
    );
}

#[test]
fn relinquish_against_relinquish() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world, first, second| {
            assert!((first == DONE) != (second == DONE), "it is given away once");
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

#[test]
fn relinquish_against_a_vcpus_fault() {
    race(
        World::with_page,
        |world| world.touch(A, 0),
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world, _, given| {
            assert_eq!(given, DONE);
            assert_eq!(world.owner(0), Owner::Host);
            assert!(!world.touch(A, 0), "what was given away came back");
        },
    );
}

/// The host gives what comes back to the same guest again, where nothing is left of it.
#[test]
fn relinquish_against_donate() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.donate(A, 0),
        |world, given, donated| {
            assert_eq!(given, DONE);
            assert_eq!(world.owner(0) == Owner::Guest(A), donated);
            assert_eq!(world.touch(A, 0), donated);
        },
    );
}

#[test]
fn relinquish_against_donate_to_another_vm() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Relinquish, 0),
        |world| world.donate(B, 0),
        |world, given, donated| {
            assert_eq!(given, DONE);
            assert_eq!(world.owner(0) == Owner::Guest(B), donated);
            assert_eq!(world.touch(B, 0), donated);
        },
    );
}

#[test]
fn share_against_unshare() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.call(A, MemoryCall::Unshare, 0),
        |world, shared, unshared| {
            assert_eq!(shared, DONE);
            assert_eq!(world.reach.reaches(0), unshared != DONE);
        },
    );
}

#[test]
fn reclaim_against_reclaim() {
    race(
        World::with_shared_page,
        |world| world.reclaim(0),
        |world| world.reclaim(0),
        |world, first, second| {
            assert!(first != second, "it is taken once");
            assert_eq!(world.owner(0), Owner::Host);
            assert!(!world.touch(A, 0));
        },
    );
}

#[test]
fn a_vcpus_fault_against_reclaim() {
    race(
        World::with_page,
        |world| world.touch(A, 0),
        |world| world.reclaim(0),
        |world, _, taken| {
            assert!(taken);
            assert!(!world.touch(A, 0), "a poisoned page came back");
        },
    );
}

#[test]
fn teardown_against_run() {
    race(
        World::with_page,
        |world| world.touch(A, 0),
        |world| world.end(A),
        |world, _, ended| {
            let owner = if ended { Owner::Host } else { Owner::Guest(A) };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn teardown_against_share() {
    race(
        World::with_page,
        |world| world.call(A, MemoryCall::Share, 0),
        |world| world.end(A),
        |world, shared, ended| {
            assert!(ended || shared == Some(Moved::Pages(1)));
            assert_eq!(world.owner(0) == Owner::Host, ended);
        },
    );
}

#[test]
fn teardown_against_unshare() {
    race(
        World::with_shared_page,
        |world| world.call(A, MemoryCall::Unshare, 0),
        |world| world.end(A),
        |world, unshared, ended| {
            assert!(ended || unshared == DONE);
            let owner = if ended { Owner::Host } else { Owner::Guest(A) };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn teardown_against_teardown() {
    race(
        World::with_page,
        |world| world.end(A),
        |world| world.end(A),
        |world, first, second| {
            assert!(first || second);
            assert_eq!(world.owner(0), Owner::Host);
            assert_eq!(world.table.reserve(), Ok(handle(A)), "its handle is free");
        },
    );
}

/// Whatever the host gives to a VM that ends comes back.
#[test]
fn teardown_against_donations_to_it() {
    const ADDED: u64 = PAGES + 1;
    race(
        || World::with_guests(&[A]),
        |world| (world.donate(A, 0), world.top_up(A, ADDED)),
        |world| world.destroy(A),
        |world, (donated, added), destroyed| {
            assert!(destroyed || donated || added);
            assert!(destroyed || world.destroy(A));
            assert!(world.take_back(A));
            assert_eq!(world.owner(0), Owner::Host);
            assert_eq!(world.owner(ADDED), Owner::Host);
            world.agree();
        },
    );
}

#[test]
fn two_get_two_handles() {
    race(
        World::empty,
        |world| world.table.reserve(),
        |world| world.table.reserve(),
        |_, first, second| {
            // Who meets the other one at the same entry takes the next.
            let both = [first.unwrap(), second.unwrap()];
            assert!(both == [handle(A), handle(B)] || both == [handle(B), handle(A)]);
        },
    );
}

#[test]
fn teardown_against_reclaim() {
    race(
        World::with_page,
        |world| world.reclaim(0),
        |world| world.end(A),
        |world, taken, ended| {
            assert!(taken || ended);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

/// A has given page 1 away before it ends; the host gives it to B while it takes A's memory back.
#[test]
fn teardown_against_donate_of_what_came_back_before() {
    race(
        || {
            let world = World::with_page();
            assert!(world.donate(A, 1));
            world.call(A, MemoryCall::Relinquish, 1).unwrap();
            world
        },
        |world| world.donate(B, 1),
        |world| world.end(A),
        |world, donated, ended| {
            assert!(donated && ended);
            assert_eq!(world.owner(0), Owner::Host);
            assert_eq!(world.owner(1), Owner::Guest(B));
        },
    );
}

#[test]
fn donate_against_donate_to_another_vm() {
    race(
        World::new,
        |world| world.donate(A, 0),
        |world| world.donate(B, 0),
        |world, a, b| {
            assert!(a != b, "one of them gets it");
            assert_eq!(world.owner(0), Owner::Guest(if a { A } else { B }));
        },
    );
}

#[test]
fn donate_against_reclaim_from_another_vm() {
    race(
        World::with_page,
        |world| world.donate(B, 0),
        |world| world.reclaim(0),
        |world, donated, taken| {
            assert!(taken);
            let owner = if donated {
                Owner::Guest(B)
            } else {
                Owner::Host
            };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn lend_against_donate() {
    race(
        World::new,
        |world| world.ownership.lease(page(0), UNPROTECTED).is_ok(),
        |world| world.donate(A, 0),
        |world, lent, donated| {
            assert!(lent != donated, "one of them gets it");
            let owner = if donated {
                Owner::Guest(A)
            } else {
                Owner::Host
            };
            assert_eq!(world.owner(0), owner);
        },
    );
}

#[test]
fn the_end_of_a_lease_against_donate() {
    race(
        || {
            let world = World::new();
            assert!(world.ownership.lease(page(0), UNPROTECTED).is_ok());
            world
        },
        |world| world.ownership.end_lease(page(0), UNPROTECTED).is_ok(),
        |world| world.donate(A, 0),
        |world, ended, donated| {
            assert!(ended);
            assert_eq!(world.owner(0) == Owner::Guest(A), donated);
        },
    );
}

/// A lock maps what is the guest's, or nothing.
#[test]
fn lock_against_reclaim() {
    use memslot::lock::LockRequest;
    use memslot::slot::LockFlags;

    race(
        || {
            let world = World::with_page();
            assert!(world.donate(A, 1));
            world
        },
        |world| {
            let request = LockRequest::new(SlotId(0), LockFlags::READ | LockFlags::WRITE);
            let locked = world.with(A, |vm, _| vm.memory.lock_slot(&request).is_ok());
            locked == Some(true)
        },
        |world| world.reclaim(0),
        |world, _, taken| {
            assert!(taken);
            assert_eq!(world.owner(0), Owner::Host);
        },
    );
}

/// A lock against the donation that completes its slot.
#[test]
fn lock_against_donate() {
    use memslot::lock::LockRequest;
    use memslot::slot::LockFlags;

    race(
        World::with_page,
        |world| {
            let request = LockRequest::new(SlotId(0), LockFlags::READ | LockFlags::WRITE);
            let locked = world.with(A, |vm, _| vm.memory.lock_slot(&request).is_ok());
            locked == Some(true)
        },
        |world| world.donate(A, 1),
        |world, locked, donated| {
            assert!(donated);
            let mapped = world.with(A, |vm, _| vm.memory.with_table(|t| t.leaves().len()));
            assert_eq!(mapped, Some(if locked { 2 } else { 0 }));
        },
    );
}
