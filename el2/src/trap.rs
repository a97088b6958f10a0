//! Exceptions from the host: hypercalls, firmware calls, stage-2 faults.
//!
//! Nothing that the host does here panics: what is unknown becomes an undefined-instruction
//! exception or NOT_SUPPORTED in the host, and EL2 goes on.

use core::fmt;

use abi::{Counter, SMCCC_NOT_SUPPORTED, SMCCC_SUCCESS};
use el2::esr::{self, Abort, Access, Cause, FaultKind};
use el2::guest::entropy;
use el2::guest::mmio::{self, Decoded, MmioAccess};
use el2::psci::{self, PsciError, Request, StartOrder};
use el2::smc::{self, Verdict};
use el2::{calls, hvc, inject};

use crate::arch::exceptions::Regs;
use crate::arch::regs::{self, Syndrome};
use crate::arch::{cpu, firmware};
use crate::console::{self, say};
use crate::hypervisor::{self, Hypervisor};
use crate::{iommu, panic, power, smp};

/// Vectors of synchronous exceptions from AArch64 and AArch32.
const SYNC_64: u64 = 8;
const SYNC_32: u64 = 12;

/// Handles an exception from the host.
pub(crate) fn from_lower(regs: &mut Regs, vector: u64) {
    let Some(hypervisor) = hypervisor::get() else {
        return;
    };
    if vector != SYNC_64 && vector != SYNC_32 {
        // No interrupt is routed to EL2 while the host runs: nothing to do but go back.
        say!(
            Error,
            "unexpected exception from the host: {}",
            panic::vector_name(vector)
        );
        return;
    }
    let esr = regs::esr();
    match esr::decode(esr) {
        Cause::Hvc(immediate) => hypercall(hypervisor, regs, immediate),
        Cause::Smc(immediate) => {
            regs::skip_instruction();
            hypervisor.counters.count(Counter::TrappedSmcs);
            call(hypervisor, regs, immediate, true);
        }
        Cause::Abort(abort) => fault(hypervisor, regs, &abort, &regs::syndrome()),
        Cause::WaitFor => regs::skip_instruction(),
        Cause::SystemRegister(_) | Cause::Other(_) => {
            let (at, _) = regs::return_state();
            // Programs at EL0 can do that, too, as often as they like: not on every console.
            say!(Debug, "host: unexpected trap, ESR {esr:#x} at {at:#x}");
            undefined(hypervisor);
        }
    }
}

/// Injects an undefined-instruction exception.
fn undefined(hypervisor: &Hypervisor) {
    let features = &hypervisor.features;
    regs::inject(&inject::undefined(&regs::interrupted(
        features.pan,
        features.mte,
    )));
}

/// A call by HVC.
#[inline]
fn hypercall(hypervisor: &'static Hypervisor, regs: &mut Regs, immediate: u16) {
    hypervisor.counters.count(Counter::Hypercalls);
    // The call that a host makes all the time, first; it is on no list of the others.
    if immediate == 0 && regs.x[0] == abi::Call::VcpuRun as u64 {
        let [_, a, b, c, d, e, f, ..] = regs.x;
        iommu::poll();
        let answer = calls::run_vcpu(hypervisor, hypervisor.vms, [a, b, c, d, e, f]);
        return give(regs, answer);
    }
    call(hypervisor, regs, immediate, false);
}

/// A call by HVC or SMC. Only HVC reaches our own hypercalls.
#[inline(never)]
fn call(hypervisor: &'static Hypervisor, regs: &mut Regs, immediate: u16, by_smc: bool) {
    match smc::judge(immediate, regs.x[0]) {
        Verdict::Psci => regs.x[0] = psci_call(hypervisor, regs),
        Verdict::Version => regs.x[0] = smc::SMCCC_VERSION,
        Verdict::ArchFeatures => match smc::arch_feature(regs.x[1]) {
            Some(answer) => regs.x[0] = answer,
            None => forward(hypervisor, regs),
        },
        Verdict::Forward => forward(hypervisor, regs),
        Verdict::Refuse if by_smc => regs.x[0] = SMCCC_NOT_SUPPORTED,
        Verdict::Refuse => {
            let host = hvc::Host {
                features: hypervisor.abi_features(),
                counters: &hypervisor.counters,
            };
            match hvc::answer(immediate, regs.x[0], regs.x[1], &host) {
                hvc::Answer::Now(answer) => regs.x[..4].copy_from_slice(&answer),
                hvc::Answer::AboutVms(call) => about_vms(hypervisor, regs, call),
            }
        }
    }
}

