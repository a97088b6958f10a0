//! One scenario for each kind of exit.

use alloc::vec::Vec;

use memslot::fault::{Access, FaultKind};
use memslot::policy::EptPolicy;
use memslot::slot::{SlotFlags, SlotKind};
use stage2::Ipa;
use vmx::exit::Width;
use vmx::field::{Field, Vmcs as _};
use vmx::handle::End;
use vmx::ports::Ports;
use vmx::start::Start;

use super::Scenario;
use super::kit::{Answer, Check, Driven, MIB, Op, ensure, refused, settings};
use crate::arch::{Cpu, guests};
use crate::guest::{GuestCpu, GuestVm, Stop};

pub(super) const ALL: &[Scenario] = &[
    ("exits/real-mode-from-reset", real_mode),
    ("exits/cpuid", cpuid),
    ("exits/ports", ports),
    ("exits/string-ports", string_ports),
    ("exits/model-specific-registers", msrs),
    ("exits/control-registers", control_registers),
    ("exits/machine-status-word", machine_status_word),
    ("exits/undefined-instruction", undefined),
    ("exits/cache-flush", cache_flush),
    ("exits/halt", halt),
    ("exits/preemption-timer", timer),
    ("exits/local-apic-timer", apic_timer),
    ("exits/triple-fault", triple_fault),
    ("exits/bad-guest-state", bad_state),
    ("exits/no-device", no_device),
    ("exits/ept-misconfiguration", misconfiguration),
];

const TODAY: EptPolicy = EptPolicy::TODAY;

/// Ports that remember what was written and answer with its complement.
#[derive(Default)]
struct Echo(Vec<(u16, u32)>);

impl Ports for Echo {
    fn output(&mut self, port: u16, _width: Width, value: u32, _now: u64) {
        self.0.push((port, value));
    }

    fn input(&mut self, _port: u16, _width: Width, _now: u64) -> u32 {
        !self.0.last().map_or(0, |(_, value)| *value)
    }
}

/// From the reset vector in a read-only slot through every exit that real mode can cause.
fn real_mode(cpu: &Cpu) -> Check {
    let vm = GuestVm::new(&cpu.capabilities, settings(cpu, TODAY)).map_err(refused)?;
    let none = SlotFlags::empty();
    vm.add_memory(0, 0, MIB, none, SlotKind::Ram)
        .map_err(refused)?;
    vm.add_memory(1, 0xffff_f000, 4096, SlotFlags::READONLY, SlotKind::Ram)
        .map_err(refused)?;
    ensure!(
        vm.write(0xffff_f000, guests::rom()) && vm.write(0x1000, guests::real()),
        "no room for the guest"
    );
    let mut guest = GuestCpu::new(cpu, &vm, 0, 0);
    guest.start(Start::Reset);
    ensure!(guest.vcpu.types.cd, "CD is set after reset");
    let mut echo = Echo::default();
    for step in [1, 2, 3, 5] {
        let stop = guest.run(&mut echo, 10_000);
        let ax = guest.vcpu.registers.rax & 0xffff;
        ensure!(
            stop == Stop::Hypercall && ax == step,
            "step {step}: {stop:?}, AX {ax:#x}"
        );
    }
    let words = vm.word(0x500).unwrap_or(0).to_le_bytes();
    ensure!(words[..4] == *b"Rave", "CPUID signature {words:?}");
    ensure!(words[4] == !0x5a, "port answer {:#x}", words[4]);
    ensure!(echo.0 == [(0x10, 0x5a)], "port writes {:?}", echo.0);
    let seen = guest.vcpu.registers.rbx;
    ensure!(
        seen & 0xe000_0000 == 0 && !guest.vcpu.types.cd,
        "CR0 {seen:#x}"
    );
    let stop = guest.run(&mut echo, 10_000);
    ensure!(stop == Stop::Halted, "{stop:?} in place of the halt");
    Ok(())
}

