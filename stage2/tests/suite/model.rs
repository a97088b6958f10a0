//! Random operations against an ordered map, read back by the independent software walk.

use std::collections::BTreeMap;

use proptest::prelude::*;
use stage2::testing::FakeMachine;
use stage2::{
    Annotation, Blocks, FaultOutcome, FaultRequest, Ipa, IpaRange, LeafAttrs, Level, MapError,
    MapRequest, Pa, Perms, Stage2, TableFormat,
};

use crate::formats::{Shape, arm_4k, arm_4k_wide, arm_16k, ept};
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

/// Where operations happen: four blocks that straddle a border of two first-level slots.
#[derive(Clone, Copy, Debug)]
struct Ground {
    page: u64,
    /// Pages of a block.
    block: u64,
}

impl Ground {
    fn of<F: TableFormat>(format: &F) -> Self {
        let page = format.geometry().page_size();
        Self {
            page,
            block: page / 8,
        }
    }

    const fn pages(self) -> u64 {
        4 * self.block
    }

    const fn first(self) -> u64 {
        self.block * (self.block - 2)
    }

    const fn at(self, page: u64) -> u64 {
        (self.first() + page) * self.page
    }

    fn span(self, at: u64, pages: u64) -> IpaRange {
        range(self.at(at), pages * self.page)
    }

    /// The frame a page gets: no two pages share one, as sharing has owners of its own. One of
    /// the choices is not aligned for blocks.
    const fn frame(self, page: u64, choice: u64) -> u64 {
        let far = self.block * self.block;
        let offset = match choice {
            0 => far,
            1 => 2 * far,
            _ => 3 * far + 1,
        };
        self.first() + page + offset
    }

    fn place(self) -> impl Strategy<Value = (u64, u64)> {
        let (block, pages) = (self.block, self.pages());
        let start = prop_oneof![0..pages, (0u64..4).prop_map(move |n| n * block)];
        let count = prop_oneof![1u64..4, Just(block), block - 12..2 * block + 76];
        (start, count).prop_map(move |(at, count)| (at, count.min(pages - at)))
    }

    fn action(self) -> impl Strategy<Value = Action> {
        let (pa, pages) = (0u64..3, self.pages());
        prop_oneof![
            4 => (self.place(), pa, any::<bool>(), any::<bool>()).prop_map(
                |((at, pages), pa, write, blocks)| Action::Map { at, pages, pa, write, blocks }),
            3 => self.place().prop_map(|(at, pages)| Action::Unmap { at, pages }),
            1 => (0..pages).prop_map(|at| Action::Zap { at }),
            1 => (self.place(), 0u64..3)
                .prop_map(|((at, pages), note)| Action::Note { at, pages, note }),
            2 => (0..pages, 0u64..3).prop_map(|(at, pa)| Action::Fault { at, pa }),
            1 => self.place().prop_map(|(at, pages)| Action::Protect { at, pages }),
            1 => (0..pages).prop_map(|at| Action::Split { at }),
            1 => (0..pages).prop_map(|at| Action::Collapse { at }),
        ]
    }
}

/// What a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Mapped { pa: u64, write: bool },
    Noted(u64),
}

type Model = BTreeMap<u64, Page>;

fn perms(write: bool) -> Perms {
    if write { Perms::RW } else { Perms::READ }
}

/// A space with what is to stand in it.
struct Checked<'m, F: TableFormat> {
    space: Stage2<F, &'m FakeMachine>,
    machine: &'m FakeMachine,
    ground: Ground,
    model: Model,
}

