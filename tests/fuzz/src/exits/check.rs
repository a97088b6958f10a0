//! Whether an exit did what it must, and nothing else.

use abi::Exit;
use el2::exits::Next;
use el2::exits::testing::{Did, FakeVcpu, RAM, RAM_PAGES, READ_ONLY, READ_ONLY_PAGES};

use super::PAGE;
use super::oracle::{Before, Fate, loaded};

/// An exit that was not only decided, but done.
pub(super) fn check(before: &Before, vcpu: &FakeVcpu<'_, '_>, next: Next, fate: &Fate) {
    let did = before.did(vcpu);
    let context = format!(
        "{fate:?} of {:#x} at {:#x}: {next:?}, {did:?}",
        before.esr, before.hpfar
    );
    let at = (vcpu.pc, vcpu.pstate);
    let again = (before.pc, before.pstate);
    assert_eq!(next == Next::Leave, vcpu.exit.is_some(), "{context}");
    match *fate {
        Fate::Load { ipa, size, .. } => {
            let exit = Exit::MmioRead { ipa, size };
            assert_eq!((vcpu.exit, at), (Some(exit), again), "{context}");
            assert!(vcpu.load.is_some(), "{context}");
        }
        Fate::Store { ipa, size, value } => {
            let exit = Exit::MmioWrite { ipa, size, value };
            assert_eq!((vcpu.exit, at), (Some(exit), before.behind()), "{context}");
        }
        Fate::Missing { ipa } => {
            let exit = Exit::MemoryMissing { ipa };
            assert_eq!((vcpu.exit, at), (Some(exit), again), "{context}");
        }
        Fate::MayLackTables { ipa, write } => {
            let asked = matches!(vcpu.exit, Some(Exit::NeedPages { pages: 1.. }));
            let mapped = vcpu.exit.is_none() && vcpu.vm.reaches(ipa, write);
            assert!((asked || mapped) && at == again, "{context}");
        }
        Fate::Mapped { ipa, write } => {
            assert_eq!((vcpu.exit, at), (None, again), "{context}");
            assert!(vcpu.vm.reaches(ipa, write), "{context}");
        }
        Fate::Again => assert_eq!((vcpu.exit, at), (None, again), "{context}"),
        Fate::Behind | Fate::Answered { .. } => {
            assert_eq!((vcpu.exit, at), (None, before.behind()), "{context}");
        }
        Fate::Aborted | Fate::Undefined => check_injected(before, vcpu, *fate, &context),
    }
    if !matches!(fate, Fate::Load { .. }) {
        assert!(vcpu.load.is_none(), "{context}");
    }
    check_registers(before, vcpu, fate, &context);
    check_did(vcpu, &did, fate, &context);
}

/// Only the register of a load that EL2 answers changes, by no more than its width.
fn check_registers(before: &Before, vcpu: &FakeVcpu<'_, '_>, fate: &Fate, context: &str) {
    let mut expected = before.registers;
    if let Fate::Answered { rt: rt @ ..31 } = *fate {
        let value = vcpu.registers.0[usize::from(rt)];
        let size = 1 << (before.esr >> 22 & 3);
        assert_eq!(value, loaded(before, size, value), "{context}");
        expected.0[usize::from(rt)] = value;
    }
    assert_eq!(vcpu.registers, expected, "{context}");
}

/// Steps and injections come once, and only where they must; no vCPU kicks itself.
fn check_did(vcpu: &FakeVcpu<'_, '_>, did: &[Did], fate: &Fate, context: &str) {
    let count = |which: fn(&Did) -> bool| did.iter().filter(|did| which(did)).count();
    let skips = matches!(
        fate,
        Fate::Behind | Fate::Answered { .. } | Fate::Store { .. }
    );
    let injected = matches!(fate, Fate::Aborted | Fate::Undefined);
    assert_eq!(count(|did| *did == Did::Skip), skips.into(), "{context}");
    let injections = count(|did| matches!(did, Did::Inject(_)));
    assert_eq!(injections, injected.into(), "{context}");
    assert!(!did.contains(&Did::Kick(0)), "{context}");
    let others = 1..usize::from(vcpu.vm.shape.vcpus);
    assert!(kicked(did).all(|vcpu| others.contains(&vcpu)), "{context}");
}

