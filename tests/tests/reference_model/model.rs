//! The specification: who owns which page, who reaches it, what is in it. Written to be read.
//!
//! A world of a few pages, the host, EL2 and two protected guests, each with one slot that covers all pages.
//! Every step says what it needs and what it changes; nothing else ever changes.

/// Guests of the world.
pub(crate) const GUESTS: usize = 2;

/// Who owns a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Owner {
    Host,
    Guest(usize),
}

/// What is in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Content {
    /// Zeros.
    Zero,
    /// Something that the host wrote.
    Hosts,
    /// Something that the host wrote and a guest's measurement covers.
    Measured,
    /// Something that a guest wrote for itself.
    Secret(usize),
    /// Something that a guest shares, or did share while the host could change it.
    Public,
}

/// A page.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Page {
    pub(crate) owner: Owner,
    /// Its guest shares it with the host.
    pub(crate) shared: bool,
    /// An unprotected VM reaches it, too.
    pub(crate) leased: bool,
    pub(crate) content: Content,
}

/// How a guest lost a page for good, or gave it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Note {
    Poisoned,
    Relinquished,
}

/// A VM's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Life {
    Absent,
    Building,
    Sealed,
    Dead,
}

/// A guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) life: Life,
    pub(crate) notes: Vec<Option<Note>>,
    /// What was donated to it, in order: first page and number.
    donations: Vec<(usize, usize)>,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) pages: Vec<Page>,
    pub(crate) guests: Vec<Guest>,
}

/// A step of somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The host creates a VM with its slot.
    Create(usize),
    /// The host donates pages: guest, first page, number, contents kept.
    Donate(usize, usize, usize, bool),
    /// The host seals a VM.
    Seal(usize),
    /// A guest shares pages: first, number.
    Share(usize, usize, usize),
    Unshare(usize, usize, usize),
    Relinquish(usize, usize),
    /// The host takes a page from whoever has it.
    Reclaim(usize),
    /// A guest writes to a page.
    GuestWrites(usize, usize),
    /// The host writes to a page.
    HostWrites(usize),
    /// The host lends a page to an unprotected VM, and ends that.
    Lease(usize),
    EndLease(usize),
    /// The host ends a VM, and takes one range of its memory back.
    Destroy(usize),
    TakeBack(usize),
}

/// What a step says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// It was done; so many pages.
    Done(usize),
    /// It was refused.
    No,
    /// The page is missing: the host is asked for it.
    Missing,
    /// These pages came back: first and number.
    Back(usize, usize),
}

impl Model {
    pub(crate) fn new(pages: usize) -> Self {
        let page = Page {
            owner: Owner::Host,
            shared: false,
            leased: false,
            content: Content::Zero,
        };
        let guest = Guest {
            life: Life::Absent,
            notes: vec![None; pages],
            donations: Vec::new(),
        };
        Self {
            pages: vec![page; pages],
            guests: vec![guest; GUESTS],
        }
    }

    /// Who reaches a page: the host if it is its own or shared with it.
    pub(crate) fn host_reaches(&self, page: usize) -> bool {
        self.pages[page].owner == Owner::Host || self.pages[page].shared
    }

    /// A living guest reaches what is its own.
    pub(crate) fn guest_reaches(&self, guest: usize, page: usize) -> bool {
        self.lives(guest) && self.pages[page].owner == Owner::Guest(guest)
    }

    pub(crate) fn lives(&self, guest: usize) -> bool {
        matches!(self.guests[guest].life, Life::Building | Life::Sealed)
    }

    fn runs(&self, guest: usize) -> bool {
        self.guests[guest].life == Life::Sealed
    }

    fn owns(&self, guest: usize, first: usize, count: usize, shared: bool) -> bool {
        let page = |n: usize| self.pages.get(n);
        (first..first + count)
            .all(|n| page(n).is_some_and(|p| p.owner == Owner::Guest(guest) && p.shared == shared))
    }

    fn give_back(&mut self, page: usize) {
        let page = &mut self.pages[page];
        page.owner = Owner::Host;
        page.shared = false;
        page.content = Content::Zero;
    }

