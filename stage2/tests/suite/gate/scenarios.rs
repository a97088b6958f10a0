//! What the gate does on a space, with every mutation: operation by operation.

use super::*;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "map pages and blocks",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, BLOCK - PAGE, BLOCK + PAGE, BLOCK - PAGE);
            end(machine, wrong);
            map(space, BLOCK - 2 * PAGE, PAGE, BLOCK - 2 * PAGE);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "replace a page",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, PAGE, 0x10_0000);
            end(machine, wrong);
            map(space, 0, PAGE, 0x20_0000);
            end(machine, wrong);
            machine.host_writes(0x10_0000, PAGE);
            map(space, 0, PAGE, 0x10_0000);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "force and honour",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            let forced = LeafAttrs::forced_write_back(Perms::RWX);
            map_as(space, forced, 0, PAGE, 0x1000);
            end(machine, wrong);
            map(space, 0, PAGE, 0x1000);
            end(machine, wrong);
            map_as(space, forced, 0, PAGE, 0x1000);
            end(machine, wrong);
            space.zap_all();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "a page into a block",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, BLOCK, GIB);
            end(machine, wrong);
            map(space, PAGE, PAGE, 0x100_0000);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "a block over pages of other memory",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, PAGE, 2 * PAGE, GIB);
            end(machine, wrong);
            map(space, 0, BLOCK, 0);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "permissions",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            for perms in [Perms::RW, Perms::READ | Perms::EXEC, Perms::RWX] {
                map_as(space, LeafAttrs::normal(perms), 0, PAGE, 0x1000);
                end(machine, wrong);
            }
            space.write_protect(range(0, PAGE)).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "software bits",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, PAGE, 0x1000);
            end(machine, wrong);
            let sw = stage2::SwBits::try_new(3).unwrap();
            map_as(space, normal().with_sw(sw), 0, PAGE, 0x1000);
            end(machine, wrong);
            let raw = machine.snapshot().into_values().flatten();
            let seen = raw
                .filter(|word| word & 3 == 3 && word >> 55 & 0xf == 3)
                .count();
            wrong.extend((seen != 1).then(|| "software bits are not there".into()));
        },
    },
    Scenario {
        name: "unmap pages, tables and parts of blocks",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, 3 * PAGE, GIB);
            map(space, BLOCK, 2 * BLOCK, 2 * GIB);
            end(machine, wrong);
            space.unmap(range(PAGE, PAGE)).unwrap();
            end(machine, wrong);
            space.unmap(range(2 * PAGE, BLOCK - PAGE)).unwrap();
            end(machine, wrong);
            space.unmap(range(0, PAGE)).unwrap();
            end(machine, wrong);
            let mut gone = 0;
            space
                .unmap_with(range(0, GIB), &mut |leaf| {
                    let frames = leaf.frames();
                    let clean = machine.is_clean(frames.start().get(), frames.len());
                    wrong.extend((!clean).then(|| "handed out dirty".into()));
                    gone += frames.len();
                })
                .unwrap();
            wrong.extend((gone != 2 * BLOCK - PAGE).then(|| "memory was lost".into()));
            wrong.extend((machine.tables_in_use() != 1).then(|| "a table was lost".into()));
            end(machine, wrong);
        },
    },
    Scenario {
        name: "unmap what is forced",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            let forced = LeafAttrs::forced_write_back(Perms::RW);
            map_as(space, forced, 0, 2 * PAGE, 0x1000);
            end(machine, wrong);
            space.unmap(range(0, PAGE)).unwrap();
            end(machine, wrong);
            map_as(space, forced, BLOCK, BLOCK, BLOCK);
            end(machine, wrong);
            space.unmap(range(BLOCK + PAGE, PAGE)).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "notes",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            let note = Annotation::try_new(9).unwrap();
            map(space, 0, 2 * PAGE, GIB);
            map(space, BLOCK, BLOCK, 2 * GIB);
            end(machine, wrong);
            space.annotate(range(PAGE, PAGE), note).unwrap();
            end(machine, wrong);
            space.annotate(range(BLOCK, PAGE), note).unwrap();
            end(machine, wrong);
            space.annotate(range(3 * BLOCK, PAGE), note).unwrap();
            end(machine, wrong);
            space.annotate(range(3 * BLOCK, BLOCK), note).unwrap();
            end(machine, wrong);
            space.unmap(range(3 * BLOCK, PAGE)).unwrap();
            end(machine, wrong);
            let there = |at| space.lookup(Ipa::new(at)).unwrap().entry;
            let empty = [3 * BLOCK].map(there);
            let noted = [PAGE, BLOCK, 3 * BLOCK + PAGE].map(there);
            let right = noted.iter().all(|e| *e == stage2::Entry::Annotated(note))
                && empty == [stage2::Entry::Invalid];
            wrong.extend((!right).then(|| "notes are not as written".into()));
        },
    },
    Scenario {
        name: "zap beside others, then map again",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, 2 * PAGE, GIB);
            end(machine, wrong);
            space.zap(range(0, PAGE)).unwrap();
            end(machine, wrong);
            let retried = fault(space, 0, 0x5000);
            wrong.extend((!retried).then(|| "not installed after a zap".into()));
            end(machine, wrong);
            space.zap_exclusive(range(0, 2 * PAGE)).unwrap();
            end(machine, wrong);
            map(space, 0, 2 * PAGE, GIB);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "zap and free what is scattered",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            for round in 0..2 {
                for n in 0..12 {
                    map(space, n * PAGE, PAGE, GIB + 2 * n * PAGE);
                }
                end(machine, wrong);
                match round {
                    0 => space.zap_exclusive(range(0, BLOCK)).unwrap(),
                    _ => space.unmap(range(0, BLOCK)).unwrap(),
                }
                end(machine, wrong);
            }
        },
    },
    Scenario {
        name: "zap what is forced",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            let forced = LeafAttrs::forced_write_back(Perms::RW);
            map_as(space, forced, 0, PAGE, 0x1000);
            space.zap_all();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "faults",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            for at in [0, PAGE, BLOCK] {
                fault(space, at, at);
                end(machine, wrong);
            }
            let window = range(2 * BLOCK, BLOCK);
            let pa = Pa::new(2 * BLOCK);
            let block = FaultRequest::new(window.start(), window, pa, normal());
            let mapped = stage2::FaultOutcome::Mapped(Level::L2);
            wrong.extend((space.fault(&block) != Ok(mapped)).then(|| "no block".into()));
            end(machine, wrong);
            let read = LeafAttrs::normal(Perms::READ);
            map_as(space, read, GIB, PAGE, GIB);
            end(machine, wrong);
            space.relax_perms(Ipa::new(GIB), Perms::EXEC).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "age",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, PAGE, 0);
            end(machine, wrong);
            drop(machine.take_events());
            space
                .test_and_clear_young(range(0, PAGE), Aging::Clear)
                .unwrap();
            // A CPU that has it cached would go on using it unnoticed.
            let events = machine.take_events();
            let told = matches!(
                events[..],
                [.., Event::TlbRange(pages, _)] if pages == range(0, PAGE)
            );
            wrong.extend((!told).then(|| "still cached".into()));
            end(machine, wrong);
            let old = !leaf_at(machine, 0).young;
            wrong.extend((!old).then(|| "not old".into()));
            space.make_young(Ipa::new(0)).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "deferred maintenance",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            machine.expect_deferred(true);
            for at in [0, 2] {
                space
                    .map(&request(at * PAGE, PAGE, at * PAGE).deferred())
                    .unwrap();
            }
            end(machine, wrong);
            space.flush(range(0, 3 * PAGE)).unwrap();
            for at in [0, 2] {
                let fit =
                    machine.is_clean(at * PAGE, PAGE) && machine.is_fetchable(at * PAGE, PAGE);
                wrong.extend((!fit).then(|| "not fit to run".into()));
            }
            end(machine, wrong);
        },
    },
    Scenario {
        name: "deferred maintenance of one page",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            machine.expect_deferred(true);
            space.map(&request(0, PAGE, 0).deferred()).unwrap();
            space.flush(range(0, PAGE)).unwrap();
            let fit = machine.is_clean(0, PAGE) && machine.is_fetchable(0, PAGE);
            wrong.extend((!fit).then(|| "not fit to run".into()));
            end(machine, wrong);
        },
    },
    Scenario {
        name: "a forced page into a block that honours",
        fwb: ForceWriteBack::On,
        run: |space, machine, wrong| {
            map(space, 0, BLOCK, GIB);
            end(machine, wrong);
            let forced = LeafAttrs::forced_write_back(Perms::RW);
            map_as(space, forced, PAGE, PAGE, GIB + PAGE);
            end(machine, wrong);
        },
    },
    Scenario {
        name: "split and collapse",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            map(space, 0, BLOCK, GIB);
            end(machine, wrong);
            space.split(range(0, BLOCK), Level::PAGE).unwrap();
            end(machine, wrong);
            let pages = mapped(machine).len();
            wrong.extend((pages != 512).then(|| "not split".into()));
            space.collapse(Ipa::new(0), Level::L2).unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "no range operations",
        fwb: ForceWriteBack::Off,
        run: |space, machine, wrong| {
            machine.set_caps(TlbCaps {
                range_ops: RangeOps::Missing,
                whole_beyond: 2,
            });
            map(space, 0, 4 * PAGE, GIB);
            end(machine, wrong);
            space.unmap(range(0, 3 * PAGE)).unwrap();
            end(machine, wrong);
            space.unmap(range(3 * PAGE, PAGE)).unwrap();
            end(machine, wrong);
            map(space, 0, 4 * PAGE, GIB);
            end(machine, wrong);
            space
                .unmap_with(range(0, 4 * PAGE), &mut |leaf| {
                    assert!(leaf.frames().len() > 0)
                })
                .unwrap();
            end(machine, wrong);
        },
    },
    Scenario {
        name: "an importer",
        fwb: ForceWriteBack::Off,
        run: with_importer,
    },
];

