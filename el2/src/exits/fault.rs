//! Aborts: memory that is to be mapped, devices of the host, and what the guest may not touch.

use abi::{ErrorCode, Exit, VmCounter};
use memslot::addr::Gfn;
use memslot::error::Error;
use memslot::fault::{
    Access as MemoryAccess, FaultKind as MemoryFaultKind, FaultOutcome, Stage2Fault,
};
use memslot::slot::SlotKind;
use stage2::Ipa;

use super::gic::{Frame, in_gic};
use super::{Loaded, Next, Oddity, PendingLoad, external_abort};
use crate::esr::{self, Abort, Access, FaultKind};
use crate::guest::mmio::{self, Decoded, MmioAccess};
use crate::vm_error::Refusal;

/// A data abort: an access to the virtual GIC, or another fault.
#[inline]
pub(super) fn data_abort(run: &mut impl Loaded, esr: u64) -> Next {
    let (far, hpfar) = run.fault_addresses();
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
pub(super) fn fault(run: &mut impl Loaded, esr: u64) -> Next {
    let abort = esr::abort(esr);
    let Some(ipa) = address(run, &abort) else {
        // Stage 1 has changed meanwhile: the access will fault again if it must.
        return Next::Resume;
    };
    if Frame::of(run, ipa).is_some() {
        // What can be emulated does not come here.
        return external_abort(run, &abort, esr);
    }
    resolve(run, ipa, esr)
}

/// The address that faulted. HPFAR_EL2 does not hold it for a permission fault outside a table
/// walk (Arm ARM D24.2.61): then stage 1 is asked.
fn address(run: &mut impl Loaded, abort: &Abort) -> Option<u64> {
    let (far, hpfar) = run.fault_addresses();
    if abort.kind == FaultKind::Permission && !abort.on_s1_walk {
        let page = run.translate_stage1(far)?;
        return Some(page | far & 0xfff);
    }
    Some(esr::fault_ipa(abort, hpfar, far))
}

/// A fault at an address where there is memory, or a device of the host's.
#[inline(never)]
fn resolve(run: &mut impl Loaded, ipa: u64, esr: u64) -> Next {
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
            Access::Read => MemoryAccess::Read,
            Access::Write => MemoryAccess::Write,
            Access::Fetch => MemoryAccess::Fetch,
        },
        kind,
    };
    match run.memory().handle_fault(&request, &()) {
        Ok(FaultOutcome::Resolved) => {
            run.count(VmCounter::Faults);
            Next::Resume
        }
        Ok(FaultOutcome::Retry) => Next::Resume,
        Ok(FaultOutcome::Mmio) => device(run, ipa, abort, esr),
        Ok(FaultOutcome::Abort) => external_abort(run, abort, esr),
        Ok(FaultOutcome::NoFrame(_)) if run.is_poisoned(ipa) => external_abort(run, abort, esr),
        Ok(FaultOutcome::NoFrame(gfn)) => run.leave(Exit::MemoryMissing {
            ipa: gfn.start().get(),
        }),
        Err(error) => refused(run, error, esr),
    }
}

fn is_device(run: &impl Loaded, ipa: u64) -> bool {
    let slot = Gfn::try_new(ipa >> 12).and_then(|gfn| run.memory().find_slot(gfn));
    slot.is_some_and(|(slot, _)| slot.kind == SlotKind::Mmio)
}

#[cold]
pub(super) fn refused(run: &mut impl Loaded, error: Error, esr: u64) -> Next {
    let refusal = Refusal::from(error);
    let exit = match refusal.code {
        ErrorCode::NoMemory => Exit::NeedPages {
            pages: refusal.pages,
        },
        ErrorCode::Again | ErrorCode::Busy => Exit::Interrupted,
        code => {
            run.report(Oddity::Fault(code));
            // A protected guest's syndrome is not the host's to see.
            let shown = run.protection().is_none();
            Exit::Broken {
                esr: if shown { esr } else { 0 },
            }
        }
    };
    run.leave(exit)
}

const fn memory_kind(kind: FaultKind) -> Option<MemoryFaultKind> {
    match kind {
        FaultKind::Translation => Some(MemoryFaultKind::Translation),
        FaultKind::Permission => Some(MemoryFaultKind::Permission),
        FaultKind::AccessFlag => Some(MemoryFaultKind::AccessFlag),
        FaultKind::AddressSize | FaultKind::Other(_) => None,
    }
}

/// An access to a device: EL2 decodes it, the host emulates it.
fn device(run: &mut impl Loaded, ipa: u64, abort: &Abort, esr: u64) -> Next {
    let guard = run.protection().map(|p| &p.guard);
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
            run.skip_instruction();
            return Next::Resume;
        }
        Decoded::ExternalAbort => return external_abort(run, abort, esr),
    };
    run.count(VmCounter::MmioInHost);
    let size = access.size();
    if let MmioAccess::Write { rt, .. } = access {
        let value = access.stored(run.registers().get(rt));
        run.skip_instruction();
        return run.leave(Exit::MmioWrite { ipa, size, value });
    }
    run.keep_load(PendingLoad { esr });
    run.leave(Exit::MmioRead { ipa, size })
}

/// The access behind an abort: what has no syndrome, or crosses registers, reaches none.
#[inline]
pub(super) fn decoded(ipa: u64, esr: u64) -> Decoded {
    match mmio::decode(esr) {
        Decoded::Access(access) if !access.is_aligned(ipa) => Decoded::ExternalAbort,
        other => other,
    }
}