    /// Does a step; says how it went.
    pub(crate) fn step(&mut self, step: Step) -> Said {
        match step {
            Step::Create(guest) => self.create(guest),
            Step::Donate(guest, first, count, keep) => self.donate(guest, first, count, keep),
            Step::Seal(guest) => self.seal(guest),
            Step::Share(guest, first, count) => self.share(guest, first, count, true),
            Step::Unshare(guest, first, count) => self.share(guest, first, count, false),
            Step::Relinquish(guest, page) => self.relinquish(guest, page),
            Step::Reclaim(page) => self.reclaim(page),
            Step::GuestWrites(guest, page) => self.guest_writes(guest, page),
            Step::HostWrites(page) => self.host_writes(page),
            Step::Lease(page) => self.lease(page, true),
            Step::EndLease(page) => self.lease(page, false),
            Step::Destroy(guest) => self.destroy(guest),
            Step::TakeBack(guest) => self.take_back(guest),
        }
    }

    fn create(&mut self, guest: usize) -> Said {
        let guest = &mut self.guests[guest];
        if guest.life != Life::Absent {
            return Said::No;
        }
        guest.life = Life::Building;
        guest.notes.fill(None);
        Said::Done(0)
    }

    fn donate(&mut self, guest: usize, first: usize, count: usize, keep: bool) -> Said {
        let range = first..first + count;
        let is_free = |n: usize| {
            let page = self.pages.get(n);
            page.is_some_and(|p| p.owner == Owner::Host && !p.leased)
        };
        let notes: Vec<_> = range
            .clone()
            .filter_map(|n| self.guests[guest].notes.get(n).copied().flatten())
            .collect();
        let allowed = self.lives(guest)
            && (!keep || !self.runs(guest))
            && range.clone().all(is_free)
            && (notes.is_empty() || (count == 1 && notes == [Note::Relinquished]));
        if !allowed {
            return Said::No;
        }
        for page in range {
            self.guests[guest].notes[page] = None;
            self.pages[page].owner = Owner::Guest(guest);
            self.pages[page].content = if keep {
                Content::Measured
            } else {
                Content::Zero
            };
        }
        self.guests[guest].donations.push((first, count));
        Said::Done(count)
    }

    fn seal(&mut self, guest: usize) -> Said {
        if self.guests[guest].life != Life::Building {
            return Said::No;
        }
        self.guests[guest].life = Life::Sealed;
        Said::Done(0)
    }

    /// A range is shared as a whole, or only its first page, or not at all.
    fn share(&mut self, guest: usize, first: usize, count: usize, shared: bool) -> Said {
        if !self.runs(guest) {
            return Said::No;
        }
        if self.pages[first].owner != Owner::Guest(guest) {
            let poisoned = self.guests[guest].notes[first] == Some(Note::Poisoned);
            return if shared && !poisoned {
                Said::Missing
            } else {
                Said::No
            };
        }
        let count = if self.owns(guest, first, count, !shared) {
            count
        } else {
            1
        };
        if !self.owns(guest, first, count, !shared) {
            return Said::No;
        }
        for page in &mut self.pages[first..first + count] {
            page.shared = shared;
            if page.content == Content::Secret(guest) || page.content == Content::Measured {
                page.content = Content::Public;
            }
        }
        Said::Done(count)
    }

    fn relinquish(&mut self, guest: usize, page: usize) -> Said {
        if !self.runs(guest) || !self.owns(guest, page, 1, false) {
            return Said::No;
        }
        self.guests[guest].notes[page] = Some(Note::Relinquished);
        self.give_back(page);
        Said::Done(1)
    }

    fn reclaim(&mut self, page: usize) -> Said {
        match self.pages[page].owner {
            Owner::Guest(guest) if self.lives(guest) => {
                self.guests[guest].notes[page] = Some(Note::Poisoned);
                self.give_back(page);
                Said::Done(1)
            }
            _ => Said::No,
        }
    }

