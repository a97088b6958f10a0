//! The specification of an unprotected VM's memory: what the host takes back, looks at, logs and changes
//! while the guest uses it. Written to be read.
//!
//! One slot of a few pages, its first half before a boundary and the rest behind it: a change in steps
//! takes one half at a time. There are two places where the slot can be.

use abi::ErrorCode;

/// Places of the slot.
pub(crate) const PLACES: usize = 2;

/// A page's mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Leaf {
    pub(crate) writable: bool,
    pub(crate) young: bool,
}

/// A page of the slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Page {
    /// Where the slot is, or was when its leaving began.
    pub(crate) leaf: Option<Leaf>,
    /// The host has taken it back.
    pub(crate) unshared: bool,
    /// The log says that it was written.
    pub(crate) dirty: bool,
}

/// A change that is half done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Half {
    Deleted,
    MovedTo(usize),
    Logged,
    Reset,
    /// All leaves are gone, and the VM's last step finds nothing left.
    ResetWhole,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Plain {
    /// Where the slot is; while it leaves, where it was.
    pub(crate) place: Option<usize>,
    pub(crate) logged: bool,
    pub(crate) pages: Vec<Page>,
    pub(crate) half: Option<Half>,
    /// Devices that snoop.
    pub(crate) devices: u32,
}

/// A step of the host, or of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The host creates the slot at a place, logged or not.
    Create(usize, bool),
    /// The guest reads or writes a page of a place.
    Touch(usize, usize, bool),
    /// A vCPU enters.
    Enter,
    Unshare(usize, usize),
    Share(usize, usize),
    /// How many of these pages are young; then they are old.
    Young(usize, usize, bool),
    /// A page becomes writable, or only young.
    Relax(usize, bool),
    /// The log of all pages.
    Dirty,
    /// One step of each change.
    Delete,
    Move(usize),
    Log(bool),
    Reset,
    /// A device that snoops comes, or goes.
    Device(bool),
}

/// What a step says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// It was done, and this is the answer.
    Value(u64),
    /// It was refused, or is to be repeated.
    No(ErrorCode),
    /// The guest's access: the host is asked for the page.
    Missing,
    /// There is no memory: a device, if anything.
    Device,
    /// It waits.
    Waits,
}

const DONE: Said = Said::Value(0);
const AGAIN: Said = Said::No(ErrorCode::Again);
const BUSY: Said = Said::No(ErrorCode::Busy);

