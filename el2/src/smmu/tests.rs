//! The driver against an SMMU that does what IHI 0070 says, as far as the driver uses it.

mod fake;

use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use fake::*;

const HOST: Walk = Walk {
    vmid: 0,
    vtcr: 0x8004_3594,
    root: 0x7fff_0000,
    output_bits: 44,
    fwb: false,
};

fn vm(vmid: u16) -> Walk {
    Walk {
        vmid,
        root: 0x5000_0000 + u64::from(vmid) * 0x1000,
        ..HOST
    }
}

fn started() -> (Shared, Smmu<Shared>) {
    let fake = fake();
    let smmu = Smmu::start(fake, true, HOST).unwrap();
    fake.taken.borrow_mut().clear();
    (fake, smmu)
}

#[test]
fn commands_are_what_the_specification_says() {
    assert_eq!(
        Command::Stream(0x1_2345).encode(),
        [0x0001_2345_0000_0003, 1]
    );
    assert_eq!(Command::AllStreams.encode(), [4, 0x1f]);
    assert_eq!(Command::Vmid(0xabcd).encode(), [0x0000_abcd_0000_0028, 0]);
    assert_eq!(Command::All.encode(), [0x30, 0]);
    assert_eq!(Command::Sync.encode(), [0x46, 0]);
    let one = Command::Pages {
        vmid: 7,
        ipa: 0x1234_5000,
        range: None,
    };
    assert_eq!(one.encode(), [0x0000_0007_0000_002a, 0x1234_5000]);
    let many = Command::Pages {
        vmid: 7,
        ipa: 0x1234_5000,
        range: Some((30, 9)),
    };
    assert_eq!(many.encode(), [0x0000_0007_0091_e02a, 0x1234_5400]);
}

