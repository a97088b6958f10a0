//! Calls that grow with a VM's memory give the core back when an interrupt waits, and are repeated.
//!
//! The host's timer has fired and is not acknowledged: so each call does exactly one step, and what
//! else the host tries between two steps meets a VM that is half done.

use abi::{ErrorCode, Exit, SlotState, SlotWord, VmCounter};
use board::{AddrRange, Gic, PAGE_SIZE};

use super::kit::{RAM_SLOT, code, config, end, expect, load, words};
use super::payload::Memory;
use crate::arch::{gic, guest, mem, ticks_per_second};
use crate::machine::Machine;
use crate::report::Report;
use crate::vm::{Refused, Vm};

/// Bytes that are cleaned, or taken away, in one step.
const STEP: u64 = 2 << 20;
/// The slot lies around this boundary: up to here pages are mapped in one step.
const BOUNDARY: u64 = 0x4400_0000;
const LOGGED: SlotWord = SlotWord {
    flags: 1,
    ..RAM_SLOT
};
/// A leaf of 1 GiB in a guest's own table: inner shareable, accessed, MAIR's first.
const BLOCK: u64 = 0x701;

pub(super) fn run(machine: &Machine, memory: &Memory, report: &mut Report) {
    let Some(gic) = &machine.board.gic else {
        return report.check("steps", Err("there is no interrupt controller"));
    };
    let steps = Steps { gic, memory };
    report.check("a_lock_goes_by_steps", steps.with_vm(Steps::lock));
    report.check("a_first_run_goes_by_steps", steps.with_vm(Steps::first_run));
    report.check("an_unlock_goes_by_steps", steps.with_vm(Steps::unlock));
    report.check("a_deletion_goes_by_steps", steps.with_vm(Steps::deletion));
    report.check("a_move_goes_by_steps", steps.with_vm(Steps::movement));
    report.check("a_log_begins_by_steps", steps.with_vm(Steps::log));
    report.check("a_reset_goes_by_steps", steps.with_vm(Steps::reset));
    report.check("a_device_comes_by_steps", steps.with_vm(Steps::device));
    report.check("a_device_goes_by_steps", steps.with_vm(Steps::departure));
    report.check("a_logged_slot_comes_by_steps", steps.with_vm(Steps::logged));
    report.check("a_half_deleted_slot_ends_with_its_vm", steps.abandoned());
    report.check("a_destruction_goes_by_steps", steps.destruction());
    // The timer has to hit the flush, on a machine that may have other things to do.
    let mut flush = (0..5).map(|_| steps.with_vm(Steps::flush));
    let flush = flush
        .find(|result| *result != Err(NOT_CUT))
        .unwrap_or(Err(NOT_CUT));
    report.check("a_guests_flush_goes_by_steps", flush);
}

const NOT_CUT: &str = "it was not cut short";

struct Steps<'a> {
    gic: &'a Gic,
    memory: &'a Memory,
}

fn cleans() -> bool {
    !crate::call::features().contains(abi::Features::FORCE_WRITE_BACK)
}

