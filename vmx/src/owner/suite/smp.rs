//! Several CPUs: start-up messages, shoot-down, VMs beside each other, faults in parallel.

use alloc::format;
use alloc::sync::Arc;

use memslot::error::Error;
use memslot::lock::LockRequest;
use memslot::policy::EptPolicy;
use memslot::slot::{LockFlags, SlotFlags, SlotId, SlotKind};
use spin::Mutex;
use vmx::handle::End;
use vmx::ports::NoPorts;

use super::Scenario;
use super::kit::{Answer, Check, Driven, MIB, Op, driven_vm, ensure, refused};
use crate::arch::serial::say;
use crate::arch::{self, Cpu, guests, smp};
use crate::guest::{GuestCpu, GuestVm, Stop};

/// Need two CPUs.
pub(super) const ALL: &[Scenario] = &[
    ("smp/init-and-start-up", start_up),
    ("smp/shootdown-with-interrupts-off", |cpu| shootdown(cpu, 0)),
    ("smp/shootdown", |cpu| shootdown(cpu, 1)),
    ("smp/lock-needs-vcpus-out", lock_with_vcpu_inside),
    ("smp/faults-in-parallel", parallel_faults),
    ("smp/two-vms", two_vms),
];

const TODAY: EptPolicy = EptPolicy::TODAY;
const AT: u64 = 16 * MIB;
const OTHER_CODE: u64 = 0x9000;
/// Longest that another CPU may take, in microseconds.
const PATIENCE: u64 = 500_000;

/// What the other CPU's vCPU has come to.
type Outcome = Arc<Mutex<Option<Answer>>>;

/// Starts a driven guest on CPU 1 and gives it one order.
fn order_on_other_cpu(vm: &Arc<GuestVm>, number: u16, order: (Op, u64, u64)) -> Check<Outcome> {
    let outcome = Outcome::default();
    let (vm, result) = (Arc::clone(vm), Arc::clone(&outcome));
    let started = smp::run_on(1, move |cpu| {
        let answer = match Driven::in_vm(cpu, vm, number) {
            Ok(mut guest) => guest.does(order.0, order.1, order.2),
            Err(_) => Answer::Raised(0),
        };
        *result.lock() = Some(answer);
    });
    ensure!(started, "CPU 1 is busy");
    Ok(outcome)
}

fn finish(outcome: &Outcome) -> Check<Answer> {
    ensure!(smp::wait_for(1, PATIENCE), "CPU 1 does not come back");
    outcome.lock().ok_or_else(|| "no outcome".into())
}

/// Waits until a word of the guest's memory is not what it was.
fn wait_for_change(vm: &GuestVm, at: u64, was: u64) -> Check {
    for _ in 0..PATIENCE {
        if vm.word(at) != Some(was) {
            return Ok(());
        }
        core::hint::spin_loop();
    }
    Err(format!("the word at {at:#x} stays {was}"))
}

/// The boot vCPU starts another one by messages, which then answers interrupts.
fn start_up(cpu: &Cpu) -> Check {
    const STARTED: u64 = 0x710;
    let vm = driven_vm(cpu, TODAY)?;
    ensure!(vm.write(OTHER_CODE, guests::other()), "no room");
    let inner = Arc::clone(&vm);
    let started = smp::run_on(1, move |cpu| {
        let mut other = GuestCpu::new(cpu, &inner, 0, 1);
        if other.wait_for_start(PATIENCE) {
            let _ = other.run(&mut NoPorts, PATIENCE / 10);
        }
    });
    ensure!(started, "CPU 1 is busy");
    let mut g = Driven::in_vm(cpu, vm, 0)?;
    g.wrmsr(0x830, 1 << 32 | 0x4500)?;
    g.wrmsr(0x830, 1 << 32 | 0x4600 | OTHER_CODE >> 12)?;
    wait_for_change(&g.vm, STARTED, 0)?;
    g.wrmsr(0x830, 1 << 32 | 0x51)?;
    wait_for_change(&g.vm, STARTED + 8, 0)?;
    ensure!(smp::wait_for(1, PATIENCE), "CPU 1 does not come back");
    let [cs_low, cs_high, there, _, number, ..] = g.vm.word(STARTED).unwrap_or(0).to_le_bytes();
    let cs = u16::from_le_bytes([cs_low, cs_high]);
    let got = (u64::from(cs), there, number, g.vm.word(STARTED + 8));
    ensure!(got == (OTHER_CODE >> 4, 1, 1, Some(1)), "{got:?}");
    Ok(())
}

