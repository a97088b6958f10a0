//! Random operations against an ordered map, read back by the independent software walk.

use std::collections::BTreeMap;

use proptest::prelude::*;
use stage2::{
    Annotation, Blocks, FaultOutcome, FaultRequest, Ipa, LeafAttrs, Level, MapError, MapRequest,
    Pa, Perms,
};

use crate::kit::*;

/// Operations on pages around a boundary of two blocks and of two gigabytes.
#[derive(Clone, Debug)]
enum Action {
    Map {
        at: u64,
        pages: u64,
        pa: u64,
        write: bool,
        blocks: bool,
    },
    Unmap {
        at: u64,
        pages: u64,
    },
    Zap {
        at: u64,
    },
    Note {
        at: u64,
        pages: u64,
        note: u64,
    },
    Fault {
        at: u64,
        pa: u64,
    },
    Protect {
        at: u64,
        pages: u64,
    },
    Split {
        at: u64,
    },
    Collapse {
        at: u64,
    },
}

/// First page of the playground: four blocks that straddle a gigabyte.
const FIRST: u64 = GIB / PAGE - 1024;
const PAGES: u64 = 2048;

fn place() -> impl Strategy<Value = (u64, u64)> {
    let start = prop_oneof![0..PAGES, (0u64..4).prop_map(|n| n * 512)];
    let pages = prop_oneof![1u64..4, Just(512u64), 500u64..1100];
    (start, pages).prop_map(|(at, pages)| (at, pages.min(PAGES - at)))
}

fn action() -> impl Strategy<Value = Action> {
    let pa = 0u64..3;
    prop_oneof![
        4 => (place(), pa, any::<bool>(), any::<bool>()).prop_map(|((at, pages), pa, write, blocks)|
            Action::Map { at, pages, pa, write, blocks }),
        3 => place().prop_map(|(at, pages)| Action::Unmap { at, pages }),
        1 => (0..PAGES).prop_map(|at| Action::Zap { at }),
        1 => (place(), 0u64..3).prop_map(|((at, pages), note)| Action::Note { at, pages, note }),
        2 => (0..PAGES, 0u64..3).prop_map(|(at, pa)| Action::Fault { at, pa }),
        1 => place().prop_map(|(at, pages)| Action::Protect { at, pages }),
        1 => (0..PAGES).prop_map(|at| Action::Split { at }),
        1 => (0..PAGES).prop_map(|at| Action::Collapse { at }),
    ]
}

/// What a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Mapped { pa: u64, write: bool },
    Noted(u64),
}

type Model = BTreeMap<u64, Page>;

fn at_ipa(page: u64) -> u64 {
    (FIRST + page) * PAGE
}

/// The frame a page gets: no two pages share one, as sharing has owners of its own. One of the
/// choices is not aligned for blocks.
fn frame(page: u64, choice: u64) -> u64 {
    FIRST + page + [0x10_0000, 0x20_0000, 0x30_0001][usize::try_from(choice).expect("one of three")]
}

fn span(at: u64, pages: u64) -> stage2::IpaRange {
    range(at_ipa(at), pages * PAGE)
}

fn perms(write: bool) -> Perms {
    if write { Perms::RW } else { Perms::READ }
}

fn erase(model: &mut Model, at: u64, pages: u64) {
    model.retain(|page, _| !(at..at + pages).contains(page));
}

fn apply(space: &mut Space<'_>, model: &mut Model, action: &Action) -> Result<(), MapError> {
    match *action {
        Action::Map {
            at,
            pages,
            pa,
            write,
            blocks,
        } => {
            let attrs = LeafAttrs::normal(perms(write));
            let request = MapRequest::new(
                Ipa::new(at_ipa(at)),
                pages * PAGE,
                Pa::new(frame(at, pa) * PAGE),
                attrs,
            );
            let blocks = if blocks {
                Blocks::Largest
            } else {
                Blocks::Never
            };
            space.map(&request.with_blocks(blocks))?;
            for n in 0..pages {
                model.insert(
                    at + n,
                    Page::Mapped {
                        pa: frame(at + n, pa),
                        write,
                    },
                );
            }
        }
        Action::Unmap { at, pages } => {
            space.unmap(span(at, pages))?;
            erase(model, at, pages);
        }
        Action::Zap { at } => zap(space, model, at)?,
        Action::Note { at, pages, note } => {
            space.annotate(span(at, pages), Annotation::try_new(note).expect("small"))?;
            model.extend((at..at + pages).map(|page| (page, Page::Noted(note))));
        }
        Action::Fault { at, pa } => fault(space, model, at, pa)?,
        Action::Protect { at, pages } => protect(space, model, at, pages)?,
        Action::Split { at } => {
            space.split(span(at, 1), Level::PAGE)?;
        }
        // Only a table that says one thing joins; either way the mappings stay.
        Action::Collapse { at } => match space.collapse(Ipa::new(at_ipa(at)), Level::L2) {
            Ok(()) | Err(MapError::NotUniform(_)) => {}
            Err(error) => return Err(error),
        },
    }
    Ok(())
}