impl<F: TableFormat> Checked<'_, F> {
    fn apply(&mut self, action: &Action) -> Result<(), MapError> {
        match *action {
            Action::Map {
                at,
                pages,
                pa,
                write,
                blocks,
            } => self.map((at, pages), pa, write, blocks),
            Action::Unmap { at, pages } => {
                self.space.unmap(self.ground.span(at, pages))?;
                self.model
                    .retain(|page, _| !(at..at + pages).contains(page));
                Ok(())
            }
            Action::Zap { at } => self.zap(at),
            Action::Note { at, pages, note } => {
                let payload = Annotation::try_new(note).expect("small");
                self.space.annotate(self.ground.span(at, pages), payload)?;
                self.model
                    .extend((at..at + pages).map(|page| (page, Page::Noted(note))));
                Ok(())
            }
            Action::Fault { at, pa } => self.fault(at, pa),
            Action::Protect { at, pages } => self.protect(at, pages),
            Action::Split { at } => {
                let span = self.ground.span(at, 1);
                self.space.split(span, Level::PAGE).map(drop)
            }
            Action::Collapse { at } => self.collapse(at),
        }
    }

    fn map(
        &mut self,
        (at, pages): (u64, u64),
        pa: u64,
        write: bool,
        blocks: bool,
    ) -> Result<(), MapError> {
        let ground = self.ground;
        let request = MapRequest::new(
            Ipa::new(ground.at(at)),
            pages * ground.page,
            Pa::new(ground.frame(at, pa) * ground.page),
            LeafAttrs::normal(perms(write)),
        );
        let blocks = if blocks {
            Blocks::Largest
        } else {
            Blocks::Never
        };
        self.space.map(&request.with_blocks(blocks))?;
        self.model.extend((at..at + pages).map(|page| {
            let pa = ground.frame(page, pa);
            (page, Page::Mapped { pa, write })
        }));
        Ok(())
    }

    /// Only a table that says one thing joins; either way the mappings stay.
    fn collapse(&mut self, at: u64) -> Result<(), MapError> {
        match self.space.collapse(Ipa::new(self.ground.at(at)), Level::L2) {
            Ok(()) | Err(MapError::NotUniform(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The pages of the leaf that stands at a page; nothing without one.
    fn leaf_pages(&self, at: u64) -> Option<std::ops::Range<u64>> {
        let found = self.space.lookup(Ipa::new(self.ground.at(at))).ok()?;
        let page = self.ground.page;
        let first = (found.slot.start().get() / page).saturating_sub(self.ground.first());
        let behind = found.slot.end().get() / page - self.ground.first();
        found.entry.is_leaf().then_some(first..behind)
    }

    /// A zap takes whole leaves.
    fn zap(&mut self, at: u64) -> Result<(), MapError> {
        let gone = self.leaf_pages(at);
        self.space.zap(self.ground.span(at, 1))?;
        self.model
            .retain(|page, _| !gone.as_ref().is_some_and(|gone| gone.contains(page)));
        Ok(())
    }

    fn fault(&mut self, at: u64, pa: u64) -> Result<(), MapError> {
        let (window, pa) = (self.ground.span(at, 1), self.ground.frame(at, pa));
        let attrs = LeafAttrs::normal(Perms::READ);
        let to = Pa::new(pa * self.ground.page);
        let request = FaultRequest::new(window.start(), window, to, attrs);
        let outcome = self.space.fault(&request)?;
        let expected = match self.model.get(&at) {
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
        let new = Page::Mapped { pa, write: false };
        self.model.entry(at).or_insert(new);
        Ok(())
    }

    /// Protecting, too, takes whole leaves.
    fn protect(&mut self, at: u64, pages: u64) -> Result<(), MapError> {
        let ends = [at, at + pages - 1].map(|page| self.leaf_pages(page));
        self.space.write_protect(self.ground.span(at, pages))?;
        for page in (at..at + pages).chain(ends.into_iter().flatten().flatten()) {
            if let Some(Page::Mapped { write, .. }) = self.model.get_mut(&page) {
                *write = false;
            }
        }
        Ok(())
    }

    /// Every page of the ground, read from raw tables and, for notes, through `runs`.
    fn read_back(&self) -> Model {
        let (page, first) = (self.ground.page, self.ground.first());
        let mut model = Model::new();
        for (at, level, leaf) in self.machine.leaves() {
            let pages = if level == 3 { 1 } else { self.ground.block };
            for n in 0..pages {
                let pa = leaf.pa / page + n;
                let write = leaf.write;
                model.insert(at / page + n - first, Page::Mapped { pa, write });
            }
        }
        let all = self.ground.span(0, self.ground.pages());
        for run in self.space.runs(all).expect("inside") {
            if let stage2::RunKind::Annotated(note) = run.kind {
                let at = run.range.start().get() / page - first;
                for n in 0..run.range.len() / page {
                    model.insert(at + n, Page::Noted(note.get()));
                }
            }
        }
        model
    }

    /// One action; before it, perhaps, the same without memory for tables, which must change
    /// nothing unless it needs none.
    fn step(&mut self, action: &Action, starve: bool) {
        if starve {
            self.machine.allow_allocations(Some(0));
            let (before, model) = (self.machine.snapshot(), self.model.clone());
            if self.apply(action).is_err() {
                assert_eq!(self.machine.snapshot(), before);
                assert_eq!(self.model, model);
            }
            self.machine.allow_allocations(None);
        }
        assert_eq!(self.apply(action), Ok(()));
        assert_clean(self.machine);
        assert_eq!(self.read_back(), self.model);
    }
}

/// Runs actions on a fresh space, then unmaps everything.
fn check<F: TableFormat>(shape: Shape<F>, actions: &[Action], starve_at: Option<usize>) {
    let machine = FakeMachine::new(shape.arch, 24);
    let ground = Ground::of(&shape.format);
    let space = Stage2::new(shape.format, &machine, 5).expect("a valid set-up");
    machine.attach(space.root());
    let root = machine.tables_in_use();
    let mut checked = Checked {
        space,
        machine: &machine,
        ground,
        model: Model::new(),
    };
    for (n, action) in actions.iter().enumerate() {
        checked.step(action, starve_at == Some(n));
    }
    let whole = range(0, checked.space.geometry().input_end());
    checked
        .space
        .unmap(whole)
        .expect("whole blocks need no table");
    assert_eq!(machine.tables_in_use(), root);
    assert_clean(&machine);
}

/// Random actions on one shape, in as many cases as a debug build does in a second or two.
fn random<F: TableFormat + Copy>(shape: Shape<F>, cases: u32) {
    let ground = Ground::of(&shape.format);
    let config = ProptestConfig {
        cases: if cfg!(miri) { 1 } else { cases },
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let actions = proptest::collection::vec(ground.action(), 1..16);
    let input = (actions, proptest::option::of(0usize..16));
    proptest::test_runner::TestRunner::new(config)
        .run(&input, |(actions, starve_at)| {
            check(shape, &actions, starve_at);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn random_operations_agree_with_an_ordered_map() {
    random(arm_4k(), 128);
}

#[test]
fn random_operations_on_52_bit_addresses_agree() {
    random(arm_4k_wide(), 12);
}

#[test]
fn random_operations_on_16k_pages_agree() {
    random(arm_16k(), 4);
}

#[test]
fn random_operations_on_ept_agree() {
    random(ept(), 24);
}