/// A vCPU that writes without end through a mapping. When the slot is gone its memory does not
/// change any more, not even once: the CPU was driven out and has forgotten the translation.
fn shootdown(cpu: &Cpu, interrupts: u64) -> Check {
    let vm = driven_vm(cpu, TODAY)?;
    vm.add_memory(1, AT, 4096, SlotFlags::empty(), SlotKind::Ram)
        .map_err(refused)?;
    let outcome = order_on_other_cpu(&vm, 1, (Op::Count, AT, interrupts))?;
    wait_for_change(&vm, AT, 0)?;
    let before = arch::driven_out();
    let start = arch::cpu::timestamp();
    vm.vm.memory.delete_slot(SlotId(1)).map_err(refused)?;
    let ticks = arch::cpu::timestamp() - start;
    // Far less than the slice: the kick came, whatever the guest's interrupt flag says.
    ensure!(ticks < arch::time::hz() / 1000, "{ticks} ticks");
    say!("ravelin: cost: {ticks} removing a leaf under a running vCPU");
    let frozen = vm.word(AT);
    arch::time::wait_microseconds(3_000);
    ensure!(vm.word(AT) == frozen, "written through a stale translation");
    ensure!(arch::driven_out() > before, "nobody was driven out");
    let answer = finish(&outcome)?;
    let gone = matches!(answer, Answer::Stopped(Stop::End(End::NoDevice(_))));
    ensure!(gone, "{answer:?}");
    Ok(())
}

fn lock_with_vcpu_inside(cpu: &Cpu) -> Check {
    let vm = driven_vm(cpu, TODAY)?;
    vm.add_memory(1, AT, 16 * 4096, SlotFlags::empty(), SlotKind::Ram)
        .map_err(refused)?;
    let outcome = order_on_other_cpu(&vm, 1, (Op::Count, AT, 0))?;
    wait_for_change(&vm, AT, 0)?;
    let lock = LockRequest::new(SlotId(1), LockFlags::READ | LockFlags::WRITE);
    // The vCPU is inside nearly all the time, so some attempts meet it there.
    let refused_once = (0..1000).any(|_| {
        let refusal = vm.vm.memory.lock_slot(&lock);
        if refusal.is_ok() {
            let _ = vm.vm.memory.unlock_slot(SlotId(1));
        }
        refusal == Err(Error::VcpuRunning)
    });
    ensure!(refused_once, "a lock was never refused");
    vm.vm.memory.delete_slot(SlotId(1)).map_err(refused)?;
    finish(&outcome).map(drop)
}

/// Two vCPUs of one VM fault in the same pages at the same time; every page ends with one leaf.
fn parallel_faults(cpu: &Cpu) -> Check {
    const PAGES: u64 = 256;
    let vm = driven_vm(cpu, TODAY)?;
    let logged = SlotFlags::DIRTY_LOG;
    vm.add_memory(1, AT, PAGES * 4096, logged, SlotKind::Ram)
        .map_err(refused)?;
    let outcome = order_on_other_cpu(&vm, 1, (Op::Touch, AT, PAGES))?;
    let mut g = Driven::in_vm(cpu, Arc::clone(&vm), 0)?;
    g.must(Op::Touch, AT, PAGES)?;
    let answer = finish(&outcome)?;
    ensure!(matches!(answer, Answer::Done(_)), "{answer:?}");
    for page in 0..PAGES {
        let (entry, level) = vm.ept_entry(AT + page * 4096);
        ensure!(level == 3 && entry & 0x7b == 0x73, "{page}: {entry:#x}");
    }
    let faults = vm.vm.exits.of("memory fault");
    let most = 2 * (PAGES + 16);
    ensure!((PAGES..=most).contains(&faults), "{faults} faults");
    Ok(())
}

/// Two VMs at the same addresses, each with memory of its own.
fn two_vms(cpu: &Cpu) -> Check {
    let (first, second) = (driven_vm(cpu, TODAY)?, driven_vm(cpu, TODAY)?);
    for vm in [&first, &second] {
        vm.add_memory(1, AT, 4096, SlotFlags::empty(), SlotKind::Ram)
            .map_err(refused)?;
    }
    let outcome = order_on_other_cpu(&second, 2, (Op::Store, AT, 2))?;
    let mut g = Driven::in_vm(cpu, Arc::clone(&first), 0)?;
    g.must(Op::Store, AT, 1)?;
    let answer = finish(&outcome)?;
    ensure!(matches!(answer, Answer::Done(_)), "{answer:?}");
    let words = (first.word(AT), second.word(AT));
    ensure!(words == (Some(1), Some(2)), "{words:?}");
    Ok(())
}
