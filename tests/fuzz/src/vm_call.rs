//! The host's calls about VMs, from registers to registers, on a board of fake memory: the dispatch that the
//! image has, over what the image has behind it (`el2::calls`, `el2::testing`).

use abi::{Call, ErrorCode, SMCCC_NOT_SUPPORTED, SlotWord, VmConfig};
use arbitrary::{Result, Unstructured};
use board::PAGE_SIZE;
use el2::counters::Counters;
use el2::guest::protected::MemoryCall;
use el2::guest_memory::HOST_SLOTS;
use el2::hvc::{self, Answer, Host};
use el2::machine::{Machine, VirtualMachine};
use el2::page_state::Owner;
use el2::testing::{FakeBoard, FakeVm, Ground, NoContents, RAM, page_range};
use el2::vm_table::FIRST_HANDLE;
use memslot::fault::{Access, FaultKind, Stage2Fault};
use memslot::lock::LockState;
use memslot::pending::Work;
use memslot::slot::SlotId;
use stage2::Ipa;
use stage2::testing::FakeMachine;

/// Pages of RAM; the last one is EL2's.
const PAGES: usize = 24;
const VMS: usize = 3;
/// Most steps of an input: more of them find little more, and take long.
const STEPS: usize = 24;
/// Where slots are in guests.
const IPA: u64 = 0x4000_0000;

type Board<'a> = FakeBoard<'a, NoContents, VMS>;

/// Runs one input.
pub(crate) fn run(data: &[u8]) {
    let ground = Ground::new(PAGES, PAGES - 1, VMS);
    let ownership = ground.ownership();
    let board = FakeBoard::new(&ground, &ownership, NoContents);
    begin(&board);
    let world = World {
        ground: &ground,
        board: &board,
    };
    let mut input = Unstructured::new(data);
    let mut before = world.digest();
    for _ in 0..STEPS {
        if input.is_empty() || world.step(&mut input, &mut before).is_err() {
            break;
        }
    }
}

/// An unprotected and a protected VM with a slot of RAM each, so that few bytes lead deep.
fn begin(board: &Board<'_>) {
    for (number, protected) in [false, true].into_iter().enumerate() {
        let config = VmConfig {
            vcpus: 2,
            protected,
            devices: false,
        };
        let (handle, at) = (FIRST_HANDLE + number as u64, 12 * number);
        let state = page_range(at, 1).start();
        let memory = page_range(at + 1, 4).start();
        let calls = [
            (Call::VmReserve, [0; 6]),
            (Call::VmCreate, [handle, state, 1, config.bits(), 0, 0]),
            (Call::SlotCreate, [handle, 0, IPA, 4, memory, 0]),
            (Call::VcpuCreate, [handle, 0, 0, 0, 0, 0]),
        ];
        for (call, args) in calls {
            let [answer, ..] = board.call(call, args);
            assert!(abi::from_register(answer).is_ok(), "{call:?}: {answer:#x}");
        }
    }
}

/// What an argument is, mostly.
#[derive(Clone, Copy)]
enum Kind {
    /// Nothing: zero.
    None,
    Handle,
    /// An address of RAM.
    Memory,
    /// A number of pages.
    Pages,
    /// An address in a guest.
    Address,
    /// A slot's number, a page in it, a vCPU, a flag.
    Small,
    /// A slot's word.
    Slot,
    /// A VM's configuration.
    Config,
    /// An interrupt.
    Interrupt,
    /// Anything.
    Any,
}

