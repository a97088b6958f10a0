//! Arm's TLB and caches at the level of single instructions.
//!
//! Stage-2 entries and combined entries are separate, as in hardware: a combined one is made
//! from a stage-2 one at any time and is not tagged by IPA. An invalidation takes effect only in
//! the context that is loaded *and synchronised*, only if the stores were published, and only
//! when a barrier completes it.

use std::collections::{BTreeMap, BTreeSet};
use std::format;
use std::panic::Location;
use std::prelude::rust_2024::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::mutation::{Mutation, Op, Site};
use crate::addr::Pa;
use crate::arm::{ArmCacheOps, ArmTlbOps};

/// Instructions that the field has used instead of the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// `dc ivac`: dirty lines are lost.
    InvalidateOnly,
    /// `dc cvau`: what reads from memory sees the old data.
    PointOfUnification,
    /// `tlbi vae2is`: another regime's stage 1.
    OtherRegime,
    /// The address where the page number belongs.
    UnshiftedOperand,
    /// The target's context instead of the one before.
    RestoresTarget,
}

#[derive(Default)]
struct State {
    context: u16,
    synchronised: bool,
    published: bool,
    /// Pages whose old stage-2 translation is cached, of the guest.
    stage2: BTreeSet<u64>,
    /// Pages whose old translation is cached in an entry that combines both stages.
    combined: BTreeSet<u64>,
    pending_stage2: BTreeSet<u64>,
    pending_combined: BTreeSet<u64>,
    completed: bool,
    /// Cached and not written back: line to value.
    dirty: BTreeMap<u64, u8>,
    memory: BTreeMap<u64, u8>,
    pending_poc: BTreeMap<u64, u8>,
    /// Lines that fetches would find stale.
    stale: BTreeSet<u64>,
    unified: BTreeSet<u64>,
    pending_unified: BTreeSet<u64>,
    pending_fetch: BTreeSet<u64>,
    trace: Vec<Op>,
    operands: Vec<u64>,
    violations: Vec<String>,
    sites: BTreeSet<Site>,
    mutation: Option<Mutation>,
    delayed: Option<(Op, u64)>,
    wrong: Option<Wrong>,
}

/// CPUs with one guest, [`FakeArm::GUEST`], seen from EL2 that runs with [`FakeArm::HOST`] loaded.
pub struct FakeArm {
    state: Mutex<State>,
    fetch_sees_data: bool,
}

impl FakeArm {
    /// The context that is loaded to begin with.
    pub const HOST: u16 = 0;
    /// The context whose tables changed.
    pub const GUEST: u16 = 7;

    /// CPUs that have cached the old translation of every page of `start..end`, 4 KiB each.
    #[must_use]
    pub fn caching(start: u64, end: u64) -> Self {
        let pages: BTreeSet<u64> = (start >> 12..end >> 12).collect();
        let state = State {
            synchronised: true,
            stage2: pages.clone(),
            combined: pages,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            fetch_sees_data: false,
        }
    }