fn kicked(did: &[Did]) -> impl Iterator<Item = usize> {
    did.iter().filter_map(|did| match did {
        Did::Kick(vcpu) => Some(*vcpu),
        _ => None,
    })
}

/// The guest's handler begins, and knows where the guest was.
fn check_injected(before: &Before, vcpu: &FakeVcpu<'_, '_>, fate: Fate, context: &str) {
    let offset = match before.pstate & 0x1f {
        0x04 => 0x000,
        0x05 => 0x200,
        0x00 => 0x400,
        _ => 0x600,
    };
    assert_eq!(vcpu.exit, None, "{context}");
    assert_eq!(vcpu.pc, before.el1.vbar + offset, "{context}");
    // EL1 with its own stack pointer; D, A, I and F masked.
    assert_eq!(vcpu.pstate & 0x3df, 0x3c5, "{context}");
    let from = (vcpu.el1.elr, vcpu.el1.spsr);
    assert_eq!(from, (before.pc, before.pstate), "{context}");
    let from_el1 = offset < 0x400;
    let (class, status, far) = match fate {
        Fate::Undefined => (0, 0, before.el1.far),
        _ => {
            let fetch = before.esr >> 26 & 0x3f == 0x20;
            let class = if fetch { 0x20 } else { 0x24 } + u64::from(from_el1);
            let on_walk = before.bit(7);
            (class, if on_walk { 0x14 } else { 0x10 }, before.far)
        }
    };
    let told = (vcpu.el1.esr >> 26, vcpu.el1.esr & 0x3f, vcpu.el1.far);
    assert_eq!(told, (class, status, far), "{context}");
}

/// The host has completed a load.
pub(super) fn completed(before: &Before, vcpu: &FakeVcpu<'_, '_>, rt: u8, value: u64) {
    let mut expected = before.registers;
    if rt < 31 {
        expected.0[usize::from(rt)] = value;
    }
    assert_eq!(vcpu.registers, expected, "load of {:#x}", before.esr);
    assert_eq!((vcpu.pc, vcpu.pstate), before.behind());
    assert!(vcpu.load.is_none());
}

/// A system register is undefined, or stepped over; a read changes its register only, a write none.
pub(super) fn register(before: &Before, vcpu: &FakeVcpu<'_, '_>, next: Next) {
    let (did, mut expected) = (before.did(vcpu), before.registers);
    let context = format!("{:#x}: {next:?}, {did:?}", before.esr);
    if did.iter().any(|did| matches!(did, Did::Inject(_))) {
        return check(before, vcpu, next, &Fate::Undefined);
    }
    assert_eq!((vcpu.pc, vcpu.pstate), before.behind(), "{context}");
    if before.bit(0) {
        let rt = before.number(5);
        expected.set(rt, vcpu.registers.get(rt));
    }
    assert_eq!(vcpu.registers, expected, "{context}");
    // It leaves with a flush to do, or not at all.
    let left = vcpu.exit.map(|exit| (exit, vcpu.caches.owed.is_owed()));
    assert!(
        matches!(left, None | Some((Exit::Interrupted, true))),
        "{context}"
    );
    assert_eq!(next == Next::Leave, left.is_some(), "{context}");
    check_did(vcpu, &did, &Fate::Behind, &context);
}

