//! A VM that runs the payload which is linked in (`tests/guests/payload`) while the host changes
//! what is around it: the guest reads [`MAILBOX`], and the host does something before it answers.

use abi::{ErrorCode, Exit, VmConfig};
use board::{AddrRange, Gic, PAGE_SIZE, Placement, highest_free};
use spin::Once;
use vmm::platform::{RAM, UART};
use vmm::{image, tree};

use super::kit::{RAM_SLOT, config, end, words};
use crate::arch::{heap, mem, ticks_per_second};
use crate::console::line;
use crate::machine::Machine;
use crate::vm::Vm;

/// IPA of a word at which the guest asks how to go on.
pub(super) const MAILBOX: u64 = 0x0b00_0000;
/// Bytes of the guest's RAM.
pub(super) const RAM_SIZE: u64 = 16 << 20;
const BLOCK: u64 = 2 << 20;
/// Bytes of the heap that the device tree is built in.
const HEAP: u64 = 0x1_0000;

/// Free memory for such VMs, one after the other.
pub(super) struct Memory {
    /// 2 MiB for another slot.
    pub(super) other: AddrRange,
    /// The guest's RAM.
    pub(super) ram: AddrRange,
    /// What is donated to the VM.
    pub(super) state: AddrRange,
    /// What is donated to another VM.
    pub(super) more_state: AddrRange,
    gic_v3: bool,
}

impl Memory {
    /// Finds it, always the same; a part of it is heap. Other scenarios use what is above.
    pub(super) fn find(machine: &Machine) -> Option<Self> {
        static HEAP_GIVEN: Once<()> = Once::new();
        let want = Placement {
            size: 4 * BLOCK + RAM_SIZE,
            align: BLOCK,
            limit: 1 << 40,
        };
        let range = highest_free(&machine.board.memory, &machine.board.reserved, want)?;
        let part = |at: u64, size: u64| AddrRange::with_size(range.start() + at, size);
        let heap = part(0, HEAP)?;
        HEAP_GIVEN.call_once(|| heap::give(heap));
        Some(Self {
            other: part(BLOCK, BLOCK)?,
            ram: part(2 * BLOCK, RAM_SIZE)?,
            state: part(2 * BLOCK + RAM_SIZE, BLOCK)?,
            more_state: part(3 * BLOCK + RAM_SIZE, BLOCK)?,
            gic_v3: matches!(machine.board.gic, Some(Gic::V3 { .. })),
        })
    }
}

/// Instructions that the counter's ticks are where an instruction takes a nanosecond (QEMU's
/// `-icount shift=0`).
pub(super) fn instructions(ticks: u64) -> u64 {
    const SECOND: u64 = 1_000_000_000;
    ticks * (SECOND / ticks_per_second())
}

/// The VM.
pub(super) struct Guest {
    pub(super) vm: Vm,
    console: Console,
}

/// Why the guest came back.
pub(super) enum Event {
    /// It waits for the answer of its mailbox.
    Asks,
    /// It has powered off after this many checks, all of which passed.
    Off(u32),
}

