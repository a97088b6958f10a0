//! What a guest's exceptions mean, and who deals with them: EL2 itself, or the host.
//!
//! Nothing that a guest does ends EL2 or the VM: what can't be understood becomes an exception in
//! that guest.

use abi::{ErrorCode, Exit, VmCounter};
use el2::esr::{self, Abort, Access, Cause, FaultKind};
use el2::guest::mmio::{self, DataAccess};
use el2::guest::smccc::{self, Outcome as CallOutcome};
use el2::guest::sysreg::{self, Outcome as RegisterOutcome, Trapped};
use el2::inject::{self, Entry};
use el2::psci::{PsciError, StartOrder};
use el2::vgic::Kicks;
use memslot::fault::{FaultKind as MemoryFaultKind, FaultOutcome, Stage2Fault};
use memslot::toggle::CacheWatch;
use stage2::Ipa;

use crate::arch::regs::{self, Syndrome};
use crate::arch::world::{self, GuestRegs, hcr};
use crate::vcpu::{Next, Running};

/// Vectors of exceptions from a guest: synchronous, IRQ, FIQ, SError; plus four from AArch32.
const SYNC: u64 = 8;
const IRQ: u64 = 9;
const FIQ: u64 = 10;

/// Exception class of a trapped use of FP or SIMD (Arm ARM D24.2.40).
const EC_FP: u8 = 0x07;

/// The guest's GIC, as on QEMU's virt (docs/guest-platform.md).
const GICD: u64 = 0x0800_0000;
const GICD_SIZE: u64 = 0x1_0000;
const GICR: u64 = 0x080a_0000;
const GICR_STRIDE: u64 = 0x2_0000;

/// A load that the host completes with the next run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingLoad(DataAccess);

impl PendingLoad {
    /// Puts the host's value where the load wanted it, and steps over it.
    pub(crate) fn complete(self, regs: &mut GuestRegs, value: u64) {
        regs.set(self.0.register, self.0.extend(value));
        regs.skip();
    }
}

/// Handles one exception of the guest.
pub(crate) fn handle(run: &mut Running<'_>, vector: u64) -> Next {
    match vector & !4 {
        SYNC => synchronous(run),
        IRQ | FIQ => interrupt(run),
        _ => serror(run),
    }
}

fn synchronous(run: &mut Running<'_>) -> Next {
    let syndrome = regs::syndrome();
    match esr::decode(syndrome.esr) {
        Cause::Hvc(immediate) => call(run, immediate),
        Cause::Smc(immediate) => {
            run.state.context.regs.skip();
            call(run, immediate)
        }
        Cause::WaitFor => wait(run),
        Cause::SystemRegister(iss) => register(run, iss),
        Cause::Abort(abort) => fault(run, &abort, &syndrome),
        Cause::Other(EC_FP) => {
            run.state.counts.count(VmCounter::FpSwitches);
            run.host.lend_fp(&run.state.context);
            Next::Resume
        }
        Cause::Other(_) => undefined(run),
    }
}

/// A physical interrupt: the guest's timer, EL2's own kick, the virtual GIC's maintenance
/// interrupt, or the host's.
fn interrupt(run: &mut Running<'_>) -> Next {
    run.state.counts.count(VmCounter::Interrupts);
    if !run.state.timer_in_flight && regs::virtual_timer_fired() {
        return Next::Refresh;
    }
    let gic = &run.hypervisor.gic;
    if gic.maintenance_pending() {
        return Next::Refresh;
    }
    if !run.cpu.host_kick.swap(false, core::sync::atomic::Ordering::AcqRel) && gic.take_kick() {
        return Next::Refresh;
    }
    Next::Leave(Exit::Interrupted)
}

/// An asynchronous error while the guest ran: it is the guest's to deal with.
fn serror(run: &mut Running<'_>) -> Next {
    log::warn!(
        "VM {}: SError, ESR {:#x}",
        run.vm.index,
        regs::syndrome().esr
    );
    run.state.counts.count(VmCounter::Injected);
    run.state.context.hcr |= hcr::VSE;
    world::set_hcr(run.state.context.hcr);
    Next::Resume
}

/// WFI; WFE does not trap.
fn wait(run: &mut Running<'_>) -> Next {
    run.state.counts.count(VmCounter::Waits);
    run.state.context.regs.skip();
    run.save_interrupts();
    if run.vm.vgic.has_pending(run.index()) || regs::virtual_timer_fired() {
        return Next::Refresh;
    }
    Next::Leave(Exit::WaitForInterrupt {
        until: regs::virtual_timer_deadline(run.vm.world.time_offset),
    })
}

/// Makes the guest continue in its own exception handler.
fn inject(run: &mut Running<'_>, entry: &Entry) -> Next {
    run.state.counts.count(VmCounter::Injected);
    let regs = &mut run.state.context.regs;
    regs::write_exception(entry, regs.pc, regs.pstate);
    regs.pc = entry.pc;
    regs.pstate = entry.spsr;
    Next::Resume
}

