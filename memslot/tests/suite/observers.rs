//! Random sequences of writes, runs, edges, resets and reclaims: no observer reads stale data that
//! the rules promise fresh, whatever the caches do on their own.

use crate::kit::{FLAG, FWB, NONE, PLAIN, RW, pages, slot};
use crate::machine::{Real, arm};
use memslot::edge::Dma;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::lock::LockRequest;
use memslot::noncoherent::Edge;
use memslot::policy::ArmPolicy;
use memslot::slot::SlotId;
use memslot::testing::{Stage1, View, guest_view};
use proptest::prelude::*;
use stage2::{CacheMaintenance, Pa};

/// One page of a guest, its stage-1 view fixed; who wrote last, and what.
#[derive(Clone, Debug)]
enum Act {
    HostWrites(usize),
    GuestReads(usize),
    GuestWrites(usize),
    GuestFetches(usize),
    DeviceReads(usize),
    DeviceWrites(usize),
    Reclaim(usize),
    Lock,
    Unlock,
    Run,
    Reset,
    Register,
    Unregister,
    Speculate(usize),
    Evict(usize),
    FlushAll,
}

const CACHED_PAGES: u64 = 4;
const C_BASE: u64 = 0x800;
const C_FRAME: u64 = 0x20_0000;
const C: SlotId = SlotId(3);