/// A call's answer is in x0 to x3; the host learns no register but what a call is there to tell it.
pub(super) fn call(before: &Before, vcpu: &FakeVcpu<'_, '_>, next: Next) {
    let did = before.did(vcpu);
    let context = format!(
        "{:x?}: {next:?}, {did:?}, {:?}",
        &before.registers.0[..4],
        vcpu.exit
    );
    assert_eq!(next == Next::Leave, vcpu.exit.is_some(), "{context}");
    let at = (vcpu.pc, vcpu.pstate);
    let behind = (before.pc, before.pstate);
    if did.iter().any(|did| matches!(did, Did::Restart(_))) {
        let waits = matches!(
            vcpu.exit,
            None | Some(Exit::WaitForInterrupt { .. } | Exit::Interrupted)
        );
        assert!(waits && starts_in_memory(before, vcpu), "{context}");
        return;
    }
    assert_eq!(vcpu.registers.0[4..], before.registers.0[4..], "{context}");
    match vcpu.exit {
        Some(Exit::MemoryMissing { ipa }) => {
            assert!(vcpu.vm.shape.protected, "{context}");
            let in_ram = (RAM..RAM + RAM_PAGES * PAGE).contains(&ipa);
            assert!(in_ram && ipa == before.registers.0[1], "{context}");
        }
        Some(Exit::NeedPages { .. } | Exit::NeedHeap { .. }) => {
            assert!(vcpu.vm.shape.protected, "{context}");
        }
        Some(Exit::VcpuOn { index }) => {
            assert!(index < vcpu.vm.shape.vcpus && at == behind, "{context}");
            assert!(starts_in_memory(before, vcpu), "{context}");
            return;
        }
        None
        | Some(
            Exit::VcpuOff
            | Exit::SystemOff
            | Exit::SystemReset { .. }
            | Exit::WaitForInterrupt { .. }
            | Exit::Interrupted,
        ) => {
            assert_eq!(at, behind, "{context}");
            return;
        }
        _ => panic!("{context}"),
    }
    // The call is made again, with the same arguments.
    let repeated = (before.pc.wrapping_sub(4), before.pstate);
    assert_eq!(
        (at, vcpu.registers),
        (repeated, before.registers),
        "{context}"
    );
    assert_eq!(did, [Did::Repeat], "{context}");
}

/// Whether the entry point of a PSCI call, its third argument, is in a slot of memory, not in a device's.
fn starts_in_memory(before: &Before, vcpu: &FakeVcpu<'_, '_>) -> bool {
    let [id, _, entry, ..] = before.registers.0;
    // Without SMCCC's bit 30 only the lower halves count.
    let entry = if id & 1 << 30 == 0 {
        entry & 0xffff_ffff
    } else {
        entry
    };
    let within = |(start, pages): (u64, u64)| (start..start + pages * PAGE).contains(&entry);
    let read_only = !vcpu.vm.shape.protected && within((READ_ONLY, READ_ONLY_PAGES));
    within((RAM, RAM_PAGES)) || read_only
}

/// A wait steps over its instruction, and shows the host when a timer ends it.
pub(super) fn wait(before: &Before, vcpu: &FakeVcpu<'_, '_>, next: Next) {
    let context = format!("{next:?}, {:?}", vcpu.exit);
    assert_eq!((vcpu.pc, vcpu.pstate), before.behind(), "{context}");
    assert_eq!(vcpu.registers, before.registers, "{context}");
    assert_eq!(next == Next::Leave, vcpu.exit.is_some(), "{context}");
    let physical = vcpu.timer.deadline().unwrap_or(u64::MAX);
    let until = vcpu.virtual_deadline.min(physical);
    let waited = before.did(vcpu).contains(&Did::Wait);
    match vcpu.exit {
        Some(Exit::WaitForInterrupt { until: told }) => assert!(told == until && !waited),
        Some(Exit::Interrupted) => assert!(waited, "{context}"),
        None => assert_eq!(next, Next::Refresh, "{context}"),
        _ => panic!("{context}"),
    }
}

/// Nothing of the guest changes, and the host learns nothing but that it is interrupted.
pub(super) fn asynchronous(before: &Before, vcpu: &FakeVcpu<'_, '_>, next: Next, kind: u64) {
    const SERROR: u64 = 3;
    let at = (vcpu.pc, vcpu.pstate, vcpu.registers);
    assert_eq!(at, (before.pc, before.pstate, before.registers));
    assert!(matches!(vcpu.exit, None | Some(Exit::Interrupted)));
    assert_eq!(next == Next::Leave, vcpu.exit.is_some());
    let did = before.did(vcpu);
    let allowed = |did: &Did| matches!(did, Did::KickHost | Did::SError | Did::Report(_));
    assert!(did.iter().all(allowed), "{did:?}");
    if kind == SERROR {
        assert!(next == Next::Resume && did.contains(&Did::SError));
        return;
    }
    let lines = before.lines;
    let timer = lines.virtual_timer && !lines.timer_active || vcpu.timer.asserted(vcpu.now);
    let guests = timer || lines.maintenance;
    let for_host = !guests && lines.kick && lines.host_kick;
    let refreshed = guests || lines.kick && !lines.host_kick;
    assert_eq!(next == Next::Refresh, refreshed, "{lines:?}");
    assert_eq!(did.contains(&Did::KickHost), for_host, "{lines:?}");
}