    /// Caches in which every 64-byte line of `start..end` holds a newer value than memory.
    #[must_use]
    pub fn dirty(start: u64, end: u64, fetch_sees_data: bool) -> Self {
        let lines: Vec<u64> = (start / 64..end.div_ceil(64)).map(|n| n * 64).collect();
        let state = State {
            synchronised: true,
            dirty: lines.iter().map(|line| (*line, 1)).collect(),
            memory: lines.iter().map(|line| (*line, 0)).collect(),
            stale: lines.iter().copied().collect(),
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            fetch_sees_data,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one step go wrong.
    pub fn mutate(&self, mutation: Mutation) {
        self.state().mutation = Some(mutation);
    }

    /// Makes the machine do what the field did.
    pub fn misuse(&self, wrong: Wrong) {
        self.state().wrong = Some(wrong);
    }

    /// Every step seen so far.
    #[must_use]
    pub fn sites(&self) -> BTreeSet<Site> {
        self.state().sites.clone()
    }

    /// The instructions, in order.
    #[must_use]
    pub fn trace(&self) -> Vec<Op> {
        self.state().trace.clone()
    }

    /// The operands of invalidations and cache operations, in order.
    #[must_use]
    pub fn operands(&self) -> Vec<u64> {
        self.state().operands.clone()
    }

    /// What is wrong after an invalidation of `start..end`.
    #[must_use]
    pub fn finish_tlb(&self, start: u64, end: u64) -> Vec<String> {
        self.end_delayed();
        let mut state = self.state();
        let within = |page: &&u64| (start >> 12..end >> 12).contains(*page);
        if let Some(page) = state.stage2.iter().find(within).copied() {
            state
                .violations
                .push(format!("stage 2 of page {page:#x} still cached"));
        }
        if let Some(page) = state.combined.iter().find(within).copied() {
            state
                .violations
                .push(format!("combined entry of page {page:#x} still cached"));
        }
        if state.context != Self::HOST {
            state
                .violations
                .push("the context before was not loaded back".into());
        }
        if !state.synchronised {
            state
                .violations
                .push("the loaded context is not synchronised".into());
        }
        std::mem::take(&mut state.violations)
    }

    /// What is wrong after `start..end` was cleaned and invalidated.
    #[must_use]
    pub fn finish_data(&self, start: u64, end: u64) -> Vec<String> {
        self.end_delayed();
        let mut state = self.state();
        for line in (start / 64..end.div_ceil(64)).map(|n| n * 64) {
            if state.memory.get(&line) != Some(&1) {
                state
                    .violations
                    .push(format!("line {line:#x} did not reach memory"));
            }
            if state.dirty.contains_key(&line) {
                state
                    .violations
                    .push(format!("line {line:#x} is still cached"));
            }
        }
        std::mem::take(&mut state.violations)
    }

    /// What is wrong after `start..end` was made fit to be fetched.
    #[must_use]
    pub fn finish_fetch(&self, start: u64, end: u64) -> Vec<String> {
        self.end_delayed();
        let mut state = self.state();
        for line in (start / 64..end.div_ceil(64)).map(|n| n * 64) {
            if state.stale.contains(&line) {
                state
                    .violations
                    .push(format!("line {line:#x} is fetched stale"));
            }
        }
        if !state.synchronised {
            state.violations.push("fetches are not synchronised".into());
        }
        std::mem::take(&mut state.violations)
    }

    fn end_delayed(&self) {
        let mut state = self.state();
        if let Some((op, _)) = state.delayed.take() {
            state.violations.push(format!("ended before {op:?}"));
        }
    }

    fn step(&self, op: Op, operand: u64, at: &'static Location<'static>) {
        let site = Site::new(op, at);
        let mut state = self.state();
        state.sites.insert(site);
        let mutation = state.mutation.filter(|mutation| *mutation.site() == site);
        match mutation {
            Some(Mutation::Drop(_)) => return,
            Some(Mutation::Delay(_)) => {
                if let Some((op, operand)) = state.delayed.replace((op, operand)) {
                    state.perform(op, operand, self.fetch_sees_data);
                }
                return;
            }
            None => {}
        }
        state.perform(op, operand, self.fetch_sees_data);
        if let Some((op, operand)) = state.delayed.take() {
            state.perform(op, operand, self.fetch_sees_data);
        }
    }
}

impl State {
    fn perform(&mut self, op: Op, operand: u64, fetch_sees_data: bool) {
        self.trace.push(op);
        match op {
            Op::DsbIshst => self.published = true,
            Op::DsbIsh => self.complete(false),
            Op::DsbSy => self.complete(true),
            Op::Isb => (self.synchronised, self.completed) = (true, false),
            Op::Enter | Op::Leave => self.load(op, operand),
            Op::TlbiIpa | Op::TlbiRange | Op::TlbiStage1 | Op::TlbiBoth => {
                self.operands.push(operand);
                self.invalidate(op, operand);
            }
            Op::DcCivac => self.clean(operand),
            Op::DcCvau => {
                self.pending_unified.insert(operand);
            }
            Op::IcIvau => self.drop_fetches(&[operand], fetch_sees_data),
            Op::IcAll => {
                let all: Vec<u64> = self.stale.iter().copied().collect();
                self.drop_fetches(&all, fetch_sees_data);
            }
            _ => {}
        }
    }

    fn load(&mut self, op: Op, context: u64) {
        if op == Op::Enter && !self.published {
            self.violations
                .push("context entered before the stores are published".into());
        }
        if op == Op::Leave && self.completed {
            self.violations
                .push("context left before the invalidation is synchronised".into());
        }
        #[expect(clippy::cast_possible_truncation, reason = "contexts are 16 bits")]
        let context = context as u16;
        self.context = match (op, self.wrong) {
            (Op::Leave, Some(Wrong::RestoresTarget)) => FakeArm::GUEST,
            _ => context,
        };
        self.synchronised = false;
    }

    /// A TLBI starts; what it hits is gone when a barrier completes it.
    fn invalidate(&mut self, op: Op, operand: u64) {
        let in_guest = self.context == FakeArm::GUEST && self.synchronised && self.published;
        if !in_guest || self.wrong == Some(Wrong::OtherRegime) {
            return;
        }
        match op {
            Op::TlbiIpa => {
                let operand = match self.wrong {
                    Some(Wrong::UnshiftedOperand) => operand << 12,
                    _ => operand,
                };
                self.pending_stage2.extend(pages_of_leaf(operand));
            }
            Op::TlbiRange => {
                let (scale, num) = (operand >> 44 & 3, operand >> 39 & 31);
                let base = operand & 0x1f_ffff_ffff;
                self.pending_stage2
                    .extend(base..base + ((num + 1) << (5 * scale + 1)));
            }
            // A combined entry that goes is made again from a stage-2 entry that is still there.
            Op::TlbiStage1 => {
                let safe = self.combined.difference(&self.stage2).copied();
                self.pending_combined.extend(safe);
            }
            _ => {
                self.pending_stage2.extend(self.stage2.iter().copied());
                self.pending_combined.extend(self.combined.iter().copied());
            }
        }
    }

    fn complete(&mut self, system: bool) {
        let (stage2, combined) = (
            std::mem::take(&mut self.pending_stage2),
            std::mem::take(&mut self.pending_combined),
        );
        self.completed |= !(stage2.is_empty() && combined.is_empty());
        self.stage2.retain(|page| !stage2.contains(page));
        self.combined.retain(|page| !combined.contains(page));
        self.unified.append(&mut self.pending_unified);
        for line in std::mem::take(&mut self.pending_fetch) {
            self.stale.remove(&line);
        }
        if system {
            for (line, value) in std::mem::take(&mut self.pending_poc) {
                self.memory.insert(line, value);
            }
        }
    }

    fn clean(&mut self, line: u64) {
        self.operands.push(line);
        match self.wrong {
            Some(Wrong::InvalidateOnly) => {
                self.dirty.remove(&line);
            }
            Some(Wrong::PointOfUnification) => {
                self.pending_unified.insert(line);
            }
            _ => {
                if let Some(value) = self.dirty.remove(&line) {
                    self.pending_poc.insert(line, value);
                }
            }
        }
    }

    /// An instruction cache refills from the point of unification at once.
    fn drop_fetches(&mut self, lines: &[u64], fetch_sees_data: bool) {
        self.synchronised = false;
        for line in lines {
            if fetch_sees_data || self.unified.contains(line) {
                self.pending_fetch.insert(*line);
            }
        }
    }
}

/// The pages of the entry that a single-address operand names, by its level hint for 4 KiB.
fn pages_of_leaf(operand: u64) -> std::ops::Range<u64> {
    let page = operand & 0xff_ffff_ffff;
    match operand >> 44 & 0xf {
        0b0110 => page & !0x1ff..(page & !0x1ff) + 512,
        0b0101 => page & !0x3_ffff..(page & !0x3_ffff) + (1 << 18),
        _ => page..page + 1,
    }
}

impl ArmTlbOps for FakeArm {
    type Context = u16;
    type Saved = u16;

    fn dsb_ishst(&self) {
        self.step(Op::DsbIshst, 0, Location::caller());
    }
    fn dsb_ish(&self) {
        self.step(Op::DsbIsh, 0, Location::caller());
    }
    fn isb(&self) {
        self.step(Op::Isb, 0, Location::caller());
    }
    fn enter(&self, context: u16) -> u16 {
        let before = self.state().context;
        self.step(Op::Enter, context.into(), Location::caller());
        before
    }
    fn leave(&self, saved: u16) {
        self.step(Op::Leave, saved.into(), Location::caller());
    }
    fn tlbi_ipas2e1is(&self, operand: u64) {
        self.step(Op::TlbiIpa, operand, Location::caller());
    }
    fn tlbi_ripas2e1is(&self, operand: u64) {
        self.step(Op::TlbiRange, operand, Location::caller());
    }
    fn tlbi_vmalle1is(&self) {
        self.step(Op::TlbiStage1, 0, Location::caller());
    }
    fn tlbi_vmalls12e1is(&self) {
        self.step(Op::TlbiBoth, 0, Location::caller());
    }
}

impl ArmCacheOps for FakeArm {
    fn dc_civac(&self, line: Pa) {
        self.step(Op::DcCivac, line.get(), Location::caller());
    }
    fn dc_cvau(&self, line: Pa) {
        self.step(Op::DcCvau, line.get(), Location::caller());
    }
    fn ic_ivau(&self, line: Pa) {
        self.step(Op::IcIvau, line.get(), Location::caller());
    }
    fn ic_ialluis(&self) {
        self.step(Op::IcAll, 0, Location::caller());
    }
    fn dsb_ishst(&self) {
        self.step(Op::DsbIshst, 0, Location::caller());
    }
    fn dsb_ish(&self) {
        self.step(Op::DsbIsh, 0, Location::caller());
    }
    fn dsb_sy(&self) {
        self.step(Op::DsbSy, 0, Location::caller());
    }
    fn isb(&self) {
        self.step(Op::Isb, 0, Location::caller());
    }
}

impl std::fmt::Debug for FakeArm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeArm").finish_non_exhaustive()
    }
}