fn cpuid(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let before = g.vm.vm.exits.of("cpuid");
    let ecx = g.must(Op::Cpuid, 1, 0)?;
    ensure!(ecx >> 31 & 1 == 1 && ecx >> 5 & 1 == 0, "ECX {ecx:#x}");
    ensure!(g.vm.vm.exits.of("cpuid") == before + 1, "no exit counted");
    Ok(())
}

fn ports(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let mut echo = Echo::default();
    g.order(Op::Out, 0x99, 0x3c);
    ensure!(g.wait(&mut echo) == Answer::Done(0x99), "OUT");
    ensure!(echo.0 == [(0x99, 0x3c)], "{:?}", echo.0);
    g.order(Op::In, 0x98, 0);
    let answer = g.wait(&mut echo);
    ensure!(answer == Answer::Done(0xc3), "IN: {answer:?}");
    Ok(())
}

/// Not emulated: the vCPU ends, and its end names the port.
fn string_ports(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let answer = g.does(Op::Outs, 0x99, 0);
    let want = Stop::End(End::StringIo(0x99));
    ensure!(answer == Answer::Stopped(want), "{answer:?}");
    ensure!(g.vm.vm.exits.of("string i/o") == 1, "no exit counted");
    Ok(())
}

fn msrs(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let efer = g.must(Op::ReadMsr, 0, 0xc000_0080)?;
    ensure!(efer == 0x500, "EFER {efer:#x}");
    let unknown = g.does(Op::ReadMsr, 0, 0x480);
    ensure!(unknown == Answer::Raised(13), "VMX register: {unknown:?}");
    // Every register that a guest keeps for itself: no exit, and a value of its own.
    let exits = g.vm.vm.exits.of("wrmsr");
    g.wrmsr(0xc000_0082, 0x1234_5678)?;
    ensure!(g.vm.vm.exits.of("wrmsr") == exits, "LSTAR exits");
    let mut other = Driven::in_vm(cpu, super::kit::driven_vm(cpu, TODAY)?, 1)?;
    let foreign = other.must(Op::ReadMsr, 0, 0xc000_0082)?;
    ensure!(foreign == 0, "another VM's LSTAR {foreign:#x}");
    let own = g.must(Op::ReadMsr, 0, 0xc000_0082)?;
    ensure!(own == 0x1234_5678, "LSTAR {own:#x}");
    g.must(Op::Debug, 0x4000, 0)?;
    let foreign = other.must(Op::Debug, 0x5000, 0)?;
    ensure!(foreign == 0, "another VM's DR0 {foreign:#x}");
    let own = g.must(Op::Debug, 0, 0)?;
    ensure!(own == 0x4000, "DR0 {own:#x}");
    Ok(())
}

fn control_registers(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let cr0 = g.must(Op::Cr0, 0xe001_0033, 0)?;
    ensure!(cr0 == 0xe001_0033, "CR0 with CD and NW {cr0:#x}");
    let hardware = g.cpu.vcpu.vmcs.read(Field::CR0);
    ensure!(hardware & 0x6000_0000 == 0, "CD reaches the hardware");
    ensure!(g.cpu.vcpu.types.cd, "CD is not seen");
    let bad = g.does(Op::Cr0, 0xa001_0033, 0);
    ensure!(bad == Answer::Raised(13), "NW without CD: {bad:?}");
    let bad = g.does(Op::Cr4, 0x2020, 0);
    ensure!(bad == Answer::Raised(13), "CR4.VMXE: {bad:?}");
    ensure!(g.must(Op::Cr4, 0x6a0, 0)? == 0x6a0, "CR4");
    ensure!(g.must(Op::Cr8, 9, 0)? == 9, "CR8");
    let bad = g.does(Op::Cr8, 16, 0);
    ensure!(bad == Answer::Raised(13), "CR8 = 16: {bad:?}");
    Ok(())
}

