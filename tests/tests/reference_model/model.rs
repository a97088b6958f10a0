//! The specification: who owns which page, who reaches it, what is in it; how far each VM's life has come.
//! Written to be read.
//!
//! A world of a few pages, the host, EL2, two protected guests, each with one slot that covers all pages, and
//! two unprotected VMs, of which only the leases are here. Every step says what it needs, what it says if
//! that lacks, and what it changes; nothing else ever changes.

use abi::ErrorCode;

/// Protected guests of the world.
pub(crate) const GUESTS: usize = 2;
/// Unprotected VMs, to which the host lends pages.
pub(crate) const BORROWERS: usize = 2;

/// Who owns a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Owner {
    Host,
    /// EL2, for good: its heap.
    Heap,
    /// EL2, for this guest's state and tables.
    State(usize),
    Guest(usize),
}

/// What is in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Content {
    /// Zeros.
    Zero,
    /// Something that the host wrote.
    Hosts,
    /// Something that EL2 wrote for itself.
    El2s,
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
    Free,
    Reserved,
    Building,
    Sealed,
    /// It ends, in two steps.
    Dying,
    Dead,
}

/// A guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) life: Life,
    pub(crate) notes: Vec<Option<Note>>,
    /// What was donated for it, in order: to whom, first page and number.
    donations: Vec<(Owner, usize, usize)>,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) pages: Vec<Page>,
    pub(crate) guests: Vec<Guest>,
    /// What unprotected VMs reach: the VM, first page and number.
    pub(crate) leases: Vec<(usize, usize, usize)>,
}

/// A step of somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The host reserves a handle.
    Reserve,
    /// The host creates a VM, its state in a page, and its slot.
    Create(usize, usize),
    /// The host gives a VM pages for its tables: first, number.
    TopUp(usize, usize, usize),
    /// The host gives EL2 pages for its heap.
    DonateHeap(usize, usize),
    /// The host donates pages: guest, first page, number, contents kept.
    Donate(usize, usize, usize, bool),
    /// The host seals a VM.
    Seal(usize),
    /// A guest shares pages: first, number.
    Share(usize, usize, usize),
    Unshare(usize, usize, usize),
    Relinquish(usize, usize, usize),
    /// The host takes a page from whoever has it.
    Reclaim(usize),
    /// A guest writes to a page.
    GuestWrites(usize, usize),
    /// The host writes to a page.
    HostWrites(usize),
    /// The host lends pages to an unprotected VM, and ends that.
    Lease(usize, usize, usize),
    EndLease(usize, usize, usize),
    /// An unprotected VM ends.
    EndLeases(usize),
    /// The host takes a step towards the end of a VM; the same while somebody uses the VM.
    Destroy(usize),
    DestroyInUse(usize),
    /// The host takes one range of what it donated for a VM back.
    TakeBack(usize),
}

/// What a step says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// It was done; so many pages, or this handle.
    Done(usize),
    /// The host's call was refused, or is to be repeated.
    No(ErrorCode),
    /// A guest's call, or an access.
    Refused,
    /// The page is missing: the host is asked for it.
    Missing,
    /// These pages came back: first and number.
    Back(usize, usize),
}

type Answer = Result<Said, ErrorCode>;

