//! Runs Linux in a VM: kernel, initial file system and command line come from the payload.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;

use memslot::policy::EptPolicy;
use memslot::slot::{SlotFlags, SlotKind};
use vmx::linux::{self, Boot, COMMAND_LINE_MOST, Kernel, places};
use vmx::payload::Payload;
use vmx::pc::{Console, Pc};
use vmx::start::Start;
use vmx::vm::VmSettings;

use crate::arch::power::Status;
use crate::arch::serial::{self, say};
use crate::arch::{self, Cpu};
use crate::guest::{GuestCpu, GuestVm, Stop};

/// RAM of the guest in bytes.
const RAM: u64 = 128 << 20;
/// Longest run, in microseconds of the guest's time: a bound for a guest that hangs.
const LONGEST: u64 = 3600 * 1_000_000;

/// The guest's serial line is the machine's.
struct Line;

impl Console for Line {
    fn send(&mut self, byte: u8) {
        serial::send(&[byte]);
    }

    fn receive(&mut self) -> Option<u8> {
        serial::receive()
    }
}

/// Boots it and runs it to its end.
pub(crate) fn run(cpu: &Cpu, files: &Payload<'_>) -> Status {
    let stop = match boot(cpu, files) {
        Ok((mut guest, vm)) => {
            say!("ravelin: starting Linux with {} MiB", RAM >> 20);
            let mut pc = Pc::new(Line, arch::time::hz() as u32);
            let stop = guest.run(&mut pc, LONGEST);
            report(&vm, &stop);
            stop
        }
        Err(why) => {
            say!("ravelin: cannot start Linux: {why}");
            return Status::Failure;
        }
    };
    match stop {
        Stop::Halted | Stop::Reset => Status::Success,
        _ => Status::Failure,
    }
}

fn report(vm: &GuestVm, stop: &Stop) {
    say!("\nravelin: the guest stopped: {stop:?}");
    for (name, count) in vm.vm.exits.iter() {
        say!("ravelin: exits: {count:>9} {name}");
    }
    let whole = stage2::IpaRange::new(stage2::Ipa::new(0), RAM);
    if let Ok(whole) = whole {
        vm.vm
            .memory
            .with_table(|table| serial::print(format_args!("{}", table.dump(whole))));
    }
}

/// A VM with the kernel in its memory and a vCPU at its entry.
fn boot<'a>(cpu: &'a Cpu, files: &Payload<'_>) -> Result<(GuestCpu<'a>, Arc<GuestVm>), String> {
    let settings = VmSettings {
        policy: EptPolicy::TODAY,
        mtrrs: true,
        apic: false,
        physical_bits: cpu.capabilities.ept.output_bits,
        tsc_hz: arch::time::hz() as u32,
        locked_limit: 0,
    };
    let vm = GuestVm::new(&cpu.capabilities, settings).map_err(|e| format!("{e:?}"))?;
    vm.add_memory(0, 0, RAM, SlotFlags::empty(), SlotKind::Ram)
        .map_err(|e| format!("{e:?}"))?;
    let entry = load(&vm, files)?;
    let mut guest = GuestCpu::new(cpu, &vm, 0, 0);
    guest.start(Start::LongMode {
        rip: entry,
        cr3: places::PML4,
        rsp: places::STACK,
        gdt: places::GDT,
    });
    guest.vcpu.registers.rsi = places::PARAMETERS;
    Ok((guest, vm))
}

/// Puts everything into the guest's memory; the address of the first instruction.
fn load(vm: &GuestVm, files: &Payload<'_>) -> Result<u64, String> {
    let kernel = files.file("kernel").ok_or("the payload has no kernel")?;
    let kernel = Kernel::parse(kernel).map_err(|e| format!("{e}"))?;
    for segment in kernel.segments() {
        let segment = segment.map_err(|e| format!("{e}"))?;
        put(vm, segment.at, segment.bytes)?;
    }
    let ramdisk = files.file("initrd").unwrap_or_default();
    let ramdisk_at = (RAM - ramdisk.len() as u64) & !0xfff;
    put(vm, ramdisk_at, ramdisk)?;
    let line = files.file("command-line").unwrap_or_default();
    if line.len() > COMMAND_LINE_MOST {
        return Err("the command line is too long".into());
    }
    put(vm, places::COMMAND_LINE, line)?;
    let boot = Boot {
        ram: RAM,
        ramdisk: (ramdisk_at as u32, ramdisk.len() as u32),
    };
    put(vm, places::PARAMETERS, &linux::parameters(&boot))?;
    let words = |at: u64, words: &[u64]| {
        let mut all = (0..).zip(words);
        all.try_for_each(|(n, word)| put(vm, at + 8 * n, &word.to_le_bytes()))
    };
    words(
        places::GDT,
        &[0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff],
    )?;
    words(places::PML4, &[places::PDPT | 7])?;
    words(places::PDPT, &[places::DIRECTORY | 7])?;
    for n in 0..512 {
        words(places::DIRECTORY + 8 * n, &[n << 21 | 0x87])?;
    }
    Ok(kernel.entry)
}

fn put(vm: &GuestVm, at: u64, bytes: &[u8]) -> Result<(), String> {
    if vm.write(at, bytes) {
        Ok(())
    } else {
        Err(format!("{} bytes do not fit at {at:#x}", bytes.len()))
    }
}