impl Plain {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            place: None,
            logged: false,
            pages: vec![Page::default(); pages],
            half: None,
            devices: 0,
        }
    }

    /// Whether the slot is there for the host.
    fn slot(&self) -> Result<usize, Said> {
        self.place.ok_or(Said::No(ErrorCode::NotFound))
    }

    /// Does a step; says how it went.
    pub(crate) fn step(&mut self, step: Step) -> Said {
        let is_same = match (self.half, step) {
            (None, _) => true,
            (Some(Half::Deleted), Step::Delete) => true,
            (Some(Half::MovedTo(to)), Step::Move(place)) => to == place,
            (Some(Half::Logged), Step::Log(_)) => true,
            // The call that created it goes on.
            (Some(Half::Logged), Step::Create(place, true)) => self.place == Some(place),
            (Some(Half::Reset | Half::ResetWhole), Step::Reset) => true,
            _ => false,
        };
        let said = match step {
            Step::Touch(place, page, writes) => Ok(self.touch(place, page, writes)),
            Step::Enter => Ok(self.enter()),
            // It goes at any time.
            Step::Device(false) => Ok(self.device(false)),
            _ if !is_same => Ok(BUSY),
            Step::Create(place, logged) => self.create(place, logged),
            Step::Unshare(first, count) => self.unshare(first, count),
            Step::Share(first, count) => self.share(first, count),
            Step::Young(first, count, clear) => self.young(first, count, clear),
            Step::Relax(page, writes) => self.relax(page, writes),
            Step::Dirty => self.dirty(),
            Step::Delete => self.leave(Half::Deleted),
            Step::Move(to) => self.leave(Half::MovedTo(to)),
            Step::Log(on) => self.log(on),
            Step::Reset => Ok(self.reset()),
            Step::Device(true) => Ok(self.device(true)),
        };
        said.unwrap_or_else(|refused| refused)
    }

    fn create(&mut self, place: usize, logged: bool) -> Result<Said, Said> {
        if self.half == Some(Half::Logged) {
            return self.log(true);
        }
        if self.place.is_some() {
            return Err(Said::No(ErrorCode::Exists));
        }
        self.place = Some(place);
        self.logged = logged;
        self.pages.fill(Page::default());
        if !logged {
            return Ok(DONE);
        }
        // Its log begins, in two steps.
        self.half = Some(Half::Logged);
        Err(AGAIN)
    }

    /// A leaf that allows the access is used; else the fault gives what the slot allows.
    fn touch(&mut self, place: usize, page: usize, writes: bool) -> Said {
        let here = self.place == Some(place);
        let leaf = self.pages[page].leaf.filter(|_| here);
        if leaf.is_some_and(|leaf| leaf.young && (leaf.writable || !writes)) {
            return DONE;
        }
        match self.half {
            Some(Half::Deleted) => return Said::Device,
            Some(Half::MovedTo(to)) if here || to == place => return Said::Waits,
            _ if !here => return Said::Device,
            _ => {}
        }
        let logged = self.logged;
        let page = &mut self.pages[page];
        // The bit comes first, and stays if there is no page.
        page.dirty |= logged && writes;
        if page.unshared {
            return Said::Missing;
        }
        let had = page.leaf.is_some_and(|leaf| leaf.writable);
        page.leaf = Some(Leaf {
            writable: had || writes || !logged,
            young: true,
        });
        DONE
    }

    fn enter(&self) -> Said {
        match self.half {
            Some(Half::MovedTo(_) | Half::Reset | Half::ResetWhole) => BUSY,
            _ => DONE,
        }
    }

    fn unshare(&mut self, first: usize, count: usize) -> Result<Said, Said> {
        self.slot()?;
        let pages = &mut self.pages[first..first + count];
        if pages.iter().any(|page| page.unshared) {
            return Err(Said::No(ErrorCode::Exists));
        }
        for page in pages {
            page.unshared = true;
            page.leaf = None;
        }
        Ok(DONE)
    }

    fn share(&mut self, first: usize, count: usize) -> Result<Said, Said> {
        self.slot()?;
        let pages = &mut self.pages[first..first + count];
        if pages.iter().any(|page| !page.unshared) {
            return Err(Said::No(ErrorCode::Invalid));
        }
        pages.iter_mut().for_each(|page| page.unshared = false);
        Ok(DONE)
    }

    fn young(&mut self, first: usize, count: usize, clear: bool) -> Result<Said, Said> {
        self.slot()?;
        let mut young = 0;
        let pages = &mut self.pages[first..first + count];
        for leaf in pages.iter_mut().filter_map(|page| page.leaf.as_mut()) {
            young += u64::from(leaf.young);
            leaf.young &= !clear;
        }
        Ok(Said::Value(young))
    }

    fn relax(&mut self, page: usize, writes: bool) -> Result<Said, Said> {
        self.slot()?;
        let logged = self.logged;
        let page = &mut self.pages[page];
        let leaf = page.leaf.as_mut();
        let leaf = leaf.ok_or(Said::No(ErrorCode::NotFound))?;
        leaf.young = true;
        leaf.writable |= writes;
        page.dirty |= logged && writes;
        Ok(DONE)
    }

    fn dirty(&mut self) -> Result<Said, Said> {
        self.slot()?;
        if !self.logged {
            return Err(Said::No(ErrorCode::Invalid));
        }
        let mut bits = 0;
        // From the first dirty page to the last.
        let dirty: Vec<_> = (0..self.pages.len())
            .filter(|n| self.pages[*n].dirty)
            .collect();
        let protects = match (dirty.first(), dirty.last()) {
            (Some(first), Some(last)) => *first..=*last,
            _ => return Ok(DONE),
        };
        for number in protects {
            let page = &mut self.pages[number];
            bits |= u64::from(core::mem::take(&mut page.dirty)) << number;
            if let Some(leaf) = &mut page.leaf {
                leaf.writable = false;
            }
        }
        Ok(Said::Value(bits))
    }

    /// The leaves of one half go.
    fn vacate(&mut self, second: bool) {
        let middle = self.pages.len() / 2;
        let half = if second {
            &mut self.pages[middle..]
        } else {
            &mut self.pages[..middle]
        };
        half.iter_mut().for_each(|page| page.leaf = None);
    }

    /// The slot goes from its place, in two steps.
    fn leave(&mut self, how: Half) -> Result<Said, Said> {
        self.slot()?;
        if self.half.is_none() {
            let moves = matches!(how, Half::MovedTo(_));
            if moves && self.pages.iter().any(|page| page.unshared) {
                return Err(Said::No(ErrorCode::Exists));
            }
            self.half = Some(how);
            self.vacate(false);
            return Err(AGAIN);
        }
        self.vacate(true);
        self.half = None;
        self.pages.iter_mut().for_each(|page| page.unshared = false);
        self.place = match how {
            Half::MovedTo(place) => Some(place),
            _ => None,
        };
        Ok(DONE)
    }

    fn log(&mut self, on: bool) -> Result<Said, Said> {
        self.slot()?;
        match (on, self.half) {
            (true, Some(Half::Logged)) => {
                self.vacate(true);
                self.half = None;
                Ok(DONE)
            }
            (true, _) if !self.logged => {
                self.logged = true;
                self.pages.iter_mut().for_each(|page| page.dirty = false);
                self.vacate(false);
                self.half = Some(Half::Logged);
                Err(AGAIN)
            }
            (true, _) => Ok(DONE),
            (false, _) => {
                self.logged = false;
                self.half = None;
                self.pages.iter_mut().for_each(|page| page.dirty = false);
                Ok(DONE)
            }
        }
    }

    fn reset(&mut self) -> Said {
        match self.half {
            _ if self.place.is_none() => DONE,
            None => {
                self.vacate(false);
                self.half = Some(Half::Reset);
                AGAIN
            }
            Some(Half::Reset) => {
                self.vacate(true);
                self.half = Some(Half::ResetWhole);
                AGAIN
            }
            _ => {
                self.half = None;
                DONE
            }
        }
    }

    fn device(&mut self, comes: bool) -> Said {
        match (comes, self.devices) {
            (true, devices) => self.devices = devices + 1,
            (false, 0) => return Said::No(ErrorCode::Invalid),
            (false, devices) => self.devices = devices - 1,
        }
        DONE
    }

    /// What must hold whatever happened: the promises, apart from the steps.
    pub(crate) fn promises(&self) -> Result<(), String> {
        for (number, page) in self.pages.iter().enumerate() {
            let wrong = |what: &str| Err(format!("page {number}: {what}: {self:?}"));
            if page.leaf.is_some() && self.place.is_none() {
                return wrong("mapped without a slot");
            }
            if page.leaf.is_some() && page.unshared {
                return wrong("the guest reaches what the host took back");
            }
            let writable = page.leaf.is_some_and(|leaf| leaf.writable);
            if writable && self.logged && self.half.is_none() && !page.dirty {
                return wrong("a write would not be in the log");
            }
        }
        Ok(())
    }
}