impl Steps<'_> {
    fn ram(&self) -> AddrRange {
        self.memory.ram
    }

    fn ipa(&self) -> u64 {
        BOUNDARY - self.ram().size() / 2
    }

    /// Steps of cleaning, or of taking away, all of the slot.
    fn parts(&self) -> u64 {
        self.ram().size() / STEP
    }

    fn vm(&self) -> Result<Vm, &'static str> {
        let vm = words(Vm::create(config(false), self.memory.state))?;
        words(vm.create_slot(RAM_SLOT, self.ipa(), self.ram()))?;
        words(vm.create_vcpu(0))?;
        Ok(vm)
    }

    fn with_vm(
        &self,
        check: impl FnOnce(&Self, Vm) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        let vm = self.vm()?;
        let checked = check(self, vm);
        end(vm)?;
        checked
    }

    /// Runs `work` with an interrupt that waits all the time.
    fn interrupted<R>(&self, work: impl FnOnce() -> R) -> Result<R, &'static str> {
        gic::enable(self.gic)?;
        gic::set_timer(gic::now());
        let result = work();
        let waited = gic::take(self.gic);
        gic::stop_timer();
        if waited == Some(gic::PHYSICAL_TIMER) {
            Ok(result)
        } else {
            Err("the host's interrupt did not wait")
        }
    }

    /// Repeats a call until it is done; says how often it was called.
    fn count(step: impl Fn() -> Result<[u64; 4], Refused>) -> Result<u64, &'static str> {
        for calls in 1..1000 {
            match step() {
                Err(refused) if refused.code == ErrorCode::Again => {}
                other => return words(other).map(|_| calls),
            }
        }
        Err("it never ends")
    }

    fn lock(&self, vm: Vm) -> Result<(), &'static str> {
        words(vm.start_vcpu(0, self.ipa(), 0))?;
        self.interrupted(|| {
            let first = code(vm.lock_step(0, false));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            let state = words(vm.slot_state(0))?;
            expect(state == Some(SlotState::Unfinished), "it is locked")?;
            let busy = Some(ErrorCode::Busy);
            expect(code(vm.run(0, 0, false)) == busy, "a vCPU ran")?;
            expect(
                code(vm.lock_step(0, true)) == busy,
                "another lock was taken",
            )?;
            expect(code(vm.delete_slot(0)) == busy, "the slot was deleted")?;
            expect(code(vm.move_slot(0, 0)) == busy, "the slot was moved")?;
            expect(code(vm.reset()) == busy, "the VM was reset")?;
            expect(code(vm.noncoherent_device(true)) == busy, "a device came")?;
            expect(
                Self::count(|| vm.lock_step(0, false))? == 1,
                "not two steps",
            )?;
            let state = words(vm.slot_state(0))?;
            expect(state != Some(SlotState::Unfinished), "it is not locked")
        })?
    }

    fn first_run(&self, vm: Vm) -> Result<(), &'static str> {
        words(vm.lock_slot(0))?;
        words(vm.start_vcpu(0, self.ipa(), 0))?;
        self.interrupted(|| {
            for done in 1..=self.parts() {
                let exit = words(vm.run(0, 0, false))?;
                expect(exit == Exit::Interrupted, "the interrupt had to wait")?;
                let flushed = words(vm.counter(VmCounter::LinesFlushed))? * mem::line_size();
                let expected = if cleans() { done * STEP } else { 0 };
                expect(flushed == expected, "not one step")?;
            }
            let state = words(vm.slot_state(0))?;
            expect(state == Some(SlotState::LockedClean), "it is not clean")
        })?
    }

    fn unlock(&self, vm: Vm) -> Result<(), &'static str> {
        words(vm.lock_slot_as(0, false))?;
        words(vm.reset())?;
        self.interrupted(|| {
            let first = code(vm.unlock_step(0));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            let last = self.ipa() + self.ram().size() - STEP;
            let gone = code(vm.mapping(last));
            expect(gone == Some(ErrorCode::NotFound), "the last part is mapped")?;
            expect(vm.mapping(last - PAGE_SIZE).is_ok(), "the others are not")?;
            let rest = Self::count(|| vm.unlock_step(0))?;
            expect(rest + 1 == self.parts(), "not by steps")?;
            let state = words(vm.slot_state(0))?;
            expect(state == Some(SlotState::Unlocked), "it is locked")
        })?
    }

    /// All of the slot is mapped, by pages, and nobody waits for it; gives in how many steps it goes.
    fn mapped(&self, vm: Vm) -> Result<u64, &'static str> {
        words(vm.lock_slot_as(0, false))?;
        words(vm.start_vcpu(0, self.ipa(), 0))?;
        // The first instruction is none: what is pending is done before it.
        mem::bytes_mut(self.ram()).fill(0);
        gic::enable(self.gic)?;
        gic::set_timer(gic::now() + ticks_per_second() / 1000);
        for _ in 0..1000 {
            if words(vm.slot_state(0))? == Some(SlotState::LockedClean) {
                break;
            }
            words(vm.run(0, 0, false))?;
            while gic::take(self.gic).is_some() {}
            gic::set_timer(gic::now() + ticks_per_second() / 1000);
        }
        gic::stop_timer();
        while gic::take(self.gic).is_some() {}
        words(vm.unlock_slot(0))?;
        let leaf = words(vm.mapping(self.ipa()))?;
        expect(leaf.0 == self.ipa(), "it is not mapped")?;
        // Where nothing is cleaned a step takes 64 MiB, to the boundary and from there on.
        Ok(if cleans() { self.parts() } else { 2 })
    }

    /// What would meet half of a change is refused.
    fn others_are_busy(vm: Vm) -> Result<(), &'static str> {
        let busy = Some(ErrorCode::Busy);
        let codes = [
            code(vm.delete_slot(5)),
            code(vm.move_slot(5, 0)),
            code(vm.lock_step(0, false)),
            code(vm.unlock_step(0)),
            code(vm.unshare(0, 0, 1)),
            code(vm.young(0, 0, 1, true)),
            code(vm.dirty(0, 0)),
            code(vm.attach_device(0, true)),
        ];
        // There is no such device, or no slot is locked for it.
        expect(codes[7].is_some(), "a device was attached")?;
        expect(codes[..7] == [busy; 7], "it met half of a change")
    }

    fn deletion(&self, vm: Vm) -> Result<(), &'static str> {
        let parts = self.mapped(vm)?;
        self.interrupted(|| {
            let first = code(vm.delete_step(0));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            let state = words(vm.slot_state(0))?;
            expect(state == Some(SlotState::Unfinished), "it is whole")?;
            Self::others_are_busy(vm)?;
            let taken = code(vm.create_slot(RAM_SLOT, self.ipa(), self.ram()));
            expect(taken == Some(ErrorCode::Busy), "its place was given away")?;
            let leased = code(vm.top_up(self.part_of_ram()?));
            expect(leased == Some(ErrorCode::Busy), "its memory was given away")?;
            let turned = code(vm.move_step(0, 0));
            expect(turned == Some(ErrorCode::Busy), "it was moved")?;
            let rest = Self::count(|| vm.delete_step(0))?;
            expect(rest + 1 == parts, "not by steps")?;
            let gone = code(vm.mapping(self.ipa()));
            expect(gone == Some(ErrorCode::NotFound), "something is mapped")?;
            let gone = code(vm.delete_step(0));
            expect(gone == Some(ErrorCode::NotFound), "it was deleted twice")
        })??;
        words(vm.create_slot(RAM_SLOT, self.ipa(), self.ram()))
    }

    fn part_of_ram(&self) -> Result<AddrRange, &'static str> {
        AddrRange::with_size(self.ram().start(), PAGE_SIZE).ok_or("there is no memory")
    }

    fn movement(&self, vm: Vm) -> Result<(), &'static str> {
        let parts = self.mapped(vm)?;
        let place = self.ipa() + 2 * self.ram().size();
        self.interrupted(|| {
            let first = code(vm.move_step(0, place));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            Self::others_are_busy(vm)?;
            let busy = Some(ErrorCode::Busy);
            expect(code(vm.run(0, 0, false)) == busy, "a vCPU ran")?;
            expect(code(vm.reset_step()) == busy, "the VM was reset")?;
            let turned = code(vm.move_step(0, self.ipa()));
            expect(turned == busy, "it turned round")?;
            expect(code(vm.delete_step(0)) == busy, "it was deleted")?;
            let rest = Self::count(|| vm.move_step(0, place))?;
            expect(rest + 1 == parts, "not by steps")?;
            let gone = code(vm.mapping(self.ipa()));
            expect(gone == Some(ErrorCode::NotFound), "something is mapped")
        })??;
        let moved = words(vm.lock_slot_as(0, false));
        let (start, ..) = words(vm.mapping(0))?;
        moved.and(expect(start == place, "it is elsewhere"))
    }

    fn log(&self, vm: Vm) -> Result<(), &'static str> {
        let parts = self.mapped(vm)?;
        self.interrupted(|| {
            let first = code(vm.flags_step(LOGGED));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            Self::others_are_busy(vm)?;
            words(vm.flags_step(RAM_SLOT))?;
            let none = code(vm.dirty(0, 0));
            expect(none == Some(ErrorCode::Invalid), "it was not taken back")?;
            let again = code(vm.flags_step(LOGGED));
            expect(again == Some(ErrorCode::Again), "it was not cut short")?;
            let rest = Self::count(|| vm.flags_step(LOGGED))?;
            expect(rest + 1 == parts, "not by steps")?;
            expect(words(vm.dirty(0, 0))? == 0, "nobody wrote")?;
            let gone = code(vm.mapping(self.ipa()));
            expect(gone == Some(ErrorCode::NotFound), "something is mapped")
        })?
    }

    fn reset(&self, vm: Vm) -> Result<(), &'static str> {
        let parts = self.mapped(vm)?;
        self.interrupted(|| {
            let first = code(vm.reset_step());
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            Self::others_are_busy(vm)?;
            let busy = Some(ErrorCode::Busy);
            expect(code(vm.run(0, 0, false)) == busy, "a vCPU ran")?;
            // EL2's own slot of a GICv2 comes before; the last step finds that nothing is left.
            let own = u64::from(matches!(self.gic, Gic::V2 { .. }));
            let rest = Self::count(|| vm.reset_step())?;
            expect(rest == parts + own, "not by steps")?;
            let gone = code(vm.mapping(self.ipa()));
            expect(gone == Some(ErrorCode::NotFound), "something is mapped")
        })??;
        words(vm.start_vcpu(0, self.ipa(), 0))
    }

    /// A device that does not snoop comes: pending pages are cleaned for it, where there are caches to
    /// clean; where write-back is forced, types follow.
    fn device(&self, vm: Vm) -> Result<(), &'static str> {
        let parts = if cleans() {
            words(vm.lock_slot_as(0, false))?;
            self.parts()
        } else {
            self.mapped(vm)?;
            self.parts()
        };
        self.interrupted(|| {
            let first = code(vm.device_step(true));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            Self::others_are_busy(vm)?;
            let other = code(vm.device_step(false));
            expect(other == Some(ErrorCode::Busy), "it went before it came")?;
            // The last step finds that nothing is left.
            let rest = Self::count(|| vm.device_step(true))?;
            expect(rest == parts, "not by steps")?;
            Self::count(|| vm.device_step(false)).map(drop)
        })?
    }

    /// It goes again: where write-back is forced, the types of a locked slot follow.
    fn departure(&self, vm: Vm) -> Result<(), &'static str> {
        words(vm.lock_slot_as(0, false))?;
        words(vm.start_vcpu(0, self.ipa(), 0))?;
        words(vm.noncoherent_device(true))?;
        self.interrupted(|| {
            if cleans() {
                let calls = Self::count(|| vm.device_step(false))?;
                return expect(calls == 1, "there are steps");
            }
            let first = code(vm.device_step(false));
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            Self::others_are_busy(vm)?;
            let busy = Some(ErrorCode::Busy);
            expect(code(vm.run(0, 0, false)) == busy, "a vCPU ran")?;
            expect(code(vm.device_step(true)) == busy, "it came before it went")?;
            // The last step finds that nothing is left.
            let rest = Self::count(|| vm.device_step(false))?;
            expect(rest == self.parts(), "not by steps")
        })?
    }

    /// A slot with a log: nothing is mapped in it, up to the boundary and from there on.
    fn logged(&self, vm: Vm) -> Result<(), &'static str> {
        words(vm.delete_slot(0))?;
        let create = || vm.create_slot_step(LOGGED, self.ipa(), self.ram());
        self.interrupted(|| {
            let first = code(create());
            expect(first == Some(ErrorCode::Again), "it was not cut short")?;
            let state = words(vm.slot_state(0))?;
            expect(state == Some(SlotState::Unfinished), "it is whole")?;
            Self::others_are_busy(vm)?;
            let leased = code(vm.top_up(self.part_of_ram()?));
            expect(leased == Some(ErrorCode::Busy), "its memory was given away")?;
            expect(Self::count(create)? == 1, "not two steps")?;
            expect(words(vm.dirty(0, 0))? == 0, "nobody wrote")?;
            expect(code(create()) == Some(ErrorCode::Exists), "it came twice")
        })??;
        words(vm.delete_slot(0))?;
        // One lease was made, and is gone.
        words(vm.top_up(self.part_of_ram()?))
    }

    /// The host never repeats its call: the VM can be ended, and gives everything back.
    fn abandoned(&self) -> Result<(), &'static str> {
        let vm = self.vm()?;
        self.mapped(vm)?;
        let first = self.interrupted(|| code(vm.delete_step(0)))?;
        expect(first == Some(ErrorCode::Again), "it was not cut short")?;
        end(vm)?;
        end(self.vm()?)
    }

    fn destruction(&self) -> Result<(), &'static str> {
        let vm = self.vm()?;
        words(vm.lock_slot_as(0, false))?;
        self.interrupted(|| self.destroy(vm))??;
        while words(vm.reclaim())?.is_some() {}
        Ok(())
    }

    fn destroy(&self, vm: Vm) -> Result<(), &'static str> {
        if !cleans() {
            return expect(Self::count(|| vm.destroy_step())? == 1, "there are steps");
        }
        let first = code(vm.destroy_step());
        expect(first == Some(ErrorCode::Again), "it was not cut short")?;
        let gone = Some(ErrorCode::NotFound);
        expect(code(vm.run(0, 0, false)) == gone, "a vCPU ran")?;
        expect(code(vm.slot_state(0)) == gone, "there is a slot")?;
        expect(
            code(vm.top_up(self.memory.more_state)) == gone,
            "it got memory",
        )?;
        let early = code(vm.reclaim());
        expect(
            early == Some(ErrorCode::Invalid),
            "memory came back too early",
        )?;
        let rest = Self::count(|| vm.destroy_step())?;
        // The last step finds that nothing is left.
        expect(rest == self.parts(), "not by steps")
    }

    /// The guest turns its caches on; the host's timer fires while EL2 cleans all of its memory.
    fn flush(&self, vm: Vm) -> Result<(), &'static str> {
        const TABLE: usize = 0x1000;
        load(self.ram(), guest::caches())?;
        let ram = mem::bytes_mut(self.ram());
        ram[TABLE..2 * TABLE].fill(0);
        let block = (self.ipa() & !0x3fff_ffff) | BLOCK;
        ram[TABLE + 8..TABLE + 16].copy_from_slice(&block.to_le_bytes());
        words(vm.lock_slot(0))?;
        words(vm.start_vcpu(0, self.ipa(), self.ipa() + TABLE as u64))?;
        gic::enable(self.gic)?;
        let (mut stopped_within, mut patience) = (0, ticks_per_second() / 1000);
        let before = if cleans() { self.ram().size() } else { 0 };
        loop {
            gic::set_timer(gic::now() + patience);
            let exit = words(vm.run(0, 0, false))?;
            while gic::take(self.gic).is_some() {}
            gic::stop_timer();
            let flushed = words(vm.counter(VmCounter::LinesFlushed))? * mem::line_size();
            match exit {
                Exit::SystemOff => {
                    expect(flushed == 2 * before, "not all of the memory was cleaned")?;
                    break;
                }
                Exit::Interrupted if before < flushed && flushed < 2 * before => {
                    stopped_within += 1
                }
                // The timer was too fast for the guest.
                Exit::Interrupted => patience += patience / 8,
                _ => return Err("the guest did something else"),
            }
        }
        expect(!cleans() || stopped_within > 0, NOT_CUT)
    }
}