/// The pages of the leaf that stands at a page; nothing without one.
fn leaf_pages(space: &Space<'_>, at: u64) -> Option<std::ops::Range<u64>> {
    let found = space.lookup(Ipa::new(at_ipa(at))).ok()?;
    let first = (found.slot.start().get() / PAGE).saturating_sub(FIRST);
    let behind = found.slot.end().get() / PAGE - FIRST;
    found.entry.is_leaf().then_some(first..behind)
}

/// A zap takes whole leaves.
fn zap(space: &mut Space<'_>, model: &mut Model, at: u64) -> Result<(), MapError> {
    let gone = leaf_pages(space, at);
    space.zap(span(at, 1))?;
    model.retain(|page, _| !gone.as_ref().is_some_and(|gone| gone.contains(page)));
    Ok(())
}

fn fault(space: &mut Space<'_>, model: &mut Model, at: u64, pa: u64) -> Result<(), MapError> {
    let (window, pa) = (span(at, 1), frame(at, pa));
    let attrs = LeafAttrs::normal(Perms::READ);
    let request = FaultRequest::new(window.start(), window, Pa::new(pa * PAGE), attrs);
    let outcome = space.fault(&request)?;
    let expected = match model.get(&at) {
        None => FaultOutcome::Mapped(Level::PAGE),
        Some(Page::Noted(note)) => {
            FaultOutcome::Annotated(Annotation::try_new(*note).expect("small"))
        }
        Some(Page::Mapped { pa: there, .. }) if *there == pa => FaultOutcome::AlreadyMapped,
        Some(Page::Mapped { .. }) => {
            assert!(matches!(outcome, FaultOutcome::Conflict(_)), "{outcome:?}");
            return Ok(());
        }
    };
    assert_eq!(outcome, expected);
    model.entry(at).or_insert(Page::Mapped { pa, write: false });
    Ok(())
}

/// Protecting, too, takes whole leaves.
fn protect(space: &mut Space<'_>, model: &mut Model, at: u64, pages: u64) -> Result<(), MapError> {
    let ends = [at, at + pages - 1].map(|page| leaf_pages(space, page));
    space.write_protect(span(at, pages))?;
    for page in (at..at + pages).chain(ends.into_iter().flatten().flatten()) {
        if let Some(Page::Mapped { write, .. }) = model.get_mut(&page) {
            *write = false;
        }
    }
    Ok(())
}

/// Every page of the playground, read from raw tables and through `lookup`.
fn read_back(machine: &stage2::testing::FakeMachine, space: &Space<'_>) -> Model {
    let mut model = Model::new();
    for (at, level, leaf) in machine.leaves() {
        let pages = 1u64 << (9 * (3 - level));
        for n in 0..pages {
            let page = Page::Mapped {
                pa: leaf.pa / PAGE + n,
                write: leaf.write,
            };
            model.insert(at / PAGE + n - FIRST, page);
        }
    }
    for run in space.runs(span(0, PAGES)).expect("inside") {
        if let stage2::RunKind::Annotated(note) = run.kind {
            let first = run.range.start().get() / PAGE - FIRST;
            for n in 0..run.range.len() / PAGE {
                model.insert(first + n, Page::Noted(note.get()));
            }
        }
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 24 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_operations_agree_with_an_ordered_map(
        actions in proptest::collection::vec(action(), 1..16),
        fail_at in proptest::option::of(0usize..16),
    ) {
        let machine = machine(24);
        let mut space = space(&machine);
        let mut model = Model::new();
        for (n, action) in actions.iter().enumerate() {
            if fail_at == Some(n) {
                machine.allow_allocations(Some(0));
                let before = machine.snapshot();
                let mut unchanged = model.clone();
                if apply(&mut space, &mut unchanged, action).is_err() {
                    prop_assert_eq!(machine.snapshot(), before);
                }  else {
                    model = unchanged;
                }
                machine.allow_allocations(None);
            }
            prop_assert_eq!(apply(&mut space, &mut model, action), Ok(()));
            prop_assert_eq!(machine.finish(), Vec::<String>::new());
            prop_assert_eq!(&read_back(&machine, &space), &model);
        }
        space.unmap(range(0, 1 << 39)).expect("whole blocks need no table");
        prop_assert_eq!(machine.tables_in_use(), 1);
        prop_assert_eq!(machine.finish(), Vec::<String>::new());
    }
}
