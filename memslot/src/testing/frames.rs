//! Frames behind slots, with pins that are counted.

use std::boxed::Box;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use stage2::Pfn;

use crate::account::LockedMemory;
use crate::addr::{Gfn, GfnRange};
use crate::fault::Access;
use crate::frames::{FrameMissing, FrameRun, FrameSource, PinIntent};
use crate::slot::Memslot;
use crate::sync::{AtomicU64, Ordering};

/// What is pinned, and what was written while it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameState {
    /// Pins of each frame.
    pub pins: BTreeMap<u64, u64>,
    /// Frames that were unpinned as written.
    pub dirtied: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct Knobs {
    /// Page of a slot that cannot be pinned.
    bad_page: Option<u64>,
    /// Pages of a slot that have no frame yet.
    missing: BTreeSet<u64>,
    /// Set the limit to this after that many pins.
    lower_limit_after: Option<(u64, u64)>,
    /// Change the sequence after that many pins.
    move_after: Option<u64>,
    pins_done: u64,
}

/// What happens after the next call.
#[derive(Default)]
struct Hook(Option<Box<dyn FnOnce() + Send>>);

impl Hook {
    fn run(hook: &Mutex<Self>) {
        let once = lock(hook).0.take();
        if let Some(f) = once {
            f();
        }
    }
}

impl core::fmt::Debug for Hook {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Hook").field(&self.0.is_some()).finish()
    }
}

/// A slot's frames are consecutive from the frame that its backing names, in runs of a chosen
/// length.
#[derive(Debug)]
pub struct FakeFrames {
    /// Longest run handed out.
    run: u64,
    account: LockedMemory,
    state: Mutex<FrameState>,
    knobs: Mutex<Knobs>,
    after_look_up: Mutex<Hook>,
    after_pin: Mutex<Hook>,
    /// Frames by which every backing has moved.
    moved_by: AtomicU64,
    sequence: AtomicU64,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeFrames {
    /// Frames in runs of `run` pages; at most `limit` pages may be locked.
    #[must_use]
    pub fn new(run: u64, limit: u64) -> Self {
        Self {
            run,
            account: LockedMemory::new(limit),
            state: Mutex::default(),
            knobs: Mutex::default(),
            after_look_up: Mutex::default(),
            after_pin: Mutex::default(),
            moved_by: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
        }
    }

    /// What is pinned now.
    #[must_use]
    pub fn state(&self) -> FrameState {
        lock(&self.state).clone()
    }

    /// Page `index` of any slot cannot be pinned from now on; `None` ends that.
    pub fn fail_pin_at(&self, index: Option<u64>) {
        lock(&self.knobs).bad_page = index;
    }

    /// Page `index` of any slot has no frame.
    pub fn take_frame(&self, index: u64) {
        lock(&self.knobs).missing.insert(index);
    }

    /// After `pins` more pins the limit becomes `limit`.
    pub fn lower_limit_after(&self, pins: u64, limit: u64) {
        let mut knobs = lock(&self.knobs);
        knobs.lower_limit_after = Some((knobs.pins_done + pins, limit));
    }

    /// After `pins` more pins a backing changes.
    pub fn move_backing_after(&self, pins: u64) {
        let mut knobs = lock(&self.knobs);
        knobs.move_after = Some(knobs.pins_done + pins);
    }

    /// Does something else once, right after the next look-up.
    pub fn after_next_look_up(&self, f: impl FnOnce() + Send + 'static) {
        lock(&self.after_look_up).0 = Some(Box::new(f));
    }

    /// Does something else once, right after the next pin.
    pub fn after_next_pin(&self, f: impl FnOnce() + Send + 'static) {
        lock(&self.after_pin).0 = Some(Box::new(f));
    }

    /// Puts other frames behind every slot: those `by` further on.
    pub fn move_backing(&self, by: u64) {
        self.moved_by.fetch_add(by, Ordering::AcqRel);
        self.sequence.fetch_add(1, Ordering::AcqRel);
    }

    fn run_of(&self, slot: &Memslot, gfn: Gfn) -> Option<FrameRun> {
        let index = gfn.get().checked_sub(slot.range.start().get())?;
        let first = index - index % self.run;
        let start = slot.range.start().get() + first;
        let end = (start + self.run).min(slot.range.end());
        // Runs do not touch: a gap of one frame between any two.
        let pfn = slot.backing
            + self.moved_by.load(Ordering::Acquire)
            + first
            + if self.run < slot.range.npages() {
                first / self.run
            } else {
                0
            };
        Some(FrameRun {
            range: GfnRange::new(start, end)?,
            pfn: Pfn::try_new(pfn)?,
        })
    }

    fn after_pin(&self) {
        Hook::run(&self.after_pin);
        let mut knobs = lock(&self.knobs);
        knobs.pins_done += 1;
        if let Some((at, limit)) = knobs.lower_limit_after
            && knobs.pins_done >= at
        {
            self.account.set_limit(limit);
        }
        if knobs.move_after.is_some_and(|at| knobs.pins_done >= at) {
            self.sequence.fetch_add(1, Ordering::AcqRel);
            knobs.move_after = None;
        }
    }
}

impl FrameSource for FakeFrames {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _access: Access) -> Result<FrameRun, FrameMissing> {
        let index = gfn.get() - slot.range.start().get();
        let run = self.run_of(slot, gfn).ok_or(FrameMissing(gfn))?;
        Hook::run(&self.after_look_up);
        if lock(&self.knobs).missing.contains(&index) {
            Err(FrameMissing(gfn))
        } else {
            Ok(run)
        }
    }

    fn pin(
        &self,
        slot: &Memslot,
        want: GfnRange,
        _intent: PinIntent,
    ) -> Result<FrameRun, FrameMissing> {
        let whole = self
            .run_of(slot, want.start())
            .ok_or(FrameMissing(want.start()))?;
        let range = whole
            .range
            .intersection(want)
            .ok_or(FrameMissing(want.start()))?;
        let bad = lock(&self.knobs)
            .bad_page
            .and_then(|i| Gfn::try_new(slot.range.start().get() + i));
        let range = match bad {
            Some(bad) if bad == range.start() => return Err(FrameMissing(bad)),
            Some(bad) if range.contains(bad) => {
                GfnRange::new(range.start().get(), bad.get()).ok_or(FrameMissing(bad))?
            }
            _ => range,
        };
        let skip = range.start().get() - whole.range.start().get();
        let pfn = whole.pfn.get() + skip;
        let mut state = lock(&self.state);
        for frame in pfn..pfn + range.npages() {
            *state.pins.entry(frame).or_default() += 1;
        }
        drop(state);
        self.after_pin();
        Ok(FrameRun {
            range,
            pfn: Pfn::try_new(pfn).ok_or(FrameMissing(want.start()))?,
        })
    }

    fn unpin(&self, _slot: &Memslot, run: FrameRun, intent: PinIntent) {
        let mut state = lock(&self.state);
        for frame in run.pfn.get()..run.pfn.get() + run.range.npages() {
            let pins = state
                .pins
                .get_mut(&frame)
                .expect("unpin of a frame that is not pinned");
            *pins -= 1;
            if *pins == 0 {
                state.pins.remove(&frame);
            }
            if intent == PinIntent::Write {
                state.dirtied.insert(frame);
            }
        }
    }

    fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Acquire)
    }

    fn account(&self) -> &LockedMemory {
        &self.account
    }
}