    fn guest_writes(&mut self, guest: usize, page: usize) -> Said {
        if !self.runs(guest) {
            return Said::No;
        }
        if !self.guest_reaches(guest, page) {
            let poisoned = self.guests[guest].notes[page] == Some(Note::Poisoned);
            return if poisoned { Said::No } else { Said::Missing };
        }
        let page = &mut self.pages[page];
        page.content = if page.shared {
            Content::Public
        } else {
            Content::Secret(guest)
        };
        Said::Done(1)
    }

    fn host_writes(&mut self, page: usize) -> Said {
        if !self.host_reaches(page) {
            return Said::No;
        }
        let page = &mut self.pages[page];
        page.content = if page.shared {
            Content::Public
        } else {
            Content::Hosts
        };
        Said::Done(1)
    }

    fn lease(&mut self, page: usize, lease: bool) -> Said {
        let page = &mut self.pages[page];
        if page.owner != Owner::Host || page.leased == lease {
            return Said::No;
        }
        page.leased = lease;
        Said::Done(1)
    }

    fn destroy(&mut self, guest: usize) -> Said {
        if !self.lives(guest) {
            return Said::No;
        }
        self.guests[guest].life = Life::Dead;
        Said::Done(0)
    }

    /// The latest donation first; of each, the first pages that are still the guest's.
    fn take_back(&mut self, guest: usize) -> Said {
        if self.guests[guest].life != Life::Dead {
            return Said::No;
        }
        while let Some((first, count)) = self.guests[guest].donations.pop() {
            let end = first + count;
            let is_its = |n: &usize| self.pages[*n].owner == Owner::Guest(guest);
            let Some(start) = (first..end).find(is_its) else {
                continue;
            };
            let stop = (start..end).find(|n| !is_its(n)).unwrap_or(end);
            (start..stop).for_each(|page| self.give_back(page));
            if stop < end {
                self.guests[guest].donations.push((stop, end - stop));
            }
            return Said::Back(start, stop - start);
        }
        self.guests[guest].life = Life::Absent;
        Said::Done(0)
    }

    /// What must hold whatever happened: the promises, apart from the steps.
    pub(crate) fn promises(&self) -> Result<(), String> {
        for (number, page) in self.pages.iter().enumerate() {
            let wrong = |what: &str| Err(format!("page {number}: {what}: {page:?}"));
            if page.owner == Owner::Host && page.shared {
                return wrong("shared by nobody");
            }
            if page.leased && page.owner != Owner::Host {
                return wrong("an unprotected VM reaches a guest's page");
            }
            if self.host_reaches(number) && matches!(page.content, Content::Secret(_)) {
                return wrong("the host reaches a secret");
            }
            if let Owner::Guest(guest) = page.owner {
                if self.guests[guest].life == Life::Absent {
                    return wrong("its owner does not exist");
                }
                if self.guests[guest].notes[number].is_some() && self.lives(guest) {
                    return wrong("its owner has lost it");
                }
                if page.content == Content::Hosts {
                    return wrong("a guest finds what the host wrote");
                }
                if matches!(page.content, Content::Secret(other) if other != guest) {
                    return wrong("a guest finds another one's secret");
                }
            }
        }
        Ok(())
    }

    /// All that later steps can depend on, the same for worlds that only differ in names.
    pub(crate) fn key(&self) -> Key {
        let key = |swap: bool| {
            let name = |guest: usize| if swap { GUESTS - 1 - guest } else { guest };
            let page = |(number, page): (usize, &Page)| {
                let mut page = page.clone();
                if let Owner::Guest(guest) = page.owner {
                    page.owner = Owner::Guest(name(guest));
                }
                if let Content::Secret(guest) = page.content {
                    page.content = Content::Secret(name(guest));
                }
                let mut notes: Vec<_> = self.guests.iter().map(|g| g.notes[number]).collect();
                if swap {
                    notes.reverse();
                }
                (page, notes)
            };
            let mut pages: Vec<_> = self.pages.iter().enumerate().map(page).collect();
            pages.sort();
            let mut lives: Vec<_> = self.guests.iter().map(|g| g.life).collect();
            if swap {
                lives.reverse();
            }
            (pages, lives)
        };
        key(false).min(key(true))
    }
}

/// See [`Model::key`].
pub(crate) type Key = (Vec<(Page, Vec<Option<Note>>)>, Vec<Life>);