fn fault(space: &Space<'_>, at: u64, pa: u64) -> bool {
    let request = FaultRequest::new(Ipa::new(at), range(at, PAGE), Pa::new(pa), normal());
    matches!(space.fault(&request), Ok(stage2::FaultOutcome::Mapped(_)))
}

struct Device(&'static FakeMachine);

impl InvalidateListener for Device {
    fn invalidate(&self, range: IpaRange) {
        self.0.told(range);
    }
}

/// The machine of this scenario lives as long as the test: importers are registered for good.
fn with_importer(space: &mut Space<'_>, machine: &FakeMachine, wrong: &mut Vec<String>) {
    let machine: &'static FakeMachine = LEAKED.with(|leaked| leaked.get()).unwrap_or_else(|| {
        panic!("{machine:?} is not the leaked one");
    });
    let root = space.export(1 << 11).unwrap();
    let device: &'static Device = Box::leak(Box::new(Device(machine)));
    let importer = Importer {
        listener: device,
        must_be_zero: 1 << 11,
        output_bits: 48,
        coarsest_leaf: Level::L1,
    };
    space.register(&root, importer).unwrap();
    machine.import();
    map(space, 0, 2 * PAGE, GIB);
    end(machine, wrong);
    map(space, 0, PAGE, 2 * GIB);
    end(machine, wrong);
    space.zap(range(0, PAGE)).unwrap();
    end(machine, wrong);
    space.unmap(range(0, 2 * PAGE)).unwrap();
    end(machine, wrong);
    map(space, 0, PAGE, GIB);
    end(machine, wrong);
    space.unregister(device).unwrap();
    machine.stop_importing(wrong);
    end(machine, wrong);
    assert!(space.unexport(root).is_ok());
}