/// What a call's arguments are: counted from the ABI's documentation, not from the code.
fn arguments(call: Call) -> [Kind; 6] {
    use Kind::{Address, Any, Config, Handle, Interrupt, Memory, None, Pages, Slot, Small};
    match call {
        Call::VmReserve => [None; 6],
        Call::DonateHeap => [Memory, Pages, None, None, None, None],
        Call::VmCreate => [Handle, Memory, Pages, Config, None, None],
        Call::VmTopUp => [Handle, Memory, Pages, None, None, None],
        Call::VmDestroy | Call::VmReclaim | Call::VmReset => [Handle, None, None, None, None, None],
        Call::VmCounter | Call::SlotDelete | Call::SlotState | Call::VmMeasurement => {
            [Handle, Small, None, None, None, None]
        }
        Call::VcpuCreate | Call::VcpuState => [Handle, Small, None, None, None, None],
        Call::VmMapping => [Handle, Address, None, None, None, None],
        Call::VmExpect => [Handle, Any, Any, Any, Any, None],
        Call::VmSeal => [Handle, Address, Any, None, None, None],
        Call::SlotCreate => [Handle, Slot, Address, Pages, Memory, None],
        Call::SlotMove => [Handle, Small, Address, None, None, None],
        Call::SlotFlags => [Handle, Slot, None, None, None, None],
        Call::SlotLock => [Handle, Small, Small, Small, None, None],
        Call::SlotDirty | Call::DmaDevice => [Handle, Small, Small, None, None, None],
        Call::MemoryDonate => [Handle, Address, Pages, Small, None, None],
        Call::MemoryReclaim => [Memory, None, None, None, None, None],
        Call::SlotUnshare | Call::SlotShare | Call::SlotRelax => {
            [Handle, Small, Small, Small, None, None]
        }
        Call::SlotYoung => [Handle, Small, Small, Small, Small, None],
        Call::VcpuStart => [Handle, Small, Address, Any, None, None],
        Call::VcpuRun => [Handle, Small, Any, Small, None, None],
        Call::IrqLine => [Handle, Interrupt, Small, None, None, None],
        Call::DeviceTake | Call::DeviceGive | Call::DeviceFaults => {
            [Any, None, None, None, None, None]
        }
        Call::DeviceAttach => [Handle, Any, Small, None, None, None],
        Call::DeviceDetach => [Handle, Any, None, None, None, None],
        _ => [Any; 6],
    }
}

fn argument(input: &mut Unstructured<'_>, kind: Kind) -> Result<u64> {
    // Few are not what they should be, or half of all calls would say so.
    if input.ratio(1, 24u8)? {
        return match input.int_in_range(0..=3u8)? {
            0 => input.arbitrary(),
            1 => Ok(u64::MAX),
            2 => Ok(1 << input.int_in_range(0..=63u8)?),
            _ => Ok(input.arbitrary::<u8>()?.into()),
        };
    }
    let small = |input: &mut Unstructured<'_>, most: u64| input.int_in_range(0..=most);
    Ok(match kind {
        Kind::None => 0,
        Kind::Handle => FIRST_HANDLE + small(input, VMS as u64)?,
        Kind::Memory => RAM + small(input, PAGES as u64)? * PAGE_SIZE,
        Kind::Pages => small(input, 5)?,
        Kind::Address => IPA + small(input, 15)? * PAGE_SIZE,
        Kind::Small => small(input, 4)?,
        Kind::Slot => {
            let word = SlotWord {
                id: input.int_in_range(0..=3u16)?,
                device: input.ratio(1, 8u8)?,
                flags: if input.arbitrary()? { 0 } else { 1 },
            };
            word.bits()
        }
        Kind::Config => input.int_in_range(1..=3u64)? | small(input, 3)? << 8,
        Kind::Interrupt => input.int_in_range(30..=40u64)?,
        Kind::Any => input.arbitrary()?,
    })
}

struct World<'w, 'a> {
    ground: &'a Ground,
    board: &'w Board<'a>,
}

impl World<'_, '_> {
    fn step(&self, input: &mut Unstructured<'_>, before: &mut String) -> Result<()> {
        match input.int_in_range(0..=15u8)? {
            0 => self.board.interrupted.set(input.arbitrary()?),
            1 => self.limit_tables(input)?,
            2 | 3 => self.guest_touches(input)?,
            4 => self.guest_asks(input)?,
            5 => return self.strange_call(input),
            kind => return self.call(input, kind == 6, before),
        }
        self.changes(before);
        Ok(())
    }

    /// Whether a step has changed anything; then nobody reaches more than he may.
    fn changes(&self, before: &mut String) -> bool {
        self.caches_and_tlbs_are_right();
        let after = self.digest();
        let changes = after != *before;
        if changes {
            self.keeps_promises();
        }
        *before = after;
        changes
    }

    /// Whether any machine has seen a step that it must not see.
    fn caches_and_tlbs_are_right(&self) {
        let wrong = self.ground.host().finish();
        assert!(wrong.is_empty(), "the host: {wrong:?}");
        for (index, handle) in (0..VMS).zip(FIRST_HANDLE..) {
            let Some(machine) = self.ground.guest(index) else {
                continue;
            };
            let mut wrong = machine.finish();
            machine.expect_deferred(false);
            let _ = self.board.vms.with(handle, |vm| {
                allow_dirty_locks(vm, machine, &mut wrong);
                Ok(())
            });
            assert!(wrong.is_empty(), "VM {index}: {wrong:?}");
        }
    }

