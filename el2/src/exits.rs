//! What a guest's exceptions mean, and who deals with them: EL2 itself, or the host.
//!
//! Nothing that a guest does ends EL2 or the VM: what can't be understood becomes an exception in
//! that guest.

use abi::{ErrorCode, Exit, VmCounter};
use el2::esr::{self, Abort, Access, Cause, FaultKind};
use el2::guest::entropy::EntropySource;
use el2::guest::idregs::GuestIds;
use el2::guest::mmio::{self, Decoded, MmioAccess};
use el2::guest::protected::{MmioGuard, Request};
use el2::guest::psci::{Action as PowerAction, Power};
use el2::guest::smccc::{self, Action, Caller, Mitigations};
use el2::guest::sysreg::{self, Direction, Outcome, SgiGroup, Trapped, VmRegister};
use el2::guest::timer::TimerRegister;
use el2::guest_memory::Moved;
use el2::inject::{self, Entry};
use el2::vgic::Kicks;
use memslot::addr::Gfn;
use memslot::fault::{FaultKind as MemoryFaultKind, FaultOutcome, Stage2Fault};
use memslot::slot::SlotKind;
use memslot::steps::Progress;
use memslot::toggle::CacheWatch;
use stage2::Ipa;

use crate::arch::regs::{self, Syndrome};
use crate::arch::world::{self, GuestRegs, hcr};
use crate::arch::{cpu, firmware, windows};
use crate::console::say;
use crate::hypervisor::Hypervisor;
use crate::vcpu::{Next, Running, VcpuState};
use crate::vm::Vm;

/// The lower bits of the vectors of exceptions from a guest, of either width: 0 is a synchronous one.
const IRQ: u64 = 1;
const FIQ: u64 = 2;

/// Exception classes (Arm ARM D24.2.40): a trapped use of FP or SIMD, and those that come all the time.
const EC_FP: u8 = 0x07;
const EC_HVC: u8 = 0x16;
const EC_SYSTEM_REGISTER: u8 = 0x18;
const EC_DATA_ABORT: u8 = 0x24;

/// The guest's GIC, as on QEMU's virt (docs/guest-platform.md).
const GICD: u64 = 0x0800_0000;
const GICD_SIZE: u64 = 0x1_0000;
const GICR: u64 = 0x080a_0000;
const GICR_STRIDE: u64 = 0x2_0000;

/// A load that the host completes with the next run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingLoad {
    /// Syndrome of its abort, which says where the value goes.
    esr: u64,
}

impl PendingLoad {
    /// Puts the host's value where the load wanted it, and steps over it.
    #[inline]
    pub(crate) fn complete(self, regs: &mut GuestRegs, value: u64) {
        if let Decoded::Access(access) = mmio::decode(self.esr) {
            regs.set(access.rt(), access.loaded(value));
        }
        regs.skip(self.esr);
    }
}

/// Handles one exception of the guest.
#[inline]
pub(crate) fn handle(run: &mut Running<'_>, vector: u64) -> Next {
    if vector.is_multiple_of(4) {
        synchronous(run)
    } else {
        asynchronous(run, vector)
    }
}

/// What a guest causes all the time is handled here; what it seldom does, behind a call.
#[inline]
fn synchronous(run: &mut Running<'_>) -> Next {
    let esr = regs::esr();
    match esr::class(esr) {
        EC_HVC => call(run, esr::immediate(esr)),
        EC_DATA_ABORT => data_abort(run, esr),
        EC_SYSTEM_REGISTER => register(run, esr::iss(esr)),
        _ => seldom(run, esr),
    }
}

#[inline(never)]
fn seldom(run: &mut Running<'_>, esr: u64) -> Next {
    match esr::decode(esr) {
        Cause::WaitFor => wait(run),
        Cause::Abort(_) => fault(run, esr),
        Cause::Other(EC_FP) => {
            run.vcpu.counts.count(VmCounter::FpSwitches);
            let VcpuState { host, context, .. } = &mut *run.state;
            host.lend_fp(context);
            Next::Resume
        }
        // A guest has no EL3, says its ID_AA64PFR0_EL1.
        _ => undefined(run),
    }
}

#[inline]
fn asynchronous(run: &mut Running<'_>, vector: u64) -> Next {
    match vector & 3 {
        IRQ | FIQ => interrupt(run),
        _ => serror(run),
    }
}