impl Model {
    pub(crate) fn new(pages: usize) -> Self {
        let page = Page {
            owner: Owner::Host,
            shared: false,
            content: Content::Zero,
        };
        let guest = Guest {
            life: Life::Free,
            notes: vec![None; pages],
            donations: Vec::new(),
        };
        Self {
            pages: vec![page; pages],
            guests: vec![guest; GUESTS],
            leases: Vec::new(),
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

    fn is_lent(&self, page: usize) -> bool {
        let holds =
            |(_, first, count): &(usize, usize, usize)| (*first..first + count).contains(&page);
        self.leases.iter().any(holds)
    }

    fn all(&self, first: usize, count: usize, is: impl Fn(&Page) -> bool) -> bool {
        let pages = self.pages.get(first..first + count);
        pages.is_some_and(|pages| pages.iter().all(is))
    }

    fn owns(&self, guest: usize, first: usize, count: usize, shared: bool) -> bool {
        let owner = Owner::Guest(guest);
        self.all(first, count, |p| p.owner == owner && p.shared == shared)
    }

    /// What is taken from the host is all its own, and lent to nobody.
    pub(crate) fn may_leave_the_host(&self, first: usize, count: usize) -> Result<(), ErrorCode> {
        if !self.all(first, count, |page| page.owner == Owner::Host) {
            return Err(ErrorCode::NotPermitted);
        }
        if (first..first + count).any(|page| self.is_lent(page)) {
            return Err(ErrorCode::Busy);
        }
        Ok(())
    }

    fn give_to_el2(&mut self, owner: Owner, first: usize, count: usize) {
        for page in &mut self.pages[first..first + count] {
            page.owner = owner;
            page.content = Content::El2s;
        }
    }

    fn give_back(&mut self, page: usize) {
        let page = &mut self.pages[page];
        page.owner = Owner::Host;
        page.shared = false;
        page.content = Content::Zero;
    }

    /// Does a step; says how it went.
    pub(crate) fn step(&mut self, step: Step) -> Said {
        let answer = match step {
            Step::Reserve => self.reserve(),
            Step::Create(guest, page) => self.create(guest, page),
            Step::TopUp(guest, first, count) => self.top_up(guest, first, count),
            Step::DonateHeap(first, count) => self.donate_heap(first, count),
            Step::Donate(guest, first, count, keep) => self.donate(guest, first, count, keep),
            Step::Seal(guest) => self.seal(guest),
            Step::Share(guest, first, count) => Ok(self.share(guest, first, count, true)),
            Step::Unshare(guest, first, count) => Ok(self.share(guest, first, count, false)),
            Step::Relinquish(guest, first, count) => Ok(self.relinquish(guest, first, count)),
            Step::Reclaim(page) => self.reclaim(page),
            Step::GuestWrites(guest, page) => Ok(self.guest_writes(guest, page)),
            Step::HostWrites(page) => Ok(self.host_writes(page)),
            Step::Lease(vm, first, count) => self.lease(vm, first, count),
            Step::EndLease(vm, first, count) => self.end_lease(vm, first, count),
            Step::EndLeases(vm) => {
                self.leases.retain(|(other, ..)| *other != vm);
                Ok(Said::Done(0))
            }
            Step::Destroy(guest) => self.destroy(guest),
            Step::DestroyInUse(guest) if self.lives(guest) => Err(ErrorCode::Busy),
            Step::DestroyInUse(_) => Err(ErrorCode::NotFound),
            Step::TakeBack(guest) => self.take_back(guest),
        };
        answer.unwrap_or_else(Said::No)
    }

    fn reserve(&mut self) -> Answer {
        let free = self.guests.iter().position(|g| g.life == Life::Free);
        let guest = free.ok_or(ErrorCode::NoSpace)?;
        self.guests[guest].life = Life::Reserved;
        Ok(Said::Done(guest))
    }

    fn create(&mut self, guest: usize, page: usize) -> Answer {
        if self.guests[guest].life != Life::Reserved {
            return Err(ErrorCode::Exists);
        }
        self.may_leave_the_host(page, 1)?;
        self.give_to_el2(Owner::State(guest), page, 1);
        let guest_page = (Owner::State(guest), page, 1);
        let guest = &mut self.guests[guest];
        guest.life = Life::Building;
        guest.notes.fill(None);
        guest.donations = vec![guest_page];
        Ok(Said::Done(1))
    }

    fn top_up(&mut self, guest: usize, first: usize, count: usize) -> Answer {
        if !self.lives(guest) {
            return Err(ErrorCode::NotFound);
        }
        self.may_leave_the_host(first, count)?;
        let owner = Owner::State(guest);
        self.give_to_el2(owner, first, count);
        self.guests[guest].donations.push((owner, first, count));
        Ok(Said::Done(0))
    }

    fn donate_heap(&mut self, first: usize, count: usize) -> Answer {
        self.may_leave_the_host(first, count)?;
        self.give_to_el2(Owner::Heap, first, count);
        Ok(Said::Done(0))
    }

    fn donate(&mut self, guest: usize, first: usize, count: usize, keep: bool) -> Answer {
        let range = first..first + count;
        if !self.lives(guest) || range.end > self.pages.len() {
            return Err(ErrorCode::NotFound);
        }
        if keep && self.runs(guest) {
            return Err(ErrorCode::NotPermitted);
        }
        self.may_leave_the_host(first, count)?;
        let notes = &mut self.guests[guest].notes[range.clone()];
        let has_notes = notes.iter().any(Option::is_some);
        if has_notes && (count > 1 || notes != [Some(Note::Relinquished)]) {
            return Err(ErrorCode::NotPermitted);
        }
        notes.fill(None);
        for page in &mut self.pages[range] {
            page.owner = Owner::Guest(guest);
            page.content = if keep {
                Content::Measured
            } else {
                Content::Zero
            };
        }
        let donations = &mut self.guests[guest].donations;
        donations.push((Owner::Guest(guest), first, count));
        Ok(Said::Done(0))
    }

    fn seal(&mut self, guest: usize) -> Answer {
        if !self.lives(guest) {
            return Err(ErrorCode::NotFound);
        }
        if self.runs(guest) {
            return Err(ErrorCode::NotPermitted);
        }
        self.guests[guest].life = Life::Sealed;
        Ok(Said::Done(0))
    }

    /// A range is shared as a whole, or only its first page, or not at all.
    fn share(&mut self, guest: usize, first: usize, count: usize, shared: bool) -> Said {
        if !self.runs(guest) {
            return Said::Refused;
        }
        if self.pages[first].owner != Owner::Guest(guest) {
            let poisoned = self.guests[guest].notes[first] == Some(Note::Poisoned);
            return if shared && !poisoned {
                Said::Missing
            } else {
                Said::Refused
            };
        }
        let Some(count) = self.movable(guest, first, count, !shared) else {
            return Said::Refused;
        };
        for page in &mut self.pages[first..first + count] {
            page.shared = shared;
            if page.content == Content::Secret(guest) || page.content == Content::Measured {
                page.content = Content::Public;
            }
        }
        Said::Done(count)
    }

    /// All pages of a range if they are the guest's and shared as said, else the first one if that is.
    fn movable(&self, guest: usize, first: usize, count: usize, shared: bool) -> Option<usize> {
        let can = |count: &usize| self.owns(guest, first, *count, shared);
        [count, 1].into_iter().find(can)
    }

    fn relinquish(&mut self, guest: usize, first: usize, count: usize) -> Said {
        let count = self.movable(guest, first, count, false);
        let Some(count) = count.filter(|_| self.runs(guest)) else {
            return Said::Refused;
        };
        for page in first..first + count {
            self.guests[guest].notes[page] = Some(Note::Relinquished);
            self.give_back(page);
        }
        Said::Done(count)
    }

    fn reclaim(&mut self, page: usize) -> Answer {
        match self.pages[page].owner {
            Owner::Guest(guest) if self.lives(guest) => {
                self.guests[guest].notes[page] = Some(Note::Poisoned);
                self.give_back(page);
                Ok(Said::Done(0))
            }
            _ => Err(ErrorCode::NotFound),
        }
    }

    fn guest_writes(&mut self, guest: usize, page: usize) -> Said {
        if !self.runs(guest) {
            return Said::Refused;
        }
        if !self.guest_reaches(guest, page) {
            let poisoned = self.guests[guest].notes[page] == Some(Note::Poisoned);
            return if poisoned {
                Said::Refused
            } else {
                Said::Missing
            };
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
            return Said::Refused;
        }
        let page = &mut self.pages[page];
        page.content = if page.shared {
            Content::Public
        } else {
            Content::Hosts
        };
        Said::Done(1)
    }

    fn lease(&mut self, vm: usize, first: usize, count: usize) -> Answer {
        if !self.all(first, count, |page| page.owner == Owner::Host) {
            return Err(ErrorCode::NotPermitted);
        }
        self.leases.push((vm, first, count));
        Ok(Said::Done(0))
    }

    fn end_lease(&mut self, vm: usize, first: usize, count: usize) -> Answer {
        let lease = (vm, first, count);
        let at = self.leases.iter().position(|l| *l == lease);
        self.leases.remove(at.ok_or(ErrorCode::NotFound)?);
        Ok(Said::Done(0))
    }

    fn destroy(&mut self, guest: usize) -> Answer {
        let life = &mut self.guests[guest].life;
        match life {
            Life::Free => Err(ErrorCode::NotFound),
            Life::Reserved | Life::Dead => Ok(Said::Done(0)),
            Life::Building | Life::Sealed => {
                *life = Life::Dying;
                Err(ErrorCode::Again)
            }
            Life::Dying => {
                *life = Life::Dead;
                Ok(Said::Done(0))
            }
        }
    }

    /// The latest donation first; of each, the first pages that still belong to whom they were given.
    fn take_back(&mut self, guest: usize) -> Answer {
        match self.guests[guest].life {
            Life::Reserved | Life::Dead => {}
            _ => return Err(ErrorCode::Invalid),
        }
        while let Some((owner, first, count)) = self.guests[guest].donations.pop() {
            let end = first + count;
            let is_its = |n: &usize| self.pages[*n].owner == owner;
            let Some(start) = (first..end).find(is_its) else {
                continue;
            };
            let stop = (start..end).find(|n| !is_its(n)).unwrap_or(end);
            (start..stop).for_each(|page| self.give_back(page));
            if stop < end {
                let rest = (owner, stop, end - stop);
                self.guests[guest].donations.push(rest);
            }
            return Ok(Said::Back(start, stop - start));
        }
        self.guests[guest].life = Life::Free;
        Ok(Said::Done(0))
    }

    /// What must hold whatever happened: the promises, apart from the steps.
    pub(crate) fn promises(&self) -> Result<(), String> {
        for (number, page) in self.pages.iter().enumerate() {
            let wrong = |what: &str| Err(format!("page {number}: {what}: {page:?}"));
            if page.shared && !matches!(page.owner, Owner::Guest(_)) {
                return wrong("shared by nobody");
            }
            if self.is_lent(number) && page.owner != Owner::Host {
                return wrong("an unprotected VM reaches what is not the host's");
            }
            if self.host_reaches(number)
                && matches!(page.content, Content::Secret(_) | Content::El2s)
            {
                return wrong("the host reaches a secret");
            }
            if matches!(page.owner, Owner::Heap | Owner::State(_))
                != (page.content == Content::El2s)
            {
                return wrong("EL2's is not what EL2 has written");
            }
            let (Owner::Guest(guest) | Owner::State(guest)) = page.owner else {
                continue;
            };
            if matches!(self.guests[guest].life, Life::Free | Life::Reserved) {
                return wrong("its VM does not exist");
            }
            if page.owner == Owner::State(guest) {
                continue;
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
        Ok(())
    }

    /// All that later steps with single pages can depend on, the same for worlds that differ only in the
    /// order of the first `alike` pages, or in the names of the guests (whose state is in the pages behind
    /// those, one each), or in those of the unprotected VMs.
    pub(crate) fn key(&self, alike: usize) -> Key {
        let both = [false, true];
        let keys = both.map(|guests| both.map(|borrowers| self.renamed(alike, guests, borrowers)));
        let keys = keys.map(|[a, b]| a.min(b));
        let [a, b] = keys;
        a.min(b)
    }

    fn renamed(&self, alike: usize, guests: bool, borrowers: bool) -> Key {
        let name = |guest: usize| if guests { GUESTS - 1 - guest } else { guest };
        let page = |number: usize| {
            let mut page = self.pages[number].clone();
            let its_place = self.place_in_donations(number);
            page.owner = match page.owner {
                Owner::Guest(guest) => Owner::Guest(name(guest)),
                Owner::State(guest) => Owner::State(name(guest)),
                other => other,
            };
            if let Content::Secret(guest) = page.content {
                page.content = Content::Secret(name(guest));
            }
            let notes = std::array::from_fn(|guest| self.guests[name(guest)].notes[number]);
            let lent = std::array::from_fn(|vm| {
                let vm = if borrowers { BORROWERS - 1 - vm } else { vm };
                self.leases.contains(&(vm, number, 1))
            });
            (page, notes, lent, its_place)
        };
        let mut pages: Vec<_> = (0..alike).map(page).collect();
        pages.sort();
        let states = self.pages.len() - alike;
        pages.extend((0..states).map(|state| page(alike + name(state))));
        let lives = std::array::from_fn(|guest| self.guests[name(guest)].life);
        (pages, lives)
    }

    /// When a page comes back, of those that were donated for the same VM: what was donated before, and has
    /// come back or is donated again, does not count.
    fn place_in_donations(&self, page: usize) -> usize {
        let owner = self.pages[page].owner;
        let (Owner::Guest(guest) | Owner::State(guest)) = owner else {
            return 0;
        };
        let last = |page: usize, owner| {
            let donations = &self.guests[guest].donations;
            let is_it = |(to, first, count): &(Owner, usize, usize)| {
                *to == owner && (*first..first + count).contains(&page)
            };
            donations.iter().rposition(is_it)
        };
        let its = last(page, owner);
        let others = self.pages.iter().enumerate();
        let others =
            others.filter(|(_, p)| [Owner::Guest(guest), Owner::State(guest)].contains(&p.owner));
        others.filter(|(n, p)| last(*n, p.owner) < its).count()
    }
}

/// A page, what each guest lost there, to whom it is lent, when it comes back.
type PageKey = (Page, [Option<Note>; GUESTS], [bool; BORROWERS], usize);

/// See [`Model::key`].
pub(crate) type Key = (Vec<PageKey>, [Life; GUESTS]);