/// LMSW and CLTS: two more ways to CR0, which change bits 3:0 and nothing else. LMSW sets PE, and cannot clear it.
fn machine_status_word(cpu: &Cpu) -> Check {
    const TS: u64 = 1 << 3;
    let mut g = Driven::new(cpu, TODAY)?;
    let before = g.must(Op::Cr0, 0x8001_0033, 0)?;
    let set = g.must(Op::Lmsw, 0xffff, 0)?;
    ensure!(set == before | 0xf, "LMSW of all ones: {set:#x}");
    let cleared = g.must(Op::Clts, 0, 0)?;
    ensure!(cleared == set & !TS, "CLTS: {cleared:#x}");
    let least = g.must(Op::Lmsw, 0, 0)?;
    ensure!(least == before & !0xe, "LMSW of zeros: {least:#x}");
    Ok(())
}

fn undefined(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let answer = g.does(Op::Vmxoff, 0, 0);
    ensure!(answer == Answer::Raised(6), "{answer:?}");
    Ok(())
}

fn cache_flush(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.must(Op::Wbinvd, 0, 0).map(drop)
}

fn halt(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let answer = g.does(Op::Halt, 0, 0);
    ensure!(answer == Answer::Stopped(Stop::Halted), "{answer:?}");
    Ok(())
}

/// A guest that does nothing but spin, with interrupts off, gives the CPU back in time.
fn timer(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.order(Op::Spin, 0, 0);
    let stop = g.cpu.run(&mut vmx::ports::NoPorts, 30_000);
    ensure!(stop == Stop::Deadline, "{stop:?}");
    let exits = g.vm.vm.exits.of("timer");
    ensure!((3..=5).contains(&exits), "{exits} exits in 30 ms");
    Ok(())
}

fn apic_timer(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.wrmsr(0x80f, 0x1ff)?;
    g.wrmsr(0x83e, 0xb)?;
    g.wrmsr(0x832, 1 << 17 | 0x50)?;
    g.wrmsr(0x838, 20_000)?;
    let count = g.must(Op::Wait, 3, 0)?;
    ensure!(count == 3 && g.interrupts() == 3, "{count} interrupts");
    Ok(())
}

fn triple_fault(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let answer = g.does(Op::TripleFault, 0, 0);
    let want = Stop::End(End::TripleFault);
    ensure!(answer == Answer::Stopped(want), "{answer:?}");
    Ok(())
}

fn bad_state(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    // Bit 1 of RFLAGS is always 1 (SDM vol. 3C 27.3.1.4).
    g.cpu.vcpu.vmcs.write(Field::RFLAGS, 0);
    let answer = g.does(Op::Nothing, 0, 0);
    let why = "entry refused: invalid guest state";
    let want = Stop::End(End::EntryFailed(why));
    ensure!(answer == Answer::Stopped(want), "{answer:?}");
    Ok(())
}

fn no_device(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    let answer = g.does(Op::Store, 0x1000_0008, 1);
    let Answer::Stopped(Stop::End(End::NoDevice(fault))) = answer else {
        return Err(alloc::format!("{answer:?}"));
    };
    let want = (Ipa::new(0x1000_0008), Access::Write, FaultKind::Translation);
    let got = (fault.ipa, fault.access, fault.kind);
    ensure!(got == want, "{got:?}");
    Ok(())
}

/// The hypervisor never makes such an entry; here one is made behind its back.
fn misconfiguration(cpu: &Cpu) -> Check {
    let mut g = Driven::new(cpu, TODAY)?;
    g.add(1, 16 * MIB, 4096, SlotFlags::empty(), SlotKind::Ram)?;
    g.must(Op::Load, 16 * MIB, 0)?;
    g.vm.spoil_entry(16 * MIB);
    let answer = g.does(Op::Load, 16 * MIB, 0);
    let want = Stop::End(End::Misconfigured(Ipa::new(16 * MIB)));
    ensure!(answer == Answer::Stopped(want), "{answer:?}");
    Ok(())
}