    /// How many table pages a VM, or the host, still finds.
    fn limit_tables(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let left = input.int_in_range(0..=4usize)?;
        let whose = input.int_in_range(0..=VMS)?;
        let machine = self.ground.guest(whose).unwrap_or(self.ground.host());
        machine.allow_allocations((left < 4).then_some(left));
        Ok(())
    }

    /// Whatever is not a call about VMs is answered before.
    fn strange_call(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let counters = Counters::new();
        let host = Host {
            features: abi::Features::GUESTS,
            counters: &counters,
        };
        let (immediate, id): (u16, u64) = (input.arbitrary()?, input.arbitrary()?);
        match hvc::answer(immediate, id, 0, &host) {
            Answer::AboutVms(call) => assert_eq!((immediate, u64::from(call as u32)), (0, id)),
            Answer::Now([status, ..]) if immediate != 0 => assert_eq!(status, SMCCC_NOT_SUPPORTED),
            Answer::Now(_) => {}
        }
        Ok(())
    }

    /// A call of the host; one in many while a vCPU runs elsewhere.
    fn call(
        &self,
        input: &mut Unstructured<'_>,
        while_running: bool,
        before: &mut String,
    ) -> Result<()> {
        let call = *input.choose(Call::ALL)?;
        let kinds = arguments(call);
        let mut args = [0; 6];
        for (arg, kind) in args.iter_mut().zip(kinds) {
            *arg = argument(input, kind)?;
        }
        let vcpu = (FIRST_HANDLE + input.int_in_range(0..=1u64)?, 0);
        let (answer, changed) = if while_running {
            // Its way in does what is pending, which is not the call's doing; and that it runs can be seen.
            let inside = self.board.while_it_runs(vcpu, || {
                *before = self.digest();
                self.ask(call, args, before)
            });
            *before = self.digest();
            inside.unwrap_or_else(|_| self.ask(call, args, before))
        } else {
            self.ask(call, args, before)
        };
        let context = || format!("{call:?} {args:x?}: {answer:x?}");
        let mut surplus = args.iter().zip(kinds);
        if surplus.any(|(arg, kind)| matches!(kind, Kind::None) && *arg != 0) {
            let invalid = ErrorCode::Invalid.to_register();
            assert_eq!(answer, [invalid, 0, 0, 0], "{}", context());
        }
        if let Err(code) = abi::from_register(answer[0]) {
            let lacks = code == ErrorCode::NoMemory;
            assert!(answer[1] == 0 || lacks, "{}", context());
            assert_eq!(answer[2..], [0; 2], "{}", context());
            assert!(!changed || may_have_begun(code), "{}", context());
        }
        Ok(())
    }

    /// The answer to a call, and whether it has changed anything.
    fn ask(&self, call: Call, args: [u64; 6], before: &mut String) -> ([u64; 4], bool) {
        let answer = self.board.call(call, args);
        (answer, self.changes(before))
    }

    /// An access of a guest that runs, in one of its slots or beside them.
    fn guest_touches(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let handle = argument(input, Kind::Handle)?;
        let ipa = argument(input, Kind::Address)?;
        let access = *input.choose(&[Access::Read, Access::Write, Access::Fetch])?;
        let fault = Stage2Fault {
            ipa: Ipa::new(ipa),
            access,
            kind: FaultKind::Translation,
        };
        let _ = self.board.vms.with(handle, |vm| {
            if vm.state().may_run() {
                let _outcome = vm.state().memory.handle_fault(&fault, &())?;
            }
            Ok(())
        });
        Ok(())
    }

    /// A call of a protected guest about its memory.
    fn guest_asks(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let handle = argument(input, Kind::Handle)?;
        let calls = [
            MemoryCall::Share,
            MemoryCall::Unshare,
            MemoryCall::Relinquish,
        ];
        let call = *input.choose(&calls)?;
        let ipa = argument(input, Kind::Address)?;
        let pages = argument(input, Kind::Pages)?.max(1);
        let _ = self.board.vms.with(handle, |vm| {
            let state = vm.state();
            if state.config.protected && state.may_run() {
                let _moved = state.pages(&self.board.estate()).call(call, ipa, pages);
            }
            Ok(())
        });
        Ok(())
    }