/// A physical interrupt: a timer of the guest, EL2's own kick, the virtual GIC's maintenance
/// interrupt, or the host's.
#[inline(never)]
fn interrupt(run: &mut Running<'_>) -> Next {
    run.vcpu.counts.count(VmCounter::Interrupts);
    let maintenance = run.hypervisor.gic.maintenance_pending();
    run.save_interrupts();
    let may_be_timer = run.hypervisor.gic.timer_may_fire(run.cpu);
    let timer = may_be_timer && regs::virtual_timer_fired();
    if timer || maintenance || run.physical_timer_fired() {
        return Next::Refresh;
    }
    // Withdrawn before it is looked whom it was for. One that the host waits for is pending again, for it.
    if run.hypervisor.gic.take_kick(run.cpu) {
        if !run.cpu.host_kick.take() {
            return Next::Refresh;
        }
        run.hypervisor.gic.kick(run.cpu);
    }
    run.leave(Exit::Interrupted)
}

/// An asynchronous error while the guest ran: it is the guest's to deal with.
#[cold]
fn serror(run: &mut Running<'_>) -> Next {
    say!(
        Warn,
        "VM {}: SError, ESR {:#x}",
        run.vm.index,
        regs::syndrome().esr
    );
    run.vcpu.counts.count(VmCounter::Injected);
    run.state.context.hcr |= hcr::VSE;
    world::set_hcr(run.state.context.hcr);
    Next::Resume
}

/// WFI; WFE does not trap.
fn wait(run: &mut Running<'_>) -> Next {
    regs::skip_instruction();
    run.vcpu.counts.count(VmCounter::Waits);
    sleep(run)
}

/// Waits for an interrupt: here if there is one, else in the host.
fn sleep(run: &mut Running<'_>) -> Next {
    run.save_interrupts();
    run.refresh_timers();
    if run.vm.vgic.has_pending(run.index()) {
        return Next::Refresh;
    }
    if run.wait_here {
        // The host has nothing else for this core: whatever ends the wait is looked at as if it had
        // interrupted the guest, which may wake for nothing. A timer whose line has fallen since must be
        // able to wake it.
        let in_flight = run.state.gic.timer_in_flight;
        run.hypervisor.gic.set_timer_active(run.cpu, in_flight);
        cpu::wait_as_guest();
        return interrupt(run);
    }
    let virtual_timer = regs::virtual_timer_deadline(run.vm.world.time_offset());
    let physical_timer = run.state.physical_timer.deadline().unwrap_or(u64::MAX);
    run.leave(Exit::WaitForInterrupt {
        until: virtual_timer.min(physical_timer),
    })
}

/// Makes the guest continue in its own exception handler.
fn inject(run: &mut Running<'_>, entry: &Entry) -> Next {
    run.vcpu.counts.count(VmCounter::Injected);
    regs::inject(entry);
    Next::Resume
}

fn interrupted(run: &Running<'_>) -> inject::Interrupted {
    let features = &run.hypervisor.features;
    regs::interrupted(features.pan, features.mte)
}

#[cold]
fn undefined(run: &mut Running<'_>) -> Next {
    let entry = inject::undefined(&interrupted(run));
    inject(run, &entry)
}

#[cold]
fn external_abort(run: &mut Running<'_>, abort: &Abort, esr: u64) -> Next {
    let entry = inject::external_abort(&interrupted(run), abort, esr);
    inject(run, &entry)
}

/// Kicks the other vCPUs; says whether this one has to look at its interrupts, too.
#[inline]
fn kick(run: &Running<'_>, kicks: Kicks) -> Next {
    let mut next = Next::Resume;
    for index in kicks.iter() {
        if index == run.index() {
            next = Next::Refresh;
        } else if let Ok(vcpu) = run.vm.vcpu(index as u64) {
            vcpu.kick(run.hypervisor);
        }
    }
    next
}

/// The VM of a vCPU that makes a call.
struct Calling<'a>(&'static Hypervisor, &'a Vm);