/// A call about VMs.
#[inline]
fn about_vms(hypervisor: &'static Hypervisor, regs: &mut Regs, call: abi::Call) {
    let [_, a, b, c, d, e, f, ..] = regs.x;
    iommu::poll();
    let answer = calls::perform(hypervisor, hypervisor.vms, call, [a, b, c, d, e, f]);
    give(regs, answer);
}

/// Gives the host the answer of a call about VMs.
#[inline]
fn give(regs: &mut Regs, answer: [u64; 4]) {
    regs.x[0] = SMCCC_SUCCESS;
    regs.x[1..5].copy_from_slice(&answer);
}

/// Hands an allow-listed call to firmware, where there is one. Calls for random numbers are EL2's where the
/// host has lost its generator to it.
fn forward(hypervisor: &Hypervisor, regs: &mut Regs) {
    let [id, argument, ..] = regs.x;
    if let (Some(source), Ok(id)) = (hypervisor.generator(), u32::try_from(id))
        && let Some(answer) = entropy::call(id, argument, Some(source))
    {
        regs.x[..4].copy_from_slice(&answer);
        return;
    }
    if !hypervisor.has_firmware() {
        regs.x[0] = SMCCC_NOT_SUPPORTED;
        return;
    }
    let [id, a, b, c, d, e, f, g, ..] = regs.x;
    let answer = firmware::call(id, [a, b, c, d, e, f, g]);
    regs.x[..4].copy_from_slice(&answer);
}

/// Serves PSCI; the result is the new `x0`.
fn psci_call(hypervisor: &'static Hypervisor, regs: &Regs) -> u64 {
    iommu::poll();
    let [id, first, second, third, ..] = regs.x;
    let Ok(id) = u32::try_from(id) else {
        return SMCCC_NOT_SUPPORTED;
    };
    let result = match psci::decode(id, [first, second, third]) {
        Request::Version => Ok(psci::VERSION),
        Request::Features(id) => Ok(psci::features(id)),
        Request::CpuSuspend {
            powerdown,
            entry,
            context,
        } => suspend(hypervisor, powerdown, StartOrder { entry, context }),
        Request::CpuOff => turn_off(hypervisor),
        Request::CpuOn {
            mpidr,
            entry,
            context,
        } => turn_on(hypervisor, mpidr, StartOrder { entry, context }),
        Request::AffinityInfo { mpidr, level: 0 } => hypervisor
            .cpu(mpidr)
            .map(|cpu| cpu.power.affinity_info())
            .ok_or(PsciError::InvalidParameters),
        Request::AffinityInfo { .. } => Err(PsciError::InvalidParameters),
        Request::MigrateInfoType => Ok(psci::MIGRATE_NOT_NEEDED),
        Request::SystemOff => power::off(&hypervisor.machine),
        Request::SystemReset => power::reset(&hypervisor.machine),
        Request::Unknown => Err(PsciError::NotSupported),
    };
    result.unwrap_or_else(PsciError::to_register)
}

/// An entry point must be an instruction's address in the host's own memory.
fn check_entry(hypervisor: &Hypervisor, entry: u64) -> Result<(), PsciError> {
    let owner = hypervisor.ownership.pages().owner(entry);
    if entry.is_multiple_of(4) && owner == Some(el2::page_state::Owner::Host) {
        Ok(())
    } else {
        Err(PsciError::InvalidAddress)
    }
}

fn turn_on(hypervisor: &Hypervisor, mpidr: u64, order: StartOrder) -> Result<u64, PsciError> {
    let cpu = hypervisor.cpu(mpidr).ok_or(PsciError::InvalidParameters)?;
    check_entry(hypervisor, order.entry)?;
    cpu.power.order(order)?;
    smp::wake(hypervisor, cpu);
    Ok(0)
}