fn interrupted(run: &Running<'_>) -> inject::Interrupted {
    let features = &run.hypervisor.features;
    regs::interrupted(features.pan, features.mte)
}

fn undefined(run: &mut Running<'_>) -> Next {
    let entry = inject::undefined(&interrupted(run));
    inject(run, &entry)
}

fn external_abort(run: &mut Running<'_>, abort: &Abort, esr: u64) -> Next {
    let entry = inject::external_abort(&interrupted(run), abort, esr);
    inject(run, &entry)
}

fn kick(run: &Running<'_>, kicks: Kicks) {
    for index in kicks.iter().filter(|index| *index != run.index()) {
        if let Ok(vcpu) = run.vm.vcpu(index as u64) {
            vcpu.kick(run.hypervisor);
        }
    }
}

/// HVC or SMC.
fn call(run: &mut Running<'_>, immediate: u16) -> Next {
    run.state.counts.count(VmCounter::Calls);
    let [id, a, b, c, ..] = run.state.context.regs.x;
    let platform = smccc::Platform {
        workarounds: run.hypervisor.workarounds,
        entropy: run.hypervisor.entropy(),
    };
    match smccc::answer(immediate, id, [a, b, c], &platform) {
        CallOutcome::Return(values) => {
            run.state.context.regs.x[..4].copy_from_slice(&values);
            Next::Resume
        }
        CallOutcome::CpuOn { mpidr, order } => cpu_on(run, mpidr, order),
        CallOutcome::AffinityInfo { mpidr } => {
            let answer = target(run, mpidr).map(|vcpu| vcpu.power.affinity_info());
            answered(run, answer)
        }
        CallOutcome::CpuOff => {
            run.vcpu.power.park();
            Next::Leave(Exit::VcpuOff)
        }
        CallOutcome::Suspend => {
            answered(run, Ok(0));
            wait_after_call(run)
        }
        CallOutcome::SystemOff => Next::Leave(Exit::SystemOff),
        CallOutcome::SystemReset { warm } => Next::Leave(Exit::SystemReset { warm }),
    }
}

fn answered(run: &mut Running<'_>, result: Result<u64, PsciError>) -> Next {
    run.state.context.regs.x[0] = result.unwrap_or_else(PsciError::to_register);
    Next::Resume
}

/// The vCPU with this affinity: vCPU n is Aff0 = n.
fn target<'a>(run: &Running<'a>, mpidr: u64) -> Result<&'a crate::vcpu::Vcpu, PsciError> {
    let vm = run.vm;
    vm.vcpu(mpidr).map_err(|_| PsciError::InvalidParameters)
}

fn cpu_on(run: &mut Running<'_>, mpidr: u64, order: StartOrder) -> Next {
    let done = target(run, mpidr).and_then(|vcpu| {
        vcpu.turn_on(order)?;
        Ok(vcpu.index)
    });
    answered(run, done.map(|_| 0));
    match done {
        Ok(index) => Next::Leave(Exit::VcpuOn { index }),
        Err(_) => Next::Resume,
    }
}

/// CPU_SUSPEND waits as WFI does, with the call already answered.
fn wait_after_call(run: &mut Running<'_>) -> Next {
    let pc = run.state.context.regs.pc;
    let next = wait(run);
    run.state.context.regs.pc = pc;
    next
}

/// A trapped system register or instruction.
fn register(run: &mut Running<'_>, iss: u32) -> Next {
    run.state.counts.count(VmCounter::SystemRegisters);
    let trapped = Trapped::decode(iss);
    let value = run.state.context.regs.get(trapped.register);
    let outcome = sysreg::access(&trapped, value, &run.hypervisor.id_registers);
    let regs = &mut run.state.context.regs;
    match outcome {
        RegisterOutcome::Read(value) => {
            regs.set(trapped.register, value);
            regs.skip();
            Next::Resume
        }
        RegisterOutcome::WriteIgnored => {
            regs.skip();
            Next::Resume
        }
        RegisterOutcome::Sgi(value) => {
            regs.skip();
            run.save_interrupts();
            let kicks = run.vm.vgic.sgi1r(run.index(), value);
            kick(run, kicks);
            Next::Refresh
        }
        RegisterOutcome::SetWay => {
            regs.skip();
            set_way(run)
        }
        RegisterOutcome::VmControl(register) => {
            regs.skip();
            vm_control(run, register, value)
        }
        RegisterOutcome::Undefined => undefined(run),
    }
}

/// Writes of SCTLR_EL1 are trapped while the guest's caches are off, or after set/way operations.
fn vm_control(run: &mut Running<'_>, register: sysreg::VmRegister, value: u64) -> Next {
    if register != sysreg::VmRegister::Sctlr {
        regs::write_vm_register(register, value);
        return Next::Resume;
    }
    let old = regs::sctlr_el1();
    regs::write_vm_register(register, value);
    run.vm.memory.guest_sctlr(&mut run.state.watch, old, value);
    watch(run)
}