impl Caller for Calling<'_> {
    #[inline]
    fn power(&self) -> &Power {
        &self.1.power
    }

    fn ids(&self) -> &GuestIds {
        &self.1.ids
    }

    fn mitigations(&self) -> &Mitigations {
        &self.0.mitigations
    }

    fn entropy(&self) -> Option<&dyn EntropySource> {
        let source = self.0.entropy.as_ref()?;
        Some(source)
    }

    fn guard(&self) -> Option<&MmioGuard> {
        self.1.protection.as_ref().map(|p| &p.guard)
    }

    fn is_memory(&self, ipa: u64) -> bool {
        Gfn::try_new(ipa >> 12).is_some_and(|gfn| self.1.memory.find_slot(gfn).is_some())
    }
}

/// HVC.
#[inline]
fn call(run: &mut Running<'_>, immediate: u16) -> Next {
    run.vcpu.counts.count(VmCounter::Calls);
    let [x0, x1, x2, x3, ..] = run.state.context.regs.x;
    let caller = Calling(run.hypervisor, run.vm);
    match smccc::call(immediate, [x0, x1, x2, x3], &caller) {
        Action::Power(action) => power(run, action),
        Action::Return(values) => {
            run.state.context.regs.x[..4].copy_from_slice(&values);
            Next::Resume
        }
        Action::Firmware(id) => {
            firmware::call(u64::from(id), [0; 7]);
            answered(run, 0)
        }
        Action::Attributes(address) => attributes(run, address),
        Action::Protected(request) => protected(run, request),
    }
}

/// A protected guest's call about its memory or its devices.
#[inline(never)]
fn protected(run: &mut Running<'_>, request: Request) -> Next {
    let answer = match request {
        Request::Answer(x0, x1) => [x0, x1, 0, 0],
        Request::Measurement { half } => {
            let protection = run.vm.protection.as_ref();
            match protection.map(|p| p.measurement(half)) {
                Some(Ok([first, second])) => [0, first, second, 0],
                _ => [smccc::INVALID_PARAMETER, 0, 0, 0],
            }
        }
        Request::Memory { call, ipa, pages } => {
            match run.vm.pages(run.hypervisor).call(call, ipa, pages) {
                Moved::Pages(pages) => [0, pages, 0, 0],
                Moved::Refused => [smccc::INVALID_PARAMETER, 0, 0, 0],
                Moved::After(exit) => {
                    regs::repeat_call();
                    return run.leave(exit);
                }
            }
        }
    };
    run.state.context.regs.x[..4].copy_from_slice(&answer);
    Next::Resume
}

/// How both stages together access an address of the guest.
#[inline(never)]
fn attributes(run: &mut Running<'_>, address: u64) -> Next {
    let answer = match windows::memory_attributes(address) {
        Some((attribute, shareability)) => [0, attribute, shareability, 0],
        None => [smccc::INVALID_PARAMETER, 0, 0, 0],
    };
    run.state.context.regs.x[..4].copy_from_slice(&answer);
    Next::Resume
}

fn answered(run: &mut Running<'_>, value: u64) -> Next {
    run.state.context.regs.x[0] = value;
    Next::Resume
}

fn power(run: &mut Running<'_>, action: PowerAction) -> Next {
    match action {
        PowerAction::Return(value) => answered(run, value),
        PowerAction::TurnedOn { index } => {
            answered(run, 0);
            run.leave(Exit::VcpuOn { index })
        }
        PowerAction::Off => run.leave(Exit::VcpuOff),
        PowerAction::Standby => {
            answered(run, 0);
            sleep(run)
        }
        PowerAction::PowerDown(order) => {
            run.state.restart_when_woken(&run.vm.features, order);
            sleep(run)
        }
        PowerAction::SystemOff => end(run, Exit::SystemOff),
        PowerAction::SystemReset { warm } => end(run, Exit::SystemReset { warm }),
    }
}

/// The guest's own end of the machine: it never goes on behind it.
fn end(run: &mut Running<'_>, exit: Exit) -> Next {
    run.vm.power.end();
    run.leave(exit)
}

/// A trapped system register or instruction.
#[inline]
fn register(run: &mut Running<'_>, iss: u32) -> Next {
    run.vcpu.counts.count(VmCounter::SystemRegisters);
    // What a guest with several vCPUs writes all the time, first.
    match sysreg::sgi_written(iss) {
        Some(rt) if run.vm.ids.has_gic_registers() => {
            let value = run.state.context.regs.get(rt);
            regs::skip_instruction();
            send_sgi(run, value)
        }
        _ => other_register(run, iss),
    }
}