fn turn_off(hypervisor: &Hypervisor) -> ! {
    let me = cpu::this_cpu().map(|cpu| cpu.index);
    let others = hypervisor.cpus.iter().filter(|cpu| Some(cpu.index) != me);
    if others
        .into_iter()
        .all(|cpu| cpu.power.is_off() || !cpu.power.is_alive())
    {
        say!(
            Error,
            "the host turned off its last core: nothing can wake the machine"
        );
    }
    smp::park()
}

fn suspend(
    hypervisor: &'static Hypervisor,
    powerdown: bool,
    order: StartOrder,
) -> Result<u64, PsciError> {
    if powerdown {
        check_entry(hypervisor, order.entry)?;
    }
    cpu::wait_for_interrupt();
    match cpu::this_cpu() {
        Some(cpu) if powerdown => smp::run_host(hypervisor, cpu, order),
        _ => Ok(0),
    }
}

/// A stage-2 fault: map what is the host's, refuse the rest.
fn fault(hypervisor: &Hypervisor, regs: &mut Regs, abort: &Abort, syndrome: &Syndrome) {
    iommu::poll();
    let ipa = esr::fault_ipa(abort, syndrome.hpfar, syndrome.far);
    if redistributor(hypervisor, regs, abort, syndrome.esr, ipa) {
        return;
    }
    // Only a missing translation can be mended. HPFAR is not even valid for a permission fault
    // (Arm ARM D24.2.61): that is a fetch from device memory.
    let mapped = abort.kind == FaultKind::Translation && hypervisor.host.fault(hypervisor, ipa);
    if mapped {
        hypervisor.counters.count(Counter::FaultsMapped);
        return;
    }
    hypervisor.counters.count(Counter::FaultsRefused);
    report(hypervisor, abort, syndrome.far, ipa);
    let features = &hypervisor.features;
    let from = regs::interrupted(features.pan, features.mte);
    regs::inject(&inject::external_abort(&from, abort, syndrome.esr));
}

/// Says what the host was refused, and whose it is: the first ones on every console, for no host may fill it.
fn report(hypervisor: &Hypervisor, abort: &Abort, far: u64, ipa: u64) {
    const SAID: u64 = 16;
    let level = match hypervisor.counters.get(Counter::FaultsRefused) {
        ..=SAID => log::Level::Warn,
        _ => log::Level::Debug,
    };
    let (at, _) = regs::return_state();
    let (access, kind) = (abort.access.name(), abort.kind.name());
    // HPFAR_EL2 is not valid behind these (Arm ARM D24.2.61).
    let unknown = matches!(abort.kind, FaultKind::Permission | FaultKind::Other(_));
    let owner = hypervisor.ownership.pages().owner(ipa);
    let owner: &dyn fmt::Display = match &owner {
        _ if unknown && !abort.on_s1_walk => &"an address that the core does not tell",
        Some(owner) => owner,
        None => &"nobody's RAM",
    };
    console::log(
        level,
        format_args!(
            "host: {access} refused ({kind}) at VA {far:#x}, IPA {ipa:#x}: {owner}; PC {at:#x}"
        ),
    );
}

/// Makes an access to a redistributor in the host's place, if it is one: the pages are not mapped, so
/// that the interrupt controller can't be told of tables (`el2::redistributor`).
fn redistributor(
    hypervisor: &Hypervisor,
    regs: &mut Regs,
    abort: &Abort,
    esr: u64,
    ipa: u64,
) -> bool {
    if abort.kind != FaultKind::Translation || abort.access == Access::Fetch {
        return false;
    }
    let Decoded::Access(access) = mmio::decode(esr) else {
        return false;
    };
    let rt = usize::from(access.rt());
    let write = match access {
        // Register 31 is the zero register.
        MmioAccess::Write { .. } => Some(access.stored(regs.x.get(rt).copied().unwrap_or(0))),
        MmioAccess::Read { .. } => None,
    };
    let made = access.is_aligned(ipa).then(|| {
        let gic = &hypervisor.gic;
        gic.host_access(ipa, access.size(), write)
    });
    let Some(value) = made.flatten() else {
        return false;
    };
    if let (MmioAccess::Read { .. }, Some(register)) = (access, regs.x.get_mut(rt)) {
        *register = access.loaded(value);
    }
    regs::skip_instruction();
    true
}