    /// All that somebody could notice, as text.
    fn digest(&self) -> String {
        let mut all = format!("{:?} {:?}", self.board.ownership, self.board.vms);
        all += &format!("{:?}", self.ground.host().leaves());
        for handle in FIRST_HANDLE..FIRST_HANDLE + VMS as u64 {
            let one = self.board.vms.with(handle, |vm| Ok(self.digest_of(vm)));
            all += &one.unwrap_or_default();
        }
        all
    }

    fn digest_of(&self, vm: &FakeVm<'_>) -> String {
        let state = vm.state();
        let slots = (0..HOST_SLOTS).map(SlotId);
        let slots =
            slots.filter_map(|id| Some((state.memory.slot(id)?, state.memory.lock_state(id))));
        let leaves = self
            .ground
            .guest(state.index.into())
            .map(FakeMachine::leaves);
        let vcpus = (0..state.config.vcpus).map(|index| {
            let pending = vm.vgic().has_pending(index.into());
            (state.power.is_runnable(index), pending)
        });
        format!(
            "{:?} {leaves:?} {:?} {:?} {:?} {:?} {:?}",
            slots.collect::<Vec<_>>(),
            vcpus.collect::<Vec<_>>(),
            state.protection,
            state.devices,
            state.memory.pending(),
            state.memory.counters(),
        )
    }

    /// Nobody reaches what is not his.
    fn keeps_promises(&self) {
        let states = self.board.ownership.pages();
        for (start, _, leaf) in self.ground.host().leaves() {
            let page = page_range(((start - RAM) / PAGE_SIZE) as usize, 1);
            let reaches = match states.owner(start) {
                Some(Owner::Host) => true,
                Some(owner @ Owner::Guest(_)) => states.all_shared(page, owner, true),
                _ => false,
            };
            assert!(reaches && leaf.pa == start, "the host reaches {start:#x}");
        }
        for index in (0..VMS).filter_map(|index| u8::try_from(index).ok()) {
            let handle = FIRST_HANDLE + u64::from(index);
            let _ = self.board.vms.with(handle, |vm| {
                self.guest_reaches_only_its_own(index, vm.state().config.protected);
                Ok(())
            });
        }
    }

    fn guest_reaches_only_its_own(&self, index: u8, protected: bool) {
        let states = self.board.ownership.pages();
        let leaves = self.ground.guest(index.into()).map(FakeMachine::leaves);
        for (ipa, _, leaf) in leaves.into_iter().flatten() {
            let is_device = leaf.pa < RAM || leaf.pa >= RAM + PAGES as u64 * PAGE_SIZE;
            let expected = if protected {
                Owner::Guest(index)
            } else {
                Owner::Host
            };
            let its = states.owner(leaf.pa) == Some(expected) || is_device && !protected;
            assert!(its, "VM {index} reaches {:#x} at {ipa:#x}", leaf.pa);
        }
    }
}

/// A locked slot is mapped before it is cleaned: while that is pending it may be dirty, behind it not.
fn allow_dirty_locks(vm: &FakeVm<'_>, machine: &FakeMachine, wrong: &mut Vec<String>) {
    let memory = &vm.state().memory;
    let pending = memory.pending().contains(Work::FLUSH_DCACHE);
    machine.expect_deferred(pending);
    for slot in vm.state().host_slots() {
        let pages = slot.backing..slot.backing + slot.range.npages();
        let pages = pages.map(|frame| frame * PAGE_SIZE);
        match memory.lock_state(slot.id) {
            Some(LockState::LockedClean) => {
                let is_clean = |pa| machine.is_clean(pa, PAGE_SIZE);
                assert!(
                    pages.clone().all(is_clean),
                    "dirty behind its run: {slot:?}"
                );
            }
            Some(LockState::LockedDirty | LockState::Unfinished) if pending => {
                let dirty = |pa| format!("{pa:#x}..{:#x} mapped while dirty", pa + PAGE_SIZE);
                let expected: Vec<_> = pages.map(dirty).collect();
                wrong.retain(|what| !expected.contains(what));
            }
            _ => {}
        }
    }
}

/// Whether a call that says this may have changed something: a step of work was done, tables were taken, or
/// a VM that is not the expected one will never run.
const fn may_have_begun(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::Again | ErrorCode::NoHeap | ErrorCode::NoMemory | ErrorCode::Mismatch
    )
}