fn act() -> impl Strategy<Value = Act> {
    let page = || 0usize..4;
    prop_oneof![
        4 => page().prop_map(Act::HostWrites),
        4 => page().prop_map(Act::GuestReads),
        4 => page().prop_map(Act::GuestWrites),
        2 => page().prop_map(Act::GuestFetches),
        3 => page().prop_map(Act::DeviceReads),
        3 => page().prop_map(Act::DeviceWrites),
        2 => page().prop_map(Act::Reclaim),
        2 => Just(Act::Lock),
        2 => Just(Act::Unlock),
        2 => Just(Act::Run),
        1 => Just(Act::Reset),
        2 => Just(Act::Register),
        2 => Just(Act::Unregister),
        4 => page().prop_map(Act::Speculate),
        3 => page().prop_map(Act::Evict),
        1 => Just(Act::FlushAll),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Host,
    Guest,
    Device,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    value: u64,
    writer: Writer,
    /// Memory itself holds the value, and no dirty line can overwrite it.
    in_memory: bool,
}

struct Observed {
    vm: Real<stage2::ArmStage2, ArmPolicy>,
    stage1: [Stage1; 4],
    cells: [Cell; 4],
    devices: u32,
    next: u64,
}

impl Observed {
    fn at(page: usize) -> Pa {
        Pa::new((C_FRAME + page as u64) << 12)
    }

    /// How the guest sees a page that is mapped.
    fn view(&self, page: usize) -> Option<View> {
        let leaf = *self.vm.pages().get(&(C_BASE + page as u64))?;
        Some(guest_view(
            self.stage1[page],
            leaf.attrs.mem,
            leaf.attrs.combine,
        ))
    }

    fn is_mapped(&self, page: usize) -> bool {
        self.view(page).is_some()
    }

    fn is_pending(&self) -> bool {
        !self.vm.mem.pending().is_empty()
    }

    fn write(&mut self, page: usize, view: View, writer: Writer) {
        self.next += 1;
        self.vm
            .machine
            .caches
            .write(Self::at(page), view, self.next);
        let in_memory = view == View::Uncached;
        self.cells[page] = Cell {
            value: self.next,
            writer,
            in_memory,
        };
    }

    fn reads(&self, page: usize, view: View, who: &str) {
        let seen = self.vm.machine.caches.read(Self::at(page), view);
        assert_eq!(
            seen, self.cells[page].value,
            "{who} reads page {page} by {view:?}"
        );
    }

    /// The guest runs and touches a page.
    fn guest(&mut self, page: usize, access: Access) -> View {
        self.run();
        let absent = !self.is_mapped(page);
        let outcome = self
            .vm
            .fault(C_BASE + page as u64, access, FaultKind::Translation, &());
        assert_eq!(outcome, Ok(FaultOutcome::Resolved));
        if absent {
            self.cleaned(page);
        }
        self.view(page).unwrap()
    }

    fn run(&mut self) {
        drop(self.vm.mem.enter().unwrap());
        // The first run cleans what was pending; harmless to assume where nothing was.
    }

    /// A page whose leaf needs maintenance was cleaned and invalidated.
    fn cleaned(&mut self, page: usize) {
        let owes = self
            .vm
            .pages()
            .get(&(C_BASE + page as u64))
            .is_some_and(|l| l.attrs.maintenance().data);
        self.cells[page].in_memory |= owes;
    }

    fn all_cleaned(&mut self) {
        (0..4).for_each(|p| self.cleaned(p));
    }

    /// The host may write what no guest or device uses: unmapped pages, and pages of a lock
    /// whose maintenance is still to come. Forced write-back makes everything coherent.
    fn host_may_write(&self, page: usize) -> bool {
        let Some(leaf) = self.vm.pages().get(&(C_BASE + page as u64)).copied() else {
            return true;
        };
        !leaf.attrs.maintenance().data || self.is_pending()
    }

    fn device_edge(&mut self, edge: Edge, mapped: [bool; 4]) {
        // Where an edge changes types, every page that was mapped was cleaned. A flagged slot's
        // guest has had its own types all along, and cleans for its device itself.
        let flagged = self.vm.mem.slot(C).is_some_and(|s| s.flags == FLAG);
        if edge != Edge::None && !flagged && self.vm.mem.policy() == &FWB {
            for page in (0..4).filter(|p| mapped[*p]) {
                self.cells[page].in_memory = true;
            }
        }
    }

    fn apply(&mut self, act: &Act) {
        let mapped = [0, 1, 2, 3].map(|p| self.is_mapped(p));
        match *act {
            Act::HostWrites(p) if self.host_may_write(p) => {
                self.write(p, View::Cacheable, Writer::Host)
            }
            Act::GuestReads(p) => {
                let view = self.guest(p, Access::Read);
                self.reads(p, view, "guest");
            }
            Act::GuestWrites(p) => {
                let view = self.guest(p, Access::Write);
                self.write(p, view, Writer::Guest);
            }
            // Code that the host wrote, in a page that is made executable now.
            Act::GuestFetches(p) if !mapped[p] && self.cells[p].writer == Writer::Host => {
                let _ = self.guest(p, Access::Fetch);
                let fetched = self.vm.machine.caches.fetch(Self::at(p));
                assert_eq!(fetched, self.cells[p].value, "fetch of page {p}");
            }
            Act::Reclaim(p) if self.vm.mem.host_unmap(pages(C_BASE + p as u64, 1)).is_ok() => {
                self.reads(p, View::Cacheable, "host");
            }
            Act::Speculate(p) => self.vm.machine.caches.speculate(Self::at(p)),
            Act::Evict(p) => self.vm.machine.caches.evict(Self::at(p)),
            Act::FlushAll => {
                self.vm.mem.flush_all();
                self.all_cleaned();
            }
            _ => self.apply_vm(act, mapped),
        }
    }

    /// What the host does to the VM, and what devices do.
    fn apply_vm(&mut self, act: &Act, mapped: [bool; 4]) {
        match *act {
            Act::DeviceReads(p) if self.devices > 0 && self.cells[p].in_memory => {
                self.reads(p, View::Uncached, "device");
            }
            Act::DeviceWrites(p)
                if self.devices > 0
                    && self.cells[p].in_memory
                    && self.view(p) == Some(View::Uncached) =>
            {
                self.write(p, View::Uncached, Writer::Device);
            }
            Act::Lock => {
                let _ = self.vm.lock(&LockRequest::new(C, RW));
            }
            Act::Unlock => drop(self.vm.mem.unlock_slot(C)),
            Act::Run => {
                let pending = self.is_pending();
                self.run();
                if pending {
                    self.all_cleaned();
                }
            }
            Act::Reset => self.vm.mem.reset().unwrap(),
            Act::Register => {
                let pending = self.is_pending();
                let edge = self.vm.mem.register_device(Dma::NonSnooping).unwrap();
                self.devices += 1;
                if pending {
                    self.all_cleaned();
                }
                self.device_edge(edge, mapped);
            }
            Act::Unregister if self.devices > 0 => {
                let edge = self.vm.mem.unregister_device(Dma::NonSnooping).unwrap();
                self.devices -= 1;
                self.device_edge(edge, mapped);
            }
            _ => {}
        }
    }
}

fn stage1() -> impl Strategy<Value = Stage1> {
    prop::sample::select(vec![
        Stage1::WriteBack,
        Stage1::NonCacheable,
        Stage1::Device,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(160) })]

    #[test]
    fn no_observer_reads_stale_data_that_is_promised_fresh(
        fwb in any::<bool>(),
        flagged in any::<bool>(),
        stage1 in prop::array::uniform4(stage1()),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let vm = arm(if fwb { FWB } else { PLAIN }, 4, 64);
        let flags = if flagged { FLAG } else { NONE };
        vm.mem.create_slot(slot(C, C_BASE, CACHED_PAGES, C_FRAME, flags)).unwrap();
        let cell = Cell { value: 0, writer: Writer::Host, in_memory: false };
        let mut o = Observed { vm, stage1, cells: [cell; 4], devices: 0, next: 0 };
        for act in &acts {
            o.apply(act);
        }
        prop_assert_eq!(o.vm.violations(), [""; 0]);
    }
}

/// The model itself notices missing maintenance: without the first run's flush it fails.
#[test]
fn the_observers_would_notice_a_missing_flush() {
    let vm = arm(PLAIN, 4, 64);
    vm.mem
        .create_slot(slot(C, C_BASE, CACHED_PAGES, C_FRAME, NONE))
        .unwrap();
    vm.lock(&LockRequest::new(C, RW)).unwrap();
    let at = Observed::at(0);
    vm.machine.caches.write(at, View::Cacheable, 9);
    assert_eq!(vm.machine.caches.read(at, View::Uncached), 0);
    vm.machine
        .caches
        .clean_invalidate_data(stage2::PaRange::new(at, 4096).unwrap());
    assert_eq!(vm.machine.caches.read(at, View::Uncached), 9);
}