fn set_way(run: &mut Running<'_>) -> Next {
    run.vm.memory.guest_set_way(&mut run.state.watch);
    watch(run)
}

/// Makes the trap of SCTLR_EL1 what the watch says.
fn watch(run: &mut Running<'_>) -> Next {
    let context = &mut run.state.context;
    context.hcr &= !hcr::TVM;
    if run.state.watch == CacheWatch::Watching {
        context.hcr |= hcr::TVM;
    }
    world::set_hcr(context.hcr);
    Next::Resume
}

/// A stage-2 fault.
fn fault(run: &mut Running<'_>, abort: &Abort, syndrome: &Syndrome) -> Next {
    let Some(ipa) = address(abort, syndrome) else {
        // Stage 1 has changed meanwhile: the access will fault again if it must.
        return Next::Resume;
    };
    if let Some(next) = in_gic(run, ipa, abort, syndrome) {
        return next;
    }
    let Some(kind) = memory_kind(abort.kind) else {
        return external_abort(run, abort, syndrome.esr);
    };
    let request = Stage2Fault {
        ipa: Ipa::new(ipa),
        access: match abort.access {
            Access::Read => memslot::fault::Access::Read,
            Access::Write => memslot::fault::Access::Write,
            Access::Fetch => memslot::fault::Access::Fetch,
        },
        kind,
    };
    match run.vm.memory.handle_fault(&request, &()) {
        Ok(FaultOutcome::Resolved) => {
            run.state.counts.count(VmCounter::Faults);
            Next::Resume
        }
        Ok(FaultOutcome::Retry) => Next::Resume,
        Ok(FaultOutcome::Mmio) => device(run, ipa, abort, syndrome),
        Ok(FaultOutcome::Abort) => external_abort(run, abort, syndrome.esr),
        Ok(FaultOutcome::NoFrame(gfn)) => Next::Leave(Exit::MemoryMissing {
            ipa: gfn.start().get(),
        }),
        Err(error) => refused(run, error, syndrome.esr),
    }
}

fn refused(run: &Running<'_>, error: memslot::error::Error, esr: u64) -> Next {
    let refusal = el2::vm_error::Refusal::from(error);
    Next::Leave(match refusal.code {
        ErrorCode::NoMemory => Exit::NeedPages {
            pages: refusal.pages,
        },
        ErrorCode::Again | ErrorCode::Busy => Exit::Interrupted,
        _ => {
            log::error!("VM {}: a fault can't be handled: {error}", run.vm.index);
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
        let page = world::translate_stage1(syndrome.far)?;
        return Some(page | syndrome.far & 0xfff);
    }
    Some(esr::fault_ipa(abort, syndrome.hpfar, syndrome.far))
}

/// An access to a device: EL2 decodes it, the host emulates it.
fn device(run: &mut Running<'_>, ipa: u64, abort: &Abort, syndrome: &Syndrome) -> Next {
    let Some(access) = mmio::decode(syndrome.esr) else {
        return external_abort(run, abort, syndrome.esr);
    };
    run.state.counts.count(VmCounter::MmioInHost);
    let size = access.size;
    if access.is_write {
        let regs = &mut run.state.context.regs;
        let value = access.mask(regs.get(access.register));
        regs.skip();
        return Next::Leave(Exit::MmioWrite { ipa, size, value });
    }
    run.state.load = Some(PendingLoad(access));
    Next::Leave(Exit::MmioRead { ipa, size })
}

/// An access to the distributor or a redistributor, if it is one.
fn in_gic(run: &mut Running<'_>, ipa: u64, abort: &Abort, syndrome: &Syndrome) -> Option<Next> {
    let frame = Frame::of(run, ipa)?;
    let Some(access) = mmio::decode(syndrome.esr) else {
        return Some(external_abort(run, abort, syndrome.esr));
    };
    run.state.counts.count(VmCounter::MmioInEl2);
    run.save_interrupts();
    let (vgic, index, size) = (&run.vm.vgic, run.index(), access.size);
    let value = access.mask(run.state.context.regs.get(access.register));
    let kicks = match (frame, access.is_write) {
        (Frame::Distributor(offset), true) => vgic.dist_write(index, offset, size, value),
        (Frame::Redistributor(of, offset), true) => {
            vgic.redist_write(index, of, offset, size, value)
        }
        (frame, false) => {
            let value = match frame {
                Frame::Distributor(offset) => vgic.dist_read(index, offset, size),
                Frame::Redistributor(of, offset) => vgic.redist_read(index, of, offset, size),
            };
            let regs = &mut run.state.context.regs;
            regs.set(access.register, access.extend(value));
            Kicks::NONE
        }
    };
    run.state.context.regs.skip();
    kick(run, kicks);
    Some(Next::Refresh)
}

/// A frame of the virtual GIC, and the offset in it.
#[derive(Clone, Copy, Debug)]
enum Frame {
    Distributor(u64),
    Redistributor(usize, u64),
}

impl Frame {
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