impl Guest {
    /// Loads the payload with this command line, which is ready to run.
    pub(super) fn create(memory: &Memory, bootargs: &str) -> Result<Self, &'static str> {
        Self::create_in(memory, memory.ram, bootargs)
    }

    /// The same for a VM that devices can be attached to.
    pub(super) fn create_with_devices(
        memory: &Memory,
        bootargs: &str,
    ) -> Result<Self, &'static str> {
        let config = VmConfig {
            devices: true,
            ..config(false)
        };
        Self::create_as(config, memory, memory.ram, bootargs)
    }

    /// The same with this part of the memory as RAM.
    pub(super) fn create_in(
        memory: &Memory,
        ram: AddrRange,
        bootargs: &str,
    ) -> Result<Self, &'static str> {
        Self::create_as(config(false), memory, ram, bootargs)
    }

    fn create_as(
        config: VmConfig,
        memory: &Memory,
        ram: AddrRange,
        bootargs: &str,
    ) -> Result<Self, &'static str> {
        let vm = words(Vm::create(config, memory.state))?;
        let guest = Self {
            vm,
            console: Console::default(),
        };
        match guest.fill(memory, ram, bootargs) {
            Ok(()) => Ok(guest),
            Err(why) => end(vm).and(Err(why)),
        }
    }

    fn fill(&self, memory: &Memory, range: AddrRange, bootargs: &str) -> Result<(), &'static str> {
        let entry = load(memory, range, bootargs)?;
        words(self.vm.create_slot(RAM_SLOT, RAM, range))?;
        words(self.vm.create_vcpu(0))?;
        words(self.vm.start_vcpu(0, entry, RAM))
    }

    /// Resets the VM and lets it start over; its slots stay.
    pub(super) fn restart(&mut self, memory: &Memory, bootargs: &str) -> Result<(), &'static str> {
        words(self.vm.reset())?;
        let entry = load(memory, memory.ram, bootargs)?;
        self.console = Console::default();
        words(self.vm.start_vcpu(0, entry, RAM))
    }

    /// Runs it until it asks, or has powered off; `answer` is what its last question wants.
    pub(super) fn go_on(&mut self, answer: u32) -> Result<Event, &'static str> {
        let mut loaded = u64::from(answer);
        loop {
            let exit = match self.vm.run(0, loaded, false) {
                Err(refused) if matches!(refused.code, ErrorCode::Again | ErrorCode::Busy) => {
                    continue;
                }
                result => words(result)?,
            };
            loaded = 0;
            match exit {
                Exit::MmioRead { ipa: MAILBOX, .. } => return Ok(Event::Asks),
                Exit::MmioWrite {
                    ipa: UART, value, ..
                } => self.console.put(value.to_le_bytes()[0]),
                // The UART's flags: it takes what is sent at once.
                Exit::MmioRead { .. }
                | Exit::MmioWrite { .. }
                | Exit::Interrupted
                | Exit::WaitForInterrupt { .. } => {}
                Exit::SystemOff => return self.console.verdict().map(Event::Off),
                other => {
                    line(format_args!("  unexpected {other:?}"));
                    return Err("the guest did something else");
                }
            }
        }
    }
}

/// Puts the payload and its device tree into the VM's RAM; gives where it starts.
fn load(memory: &Memory, range: AddrRange, bootargs: &str) -> Result<u64, &'static str> {
    let payload = crate::run::DEMO;
    let layout = image::layout(payload, 0, range.size()).map_err(|_| "the payload does not fit")?;
    let tree = tree::build(&tree::Guest {
        vcpus: 1,
        memory: range.size(),
        gic_v3: memory.gic_v3,
        bootargs,
        ramdisk: None,
        seed: None,
        virtio: 0,
        pci: false,
    });
    let tree = tree.map_err(|_| "the guest's device tree can't be built")?;
    let ram = mem::bytes_mut(range);
    for (at, bytes) in [(0, &tree[..]), (layout.kernel as usize, payload)] {
        let place = ram.get_mut(at..).and_then(|ram| ram.get_mut(..bytes.len()));
        mem::copy(bytes, place.ok_or("the payload does not fit")?);
    }
    Ok(RAM + layout.kernel)
}

/// What the guest prints.
struct Console {
    text: [u8; 160],
    length: usize,
    /// Checks by its closing line.
    closed: Option<(u32, u32)>,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            text: [0; 160],
            length: 0,
            closed: None,
        }
    }
}

impl Console {
    fn put(&mut self, byte: u8) {
        if byte != b'\n' {
            if let Some(place) = self.text.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
            return;
        }
        let text = core::str::from_utf8(&self.text[..self.length]).unwrap_or("");
        // What passed is too much to show.
        if !text.ends_with(" ok") {
            line(format_args!("  guest: {text}"));
        }
        self.closed = closing(text).or(self.closed);
        self.length = 0;
    }

    fn verdict(&self) -> Result<u32, &'static str> {
        match self.closed {
            Some((passed, 0)) => Ok(passed),
            Some(_) => Err("the guest's checks failed"),
            None => Err("the guest did not say what it found"),
        }
    }
}

/// The numbers of "N passed, N failed".
fn closing(text: &str) -> Option<(u32, u32)> {
    let (passed, failed) = text.strip_suffix(" failed")?.split_once(" passed, ")?;
    passed.parse().ok().zip(failed.parse().ok())
}

/// Pages of 4 KiB of a device, at `address`.
pub(super) fn device_page(address: u64) -> Result<AddrRange, &'static str> {
    AddrRange::with_size(address, PAGE_SIZE).ok_or("the device's address is absurd")
}