/// ICC_SGI1R_EL1.
#[inline]
fn send_sgi(run: &mut Running<'_>, value: u64) -> Next {
    let kicks = run.vm.vgic.sgi1r(run.index(), value);
    kick(run, kicks)
}

#[inline]
fn other_register(run: &mut Running<'_>, iss: u32) -> Next {
    let trapped = Trapped::decode(iss);
    let value = run.state.context.regs.get(trapped.rt);
    let outcome = sysreg::decide(trapped, &run.vm.ids);
    if outcome == Outcome::Undefined {
        return undefined(run);
    }
    regs::skip_instruction();
    match outcome {
        Outcome::Read(value) => {
            run.state.context.regs.set(trapped.rt, value);
            Next::Resume
        }
        Outcome::PhysicalCounter => {
            run.state.context.regs.set(trapped.rt, regs::ticks());
            Next::Resume
        }
        Outcome::WriteIgnored | Outcome::Sgi(SgiGroup::Zero) | Outcome::Deactivate => Next::Resume,
        Outcome::Sgi(SgiGroup::One) => send_sgi(run, value),
        Outcome::SetWay => {
            run.state.caches.set_way();
            watch(run)
        }
        Outcome::VmControl(register) => vm_control(run, register, value),
        Outcome::PhysicalTimer(register) => physical_timer(run, trapped, register, value),
        Outcome::Undefined => Next::Resume,
    }
}

#[inline(never)]
fn physical_timer(
    run: &mut Running<'_>,
    trapped: Trapped,
    register: TimerRegister,
    value: u64,
) -> Next {
    let now = regs::ticks();
    match trapped.direction {
        Direction::Read => {
            let value = run.state.physical_timer.read(register, now);
            run.state.context.regs.set(trapped.rt, value);
            Next::Resume
        }
        Direction::Write => {
            run.state.physical_timer.write(register, value, now);
            Next::Refresh
        }
    }
}

/// Writes of SCTLR_EL1 are trapped while the guest's caches are off, or after set/way operations.
#[inline(never)]
fn vm_control(run: &mut Running<'_>, register: VmRegister, value: u64) -> Next {
    if register != VmRegister::Sctlr {
        regs::write_vm_register(register, value);
        return Next::Resume;
    }
    let old = regs::sctlr_el1();
    regs::write_vm_register(register, value);
    run.state.caches.sctlr_written(old, value);
    watch(run)
}

/// Makes the trap of SCTLR_EL1 what the watch says.
fn watch(run: &mut Running<'_>) -> Next {
    let context = &mut run.state.context;
    world::note_serror(context);
    context.hcr &= !hcr::TVM;
    if run.state.caches.watch == CacheWatch::Watching {
        context.hcr |= hcr::TVM;
    }
    world::set_hcr(context.hcr);
    if run.state.caches.owed.is_owed() {
        return flush(run);
    }
    Next::Resume
}

/// Does the flush that the guest has asked for, before its next instruction. The host's interrupts
/// are not kept waiting for all of it: the vCPU leaves, and goes on with the flush when it runs again.
#[cold]
pub(crate) fn flush(run: &mut Running<'_>) -> Next {
    while run.state.caches.owed.is_owed() {
        let (memory, owed) = (&run.vm.memory, &mut run.state.caches.owed);
        if memory.flush_in_steps(owed, || !regs::interrupt_pending()) == Progress::More {
            match interrupt(run) {
                Next::Leave => return Next::Leave,
                Next::Resume | Next::Refresh => run.refresh_interrupts(),
            }
        }
    }
    Next::Resume
}

/// A data abort: an access to the virtual GIC, or another fault.
#[inline]
fn data_abort(run: &mut Running<'_>, esr: u64) -> Next {
    let Syndrome { far, hpfar, .. } = regs::syndrome();
    let Some(ipa) = esr::untranslated(esr, hpfar, far) else {
        return fault(run, esr);
    };
    match Frame::of(run, ipa) {
        Some(frame) => in_gic(run, frame, ipa, esr),
        None => resolve(run, ipa, esr),
    }
}