/// S2T0SZ 20, S2SL0 2, write-back and inner-shareable walks, 4 KiB, 44 bits; S2AA64, S2AFFD, S2R.
#[test]
fn stream_entries_are_what_the_specification_says() {
    let walk = StreamEntry::Stage2 {
        vmid: 0x42,
        vtcr: 0x8004_3594,
        root: 0x7fff_0000,
        fwb: false,
    };
    let expected = [0xd, 1 << 44, 0x042c_3594_0000_0042, 0x7fff_0000, 0, 0, 0, 0];
    assert_eq!(walk.encode(), expected);
    let StreamEntry::Stage2 {
        vmid, vtcr, root, ..
    } = walk
    else {
        unreachable!()
    };
    let forced = StreamEntry::Stage2 {
        vmid,
        vtcr,
        root,
        fwb: true,
    };
    assert_eq!(forced.encode()[1], 1 << 44 | 1 << 25);
    assert_eq!(StreamEntry::Abort.encode(), [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn events_are_read_as_the_specification_says() {
    let words = [0x0000_0010_0000_0010, 0x8_0000_0000, 0x8000_1234, 0];
    let expected = Event {
        number: 0x10,
        stream: 0x10,
        read: true,
        address: 0x8000_1234,
    };
    assert_eq!(Event::decode(words), expected);
    assert_eq!(describe(0x10), "translation fault");
    assert_eq!(describe(0xff), "refused");
}

#[test]
fn every_capability_that_lacks_is_named() {
    let good = Ids::decode(IDR0, IDR1, IDR3, IDR5);
    assert_eq!(good.check(true, 1 << 44), Ok(()));
    assert_eq!(
        (good.output_bits, good.stream_bits, good.range),
        (44, 16, true)
    );
    let check = |a, b, c, d| Ids::decode(a, b, c, d).check(true, 0);
    assert_eq!(check(IDR0 & !1, IDR1, IDR3, IDR5), Err(Unfit::NoStage2));
    assert_eq!(check(IDR0 & !8, IDR1, IDR3, IDR5), Err(Unfit::Format));
    let big_endian = IDR0 & !(3 << 21) | 3 << 21;
    assert_eq!(check(big_endian, IDR1, IDR3, IDR5), Err(Unfit::Format));
    assert_eq!(check(IDR0 & !16, IDR1, IDR3, IDR5), Err(Unfit::NotCoherent));
    assert_eq!(good.check(false, 0), Err(Unfit::NotCoherent));
    assert_eq!(check(IDR0, IDR1, IDR3, 4), Err(Unfit::Granule));
    assert_eq!(check(IDR0, IDR1 | 1 << 29, IDR3, IDR5), Err(Unfit::Preset));
    assert_eq!(check(IDR0, IDR1 | 1 << 30, IDR3, IDR5), Err(Unfit::Preset));
    assert_eq!(check(IDR0, 0, IDR3, IDR5), Err(Unfit::TooSmall));
    assert_eq!(good.check(true, (1 << 44) + 1), Err(Unfit::Reach));
}

#[test]
fn what_lacks_anything_is_left_as_firmware_left_it() {
    for (register, value) in [(0, IDR0 & !1), (0x14, 4), (0x14, 1 << 4)] {
        let fake = fake();
        fake.set(register, value);
        let before = fake.registers.borrow().clone();
        assert!(Smmu::start(fake, true, HOST).is_err());
        assert_eq!(*fake.registers.borrow(), before);
    }
    for room in 0..4 {
        let fake = fake();
        fake.room.set(room);
        let refused = Smmu::start(fake, true, HOST).map(|_| ());
        assert_eq!(refused, Err(Unfit::NoMemory));
        assert_eq!(fake.reg(GBPA), 0);
    }
}

#[test]
fn after_the_start_every_stream_goes_through_the_hosts_tables() {
    let (fake, _smmu) = started();
    for stream in [0, 1, 0xff, 0x100, 0x8000, 0xffff] {
        assert_eq!(fake.goes_through(stream), Some(0), "{stream:#x}");
    }
    assert_eq!(fake.goes_through(0x1_0000), None);
    assert_ne!(fake.reg(GBPA) & 1 << 20, 0);
    assert_eq!(fake.reg(CR0), 0b1_1101);
    assert_eq!(fake.reg(0x28), 0xd75);
    assert_eq!(fake.reg(0x2c), 0b110);
    assert_eq!(*fake.wrong.borrow(), [""; 0]);
}

#[test]
fn a_linear_stream_table_serves_one_bus() {
    let fake = fake();
    fake.set(0, IDR0 & !(3 << 27));
    let smmu = Smmu::start(fake, true, HOST).unwrap();
    assert_eq!(fake.goes_through(0xff), Some(0));
    assert_eq!(fake.goes_through(0x100), None);
    assert_eq!(smmu.take(0x100), Err(AttachError::NoStream));
    smmu.take(0x10).unwrap();
    assert_eq!(fake.goes_through(0x10), None);
    assert_eq!(fake.goes_through(0x11), Some(0));
}

#[test]
fn a_stream_goes_from_the_host_to_a_vm_and_back_through_nobody() {
    let (fake, smmu) = started();
    assert_eq!(fake.goes_through(0x110), Some(0));
    smmu.take(0x110).unwrap();
    assert_eq!(fake.goes_through(0x110), None);
    assert_eq!(smmu.owner(0x110), Owner::Nobody);
    assert_eq!(smmu.take(0x110), Err(AttachError::Taken));
    smmu.attach(0x110, &vm(3)).unwrap();
    assert_eq!(fake.goes_through(0x110), Some(3));
    assert_eq!(fake.entry(0x110)[3], vm(3).root);
    assert_eq!(smmu.attach(0x110, &vm(4)), Err(AttachError::NotOwned));
    assert_eq!(smmu.give(0x110), Err(AttachError::NotOwned));
    assert_eq!(smmu.detach(0x110, 4), Err(AttachError::NotOwned));
    assert_eq!(smmu.owner(0x110), Owner::Vm(3));
    assert_eq!(smmu.detach(0x110, 3), Ok(Uses(0)));
    assert_eq!(fake.goes_through(0x110), None);
    smmu.give(0x110).unwrap();
    assert_eq!(fake.goes_through(0x110), Some(0));
    assert_eq!(smmu.give(0x110), Err(AttachError::NotOwned));
    // Its neighbours, and the same place on other buses, were the host's all the time.
    for stream in [0x10, 0x10f, 0x111, 0x210] {
        assert_eq!(fake.goes_through(stream), Some(0), "{stream:#x}");
    }
    assert_eq!(*fake.wrong.borrow(), [""; 0]);
}

/// An entry is never one of which the SMMU could cache a mixture of before and after.
#[test]
fn an_entry_that_is_in_use_changes_only_by_its_first_word() {
    let (fake, smmu) = started();
    smmu.take(5).unwrap();
    let aborting = fake.entry(5);
    assert_eq!(aborting[0], 1);
    smmu.attach(5, &vm(9)).unwrap();
    let commands: Vec<u64> = fake.taken.borrow().iter().map(|c| c[0] & 0xff).collect();
    // Own table; entry closed; the host's translations forgotten; words behind; first word.
    let expected = [4, 0x46, 3, 0x46, 0x28, 0x46, 3, 0x46, 3, 0x46];
    assert_eq!(commands, expected);
}

#[test]
fn a_detached_stream_is_waited_for_by_forgetting_its_vmid() {
    let (fake, smmu) = started();
    smmu.take(5).unwrap();
    smmu.attach(5, &vm(9)).unwrap();
    fake.taken.borrow_mut().clear();
    smmu.detach(5, 9).unwrap();
    let commands = fake.taken.borrow().clone();
    assert_eq!(commands[0], [0x5_0000_0003, 1]);
    assert_eq!(commands[2], [0x9_0000_0028, 0]);
    assert_eq!(commands[3], [0x46, 0]);
}

#[test]
fn tables_that_the_smmu_cannot_walk_are_refused() {
    let (fake, smmu) = started();
    smmu.take(5).unwrap();
    let wide = Walk {
        output_bits: 48,
        ..vm(1)
    };
    let forced = Walk { fwb: true, ..vm(1) };
    for walk in [wide, forced] {
        assert_eq!(smmu.attach(5, &walk), Err(AttachError::Tables));
        assert_eq!(fake.goes_through(5), None);
    }
    fake.set(0, IDR0 & !(1 << 18));
    let smmu = Smmu::start(fake, true, HOST).unwrap();
    assert!(smmu.can_walk(&vm(255)) && !smmu.can_walk(&vm(256)));
}

#[test]
fn without_memory_for_a_table_a_stream_stays_the_hosts() {
    let (fake, smmu) = started();
    fake.room.set(0);
    assert_eq!(smmu.take(0x200), Err(AttachError::NoMemory));
    assert_eq!(smmu.owner(0x200), Owner::Host);
    assert_eq!(fake.goes_through(0x200), Some(0));
}

#[test]
fn as_many_streams_are_taken_as_there_is_room_for() {
    let (_fake, smmu) = started();
    for stream in 0..u32::try_from(MAX_FUNCTIONS).unwrap() {
        smmu.take(stream).unwrap();
    }
    assert_eq!(smmu.take(0x80), Err(AttachError::Full));
    smmu.give(3).unwrap();
    smmu.take(0x80).unwrap();
}

/// Pages that the commands since the last look make forgotten; `None` for all.
fn forgotten(fake: &Fake) -> Option<BTreeSet<u64>> {
    let mut pages = BTreeSet::new();
    for [first, second] in fake.taken.borrow_mut().drain(..) {
        match first & 0xff {
            0x28 => return None,
            0x2a => {
                let (num, scale) = (first >> 12 & 0x1f, first >> 20 & 0x1f);
                let ranged = second >> 10 & 3 == 1;
                assert!(!ranged || num + scale > 0, "reserved");
                assert_eq!(second & 1, 0, "steps of the walk go, too");
                let start = (second & 0x000f_ffff_ffff_f000) >> 12;
                let count = if ranged { (num + 1) << scale } else { 1 };
                pages.extend(start..start + count);
            }
            0x46 => {}
            other => panic!("{other:#x}"),
        }
    }
    Some(pages)
}

proptest! {
    /// Exactly the pages of the range are forgotten, or all; and everything is complete at the end.
    #[test]
    fn an_invalidation_covers_its_range(first in 0u64..1 << 20, count in 1u64..5000, ranges: bool) {
        let fake = fake();
        if !ranges {
            fake.set(0xc, 0);
        }
        let smmu = Smmu::start(fake, true, HOST).unwrap();
        fake.taken.borrow_mut().clear();
        smmu.invalidate(6, first << 12, count << 12);
        prop_assert_eq!(fake.taken.borrow().last().copied(), Some([0x46, 0]));
        prop_assert!(fake.taken.borrow().len() <= 33);
        if let Some(pages) = forgotten(fake) {
            prop_assert_eq!(pages, (first..first + count).collect::<BTreeSet<_>>());
        } else {
            prop_assert!(!ranges && count > 32);
        }
    }
}

#[test]
fn everything_is_forgotten_by_few_commands() {
    let (fake, smmu) = started();
    for (start, size) in [(0, 1 << 48), (0, u64::MAX)] {
        smmu.invalidate(6, start, size);
        let commands = fake.taken.borrow_mut().split_off(0);
        assert!(commands.len() <= 12, "{commands:x?}");
    }
}

/// By pages it would be 2^52 of them: the core has to see that without counting.
#[test]
fn without_ranges_everything_is_forgotten_by_vmid_at_once() {
    let fake = fake();
    fake.set(0xc, 0);
    let smmu = Smmu::start(fake, true, HOST).unwrap();
    fake.taken.borrow_mut().clear();
    smmu.invalidate(6, 0, u64::MAX);
    assert_eq!(*fake.taken.borrow(), [[0x6_0000_0028, 0], [0x46, 0]]);
}

/// A range of no pages still waits for what is under way.
#[test]
fn an_empty_range_forgets_nothing() {
    let (fake, smmu) = started();
    smmu.invalidate(6, 0x1000, 0);
    assert_eq!(*fake.taken.borrow(), [[0x46, 0]]);
}

/// Queues of any size, many times around.
#[test]
fn a_small_queue_wraps_without_losing_a_command() {
    let fake = fake();
    fake.set(4, 16 | 1 << 16 | 2 << 21);
    fake.set(0xc, 0);
    let smmu = Smmu::start(fake, true, HOST).unwrap();
    fake.taken.borrow_mut().clear();
    for round in 0..50u64 {
        smmu.invalidate(1, round << 12, 7 << 12);
        let pages = forgotten(fake).unwrap();
        assert_eq!(pages, (round..round + 7).collect::<BTreeSet<_>>());
    }
    assert_eq!(*fake.wrong.borrow(), [""; 0]);
}

#[test]
fn an_smmu_that_reports_an_error_is_cut_off() {
    let (fake, smmu) = started();
    assert_eq!(fake.goes_through(9), Some(0));
    fake.fails.set(true);
    smmu.invalidate(0, 0x1000, 0x1000);
    assert!(smmu.is_dead());
    assert_eq!(fake.reg(CR0), 0);
    assert_eq!(fake.goes_through(9), None, "all is aborted");
    assert_eq!(smmu.take(9), Err(AttachError::Dead));
    smmu.invalidate(0, 0x1000, 0x1000);
}

#[test]
fn refused_accesses_are_counted_by_stream_with_the_last_one() {
    let (fake, smmu) = started();
    smmu.take(8).unwrap();
    smmu.attach(8, &vm(2)).unwrap();
    for n in 0..3u64 {
        fake.event([0x8_0000_0010, 1 << 35, 0x9000_0000 + n, 0]);
    }
    fake.event([0x7_0000_0013, 0, 0x42, 0]);
    smmu.poll(|stream, _| u16::try_from(stream).ok());
    let faults = smmu.faults(8);
    assert_eq!((faults.count, faults.vmid), (3, 2));
    assert_eq!(faults.last.address, 0x9000_0002);
    assert!(faults.last.read);
    let host = smmu.faults(7);
    assert_eq!((host.count, host.vmid, host.last.number), (1, 0, 0x13));
    assert_eq!(smmu.faults(6), Faults::default());
    assert_eq!(fake.reg(EVENTQ_CONS), fake.reg(EVENTQ_PROD));
}

/// A storm costs a bounded amount at a time; what is lost is acknowledged, and later events come.
#[test]
fn a_storm_of_events_is_bounded_and_survived() {
    let (fake, smmu) = started();
    for stream in 0..1000u64 {
        fake.event([stream << 32 | 0x10, 0, 0, 0]);
    }
    assert_ne!(fake.reg(EVENTQ_PROD) & 1 << 31, 0, "records were lost");
    smmu.poll(|_, _| None);
    let seen = |smmu: &Smmu<Shared>| (0..1000).map(|s| smmu.faults(s).count).sum::<u64>();
    assert_eq!(seen(&smmu), 16);
    for _ in 0..100 {
        smmu.poll(|_, _| None);
    }
    assert_eq!(
        seen(&smmu),
        MAX_FUNCTIONS as u64,
        "those beyond are not told apart"
    );
    assert_eq!(fake.reg(EVENTQ_CONS), fake.reg(EVENTQ_PROD));
    fake.event([0x10, 0, 0x1234, 0]);
    smmu.poll(|_, _| None);
    assert_eq!(smmu.faults(0).last.address, 0x1234);
}

proptest! {
    /// Any sequence of changes: the SMMU, with all that it caches, sends each stream where it belongs,
    /// and a refused change changes nothing.
    #[test]
    fn streams_are_where_an_oracle_says(steps in prop::collection::vec((0u8..4, 0u32..6, 1u16..4), 1..60)) {
        let (fake, smmu) = started();
        let mut oracle = BTreeMap::new();
        for (what, stream, vmid) in steps {
            let stream = stream * 0x80;
            let before = oracle.get(&stream).copied().unwrap_or(Owner::Host);
            let (result, after) = match (what, before) {
                (0, Owner::Host) => (smmu.take(stream).is_ok(), Some(Owner::Nobody)),
                (0, _) => (smmu.take(stream).is_ok(), None),
                (1, Owner::Nobody) => (smmu.give(stream).is_ok(), Some(Owner::Host)),
                (1, _) => (smmu.give(stream).is_ok(), None),
                (2, Owner::Nobody) => (smmu.attach(stream, &vm(vmid)).is_ok(), Some(Owner::Vm(vmid))),
                (2, _) => (smmu.attach(stream, &vm(vmid)).is_ok(), None),
                (_, Owner::Vm(v)) if v == vmid => (smmu.detach(stream, vmid).is_ok(), Some(Owner::Nobody)),
                _ => (smmu.detach(stream, vmid).is_ok(), None),
            };
            prop_assert_eq!(result, after.is_some());
            if let Some(owner) = after {
                oracle.insert(stream, owner);
            }
            for stream in (0..6).map(|s| s * 0x80) {
                let expected = match oracle.get(&stream).copied().unwrap_or(Owner::Host) {
                    Owner::Host => Some(0),
                    Owner::Nobody => None,
                    Owner::Vm(vmid) => Some(vmid),
                };
                prop_assert_eq!(fake.goes_through(stream), expected);
                prop_assert_eq!(smmu.owner(stream), oracle.get(&stream).copied().unwrap_or(Owner::Host));
            }
        }
    }
}