/// A fault that is not that of a plain access.
#[inline(never)]
fn fault(run: &mut Running<'_>, esr: u64) -> Next {
    let abort = esr::abort(esr);
    let Some(ipa) = address(&abort, &regs::syndrome()) else {
        // Stage 1 has changed meanwhile: the access will fault again if it must.
        return Next::Resume;
    };
    if Frame::of(run, ipa).is_some() {
        // What can be emulated does not come here.
        return external_abort(run, &abort, esr);
    }
    resolve(run, ipa, esr)
}

/// A fault at an address where there is memory, or a device of the host's.
#[inline(never)]
fn resolve(run: &mut Running<'_>, ipa: u64, esr: u64) -> Next {
    let abort = &esr::abort(esr);
    let Some(kind) = memory_kind(abort.kind) else {
        return external_abort(run, abort, esr);
    };
    if abort.on_s1_walk && abort.kind == FaultKind::Permission && is_device(run, ipa) {
        // HCR_EL2.PTW: a table in a device, which no leaf would ever allow.
        return external_abort(run, abort, esr);
    }
    let request = Stage2Fault {
        ipa: Ipa::new(ipa),
        access: match abort.needs() {
            Access::Read => memslot::fault::Access::Read,
            Access::Write => memslot::fault::Access::Write,
            Access::Fetch => memslot::fault::Access::Fetch,
        },
        kind,
    };
    match run.vm.memory.handle_fault(&request, &()) {
        Ok(FaultOutcome::Resolved) => {
            run.vcpu.counts.count(VmCounter::Faults);
            Next::Resume
        }
        Ok(FaultOutcome::Retry) => Next::Resume,
        Ok(FaultOutcome::Mmio) => device(run, ipa, abort, esr),
        Ok(FaultOutcome::Abort) => external_abort(run, abort, esr),
        Ok(FaultOutcome::NoFrame(_)) if run.vm.pages(run.hypervisor).is_poisoned(ipa) => {
            external_abort(run, abort, esr)
        }
        Ok(FaultOutcome::NoFrame(gfn)) => run.leave(Exit::MemoryMissing {
            ipa: gfn.start().get(),
        }),
        Err(error) => refused(run, error, esr),
    }
}

fn is_device(run: &Running<'_>, ipa: u64) -> bool {
    let slot = Gfn::try_new(ipa >> 12).and_then(|gfn| run.vm.memory.find_slot(gfn));
    slot.is_some_and(|(slot, _)| slot.kind == SlotKind::Mmio)
}

#[cold]
fn refused(run: &mut Running<'_>, error: memslot::error::Error, esr: u64) -> Next {
    let refusal = el2::vm_error::Refusal::from(error);
    run.leave(match refusal.code {
        ErrorCode::NoMemory => Exit::NeedPages {
            pages: refusal.pages,
        },
        ErrorCode::Again | ErrorCode::Busy => Exit::Interrupted,
        _ => {
            say!(
                Error,
                "VM {}: a fault can't be handled: error {}",
                run.vm.index,
                refusal.code.to_register().cast_signed()
            );
            let esr = if run.vm.config.protected { 0 } else { esr };
            Exit::Broken { esr }
        }
    })
}

const fn memory_kind(kind: FaultKind) -> Option<MemoryFaultKind> {
    match kind {
        FaultKind::Translation => Some(MemoryFaultKind::Translation),
        FaultKind::Permission => Some(MemoryFaultKind::Permission),
        FaultKind::AccessFlag => Some(MemoryFaultKind::AccessFlag),
        FaultKind::AddressSize | FaultKind::Other(_) => None,
    }
}

/// The address that faulted. HPFAR_EL2 does not hold it for a permission fault outside a table
/// walk (Arm ARM D24.2.61): then stage 1 is asked.
fn address(abort: &Abort, syndrome: &Syndrome) -> Option<u64> {
    if abort.kind == FaultKind::Permission && !abort.on_s1_walk {
        let page = windows::translate_stage1(syndrome.far)?;
        return Some(page | syndrome.far & 0xfff);
    }
    Some(esr::fault_ipa(abort, syndrome.hpfar, syndrome.far))
}

/// An access to a device: EL2 decodes it, the host emulates it.
fn device(run: &mut Running<'_>, ipa: u64, abort: &Abort, esr: u64) -> Next {
    let guard = run.vm.protection.as_ref().map(|p| &p.guard);
    if guard.is_some_and(|guard| !guard.allows(ipa)) {
        return external_abort(run, abort, esr);
    }
    let decoded = match abort.access {
        Access::Fetch => Decoded::ExternalAbort,
        Access::Read | Access::Write => decoded(ipa, esr),
    };
    let access = match decoded {
        Decoded::Access(access) => access,
        Decoded::SkipMaintenance => {
            regs::skip_instruction();
            return Next::Resume;
        }
        Decoded::ExternalAbort => return external_abort(run, abort, esr),
    };
    run.vcpu.counts.count(VmCounter::MmioInHost);
    let size = access.size();
    if let MmioAccess::Write { rt, .. } = access {
        let value = access.stored(run.state.context.regs.get(rt));
        regs::skip_instruction();
        return run.leave(Exit::MmioWrite { ipa, size, value });
    }
    run.state.load = Some(PendingLoad { esr });
    run.leave(Exit::MmioRead { ipa, size })
}

/// The access behind an abort: what has no syndrome, or crosses registers, reaches none.
#[inline]
fn decoded(ipa: u64, esr: u64) -> Decoded {
    match mmio::decode(esr) {
        Decoded::Access(access) if !access.is_aligned(ipa) => Decoded::ExternalAbort,
        other => other,
    }
}

/// An access to the distributor or a redistributor.
#[inline]
fn in_gic(run: &mut Running<'_>, frame: Frame, ipa: u64, esr: u64) -> Next {
    let access = match decoded(ipa, esr) {
        Decoded::Access(access) => access,
        Decoded::SkipMaintenance => {
            regs::skip_instruction();
            return Next::Resume;
        }
        Decoded::ExternalAbort => return external_abort(run, &esr::abort(esr), esr),
    };
    run.vcpu.counts.count(VmCounter::MmioInEl2);
    if matches!(access, MmioAccess::Write { .. }) {
        return gic_write(run, frame, access);
    }
    if frame.shows_lists() {
        // What the list registers say now belongs to the answer.
        run.save_interrupts();
    }
    let (vgic, index, size) = (&run.vm.vgic, run.index(), access.size());
    let value = match frame {
        Frame::Distributor(at) => vgic.dist_read(index, at, size),
        Frame::Redistributor(of, at) => vgic.redist_read(of, at, size),
    };
    let regs = &mut run.state.context.regs;
    regs.set(access.rt(), access.loaded(value));
    regs::skip_instruction();
    // The loop around this looks at the list registers.
    Next::Resume
}

#[inline(never)]
fn gic_write(run: &mut Running<'_>, frame: Frame, access: MmioAccess) -> Next {
    // What the list registers say now changes with it.
    run.save_interrupts();
    let (vgic, index, size) = (&run.vm.vgic, run.index(), access.size());
    let value = access.stored(run.state.context.regs.get(access.rt()));
    let kicks = match frame {
        Frame::Distributor(at) => vgic.dist_write(index, at, size, value),
        Frame::Redistributor(of, at) => vgic.redist_write(of, at, size, value),
    };
    regs::skip_instruction();
    let _: Next = kick(run, kicks);
    Next::Refresh
}

/// A frame of the virtual GIC, and the offset in it.
#[derive(Clone, Copy, Debug)]
enum Frame {
    Distributor(u64),
    Redistributor(usize, u64),
}

impl Frame {
    /// Whether the register shows what list registers hold: ISPENDR, ICPENDR, ISACTIVER, ICACTIVER,
    /// and a GICv2's pending SGIs.
    fn shows_lists(&self) -> bool {
        let (Self::Distributor(at) | Self::Redistributor(_, at)) = *self;
        matches!(at & 0xffff, 0x200..0x400 | 0xf00..0xf30)
    }

    fn of(run: &Running<'_>, ipa: u64) -> Option<Self> {
        if let Some(offset) = ipa.checked_sub(GICD).filter(|offset| *offset < GICD_SIZE) {
            return Some(Self::Distributor(offset));
        }
        let offset = ipa.checked_sub(GICR)?;
        let frame = offset / GICR_STRIDE;
        let is_one = run.hypervisor.gic.version() == 3 && frame < u64::from(run.vm.config.vcpus);
        is_one.then_some(Self::Redistributor(frame as usize, offset % GICR_STRIDE))
    }
}
