//! PCI functions of the machine that are a VM's own.
//!
//! A function is taken from the host before it is touched, so that what its last driver told it
//! reaches nothing; it is reset, and attached to the VM: from then on its DMA goes through the VM's
//! tables, and the VM may let it do some. At the VM's end it goes the same way back; one that can't be
//! reset stays taken for good.
//!
//! The VM drives the function's registers itself, by slots of device memory where it has placed them.
//! Of its configuration space it sees what [`Assigned`] lets it see; each access comes here. Its
//! interrupt pin is level-triggered, so the machine's interrupt stays masked from when it comes until
//! the VM has ended its own.

use abi::{ErrorCode, SlotWord};
use alloc::vec::Vec;
use board::{AddrRange, Gic};
use spin::{Mutex, Once};
use vmm::pci::assigned::{Assigned, register_at};
use vmm::pci::{Function, MAX_BARS};
use vmm::platform::PCI_INTID;

use super::Memory;
use super::guest::{Guest, reason};
use crate::arch::gic;
use crate::console::line;
use crate::machine::Machine;
use crate::pci::{Device, Pci};
use crate::vm::{self, Refused};

/// Number of the slot that is the first function's base address register 0.
const FIRST_SLOT: u16 = 1;

/// The machine's bus, and where its interrupts go.
#[derive(Debug)]
struct Bus {
    pci: Pci,
    gic: Gic,
}

static BUS: Once<Option<Bus>> = Once::new();

/// A function.
#[derive(Debug)]
struct Owned {
    device: Device,
    seen: Assigned,
    /// Where its base address registers are in the VM.
    places: [Option<AddrRange>; MAX_BARS],
    /// The machine's interrupt that its pin is.
    intid: Option<u32>,
    /// The VM has not ended its interrupt yet.
    waiting: bool,
}

/// A VM's functions, in the order of their device numbers.
#[derive(Debug, Default)]
pub(super) struct Functions(Mutex<Vec<Owned>>);

fn bus() -> Option<&'static Bus> {
    BUS.get()?.as_ref()
}

impl Guest {
    /// Gives the VM the functions that its configuration names. Its memory must be locked, and its
    /// payload loaded: what is pending of cache maintenance is done now.
    pub(super) fn assign(
        &self,
        machine: &Machine,
        cores: &[u64],
        memory: &mut Memory,
    ) -> Result<(), &'static str> {
        if self.config.assigned.is_empty() {
            return Ok(());
        }
        if self.config.protected || !self.config.lock {
            return Err("a VM with PCI functions has locked memory that is not protected");
        }
        let start = || {
            let gic = machine.board.gic?;
            let pci = Pci::start(machine)?;
            Some(Bus { pci, gic })
        };
        let bus = BUS.call_once(start).as_ref();
        let bus = bus.ok_or("this machine has no PCI bus")?;
        for function in &self.config.assigned {
            let owned = self.take(bus, *function, memory)?;
            if let Some(intid) = owned.intid {
                let core = self.vcpus.first().map_or(0, |vcpu| vcpu.core);
                let mpidr = cores.get(core).copied().unwrap_or(0);
                gic::route(&bus.gic, intid, core, mpidr);
            }
            self.functions.0.lock().push(owned);
        }
        Ok(())
    }

    fn take(
        &self,
        bus: &Bus,
        function: Function,
        memory: &mut Memory,
    ) -> Result<Owned, &'static str> {
        let mut devices = bus.pci.devices.iter();
        let device = *devices
            .find(|device| device.function() == function)
            .ok_or("the machine has no such PCI function")?;
        vm::take_device(function.requester()).map_err(|refused| match refused.code {
            ErrorCode::NotFound => "no IOMMU of EL2's stands before the PCI function",
            ErrorCode::Exists => "another VM has the PCI function",
            _ => reason(refused),
        })?;
        let is_reset = bus.pci.reset(&device);
        let attach = || self.vm().attach_device(function.requester(), true);
        let attached = if is_reset {
            self.with_pages(memory, attach).map_err(reason)
        } else {
            Err("the PCI function can't be reset")
        };
        if let Err(why) = attached {
            if is_reset {
                let _: Result<(), Refused> = vm::give_device(function.requester());
            }
            return Err(why);
        }
        let (vendor, id) = (device.identity.vendor, device.identity.device);
        line(format_args!(
            "host: VM {} has {function} ({vendor:04x}:{id:04x}): its DMA goes through the VM's tables",
            self.number
        ));
        Ok(Owned {
            device,
            seen: Assigned::new(&bus.pci.space, function, &device.bars),
            places: [None; MAX_BARS],
            intid: bus.pci.interrupt(function),
            waiting: false,
        })
    }

    /// A read by the VM, if the address is in its configuration space.
    pub(super) fn read_config(&self, ipa: u64, size: u8) -> Option<u64> {
        let bus = bus()?;
        if self.config.assigned.is_empty() {
            return None;
        }
        let (index, register) = register_at(ipa)?;
        let functions = self.functions.0.lock();
        let owned = index.and_then(|index| functions.get(index));
        let value = owned.map_or(u32::MAX, |owned| {
            owned.seen.read(&bus.pci.space, register, size)
        });
        Some(value.into())
    }

    /// A write by the VM; says whether the address is in its configuration space.
    pub(super) fn write_config(
        &self,
        memory: &Mutex<Memory>,
        ipa: u64,
        size: u8,
        value: u64,
    ) -> bool {
        let (Some(bus), Some((index, register))) = (bus(), register_at(ipa)) else {
            return false;
        };
        if self.config.assigned.is_empty() {
            return false;
        }
        let mut memory = memory.lock();
        let mut functions = self.functions.0.lock();
        if let Some(index) = index
            && let Some(owned) = functions.get_mut(index)
        {
            owned
                .seen
                .write(&bus.pci.space, register, size, value as u32);
            self.follow(bus, &mut memory, index, owned);
        }
        true
    }

    /// Makes the VM's slots those that it has placed. Where EL2 refuses one, as where two overlap,
    /// nothing answers, as on a bus.
    fn follow(&self, bus: &Bus, memory: &mut Memory, index: usize, owned: &mut Owned) {
        for number in 0..MAX_BARS {
            let wanted = owned.seen.placed(number);
            let Some(place) = owned.places.get_mut(number).filter(|at| **at != wanted) else {
                continue;
            };
            let word = SlotWord {
                id: FIRST_SLOT + (index * MAX_BARS + number) as u16,
                device: true,
                flags: 0,
            };
            if place.is_some() && self.vm().delete_slot(word.id).is_err() {
                // It stays where it was; the next access to its configuration tries again.
                continue;
            }
            *place = None;
            let registers = bus.pci.registers(&owned.device, number);
            if let (Some(at), Some(registers)) = (wanted, registers) {
                let create = || self.vm().create_slot(word, at.start(), registers);
                *place = self.with_pages(memory, create).is_ok().then_some(at);
            }
        }
    }

    /// Resets the functions with the VM, which must not run.
    pub(super) fn reset_functions(&self, memory: &mut Memory) -> Result<(), &'static str> {
        let Some(bus) = bus() else {
            return Ok(());
        };
        for (index, owned) in self.functions.0.lock().iter_mut().enumerate() {
            if !bus.pci.reset(&owned.device) {
                return Err("a PCI function of it can't be reset");
            }
            owned.seen.reset(&bus.pci.space);
            self.follow(bus, memory, index, owned);
            owned.waiting = false;
            if let Some(intid) = owned.intid {
                gic::unmask(&bus.gic, intid);
            }
        }
        Ok(())
    }

    /// Takes the functions back from the VM, which must not run any more.
    pub(super) fn release_functions(&self) {
        let functions = core::mem::take(&mut *self.functions.0.lock());
        let Some(bus) = bus() else {
            return;
        };
        for owned in functions {
            let function = owned.device.function();
            let requester = function.requester();
            // Before the VM's tables are gone from under it.
            let is_reset = bus.pci.reset(&owned.device);
            let detached = self.vm().detach_device(requester).is_ok();
            self.report(&owned);
            if !(is_reset && detached && vm::give_device(requester).is_ok()) {
                line(format_args!(
                    "host: {function} can't be reset: it stays unused"
                ));
            }
            // Its pin is silent now; another function may share the interrupt.
            if let Some(intid) = owned.intid {
                gic::unmask(&bus.gic, intid);
            }
        }
    }

    /// One line for each function: whose it is, and what its DMA was refused.
    pub(super) fn report_functions(&self) {
        self.functions
            .0
            .lock()
            .iter()
            .for_each(|owned| self.report(owned));
    }

    fn report(&self, owned: &Owned) {
        let function = owned.device.function();
        let Ok((count, address, _)) = vm::device_faults(function.requester()) else {
            return;
        };
        let number = self.number;
        if count == 0 {
            line(format_args!(
                "host: {function} of VM {number}: 0 DMA accesses refused"
            ));
        } else {
            line(format_args!(
                "host: {function} of VM {number}: {count} DMA accesses refused, the last at {address:#x}"
            ));
        }
    }

    /// An interrupt of the machine, which is masked: tells the VM, if a function of its asserts
    /// it. Says whether one waits for the VM; `None` if none has this interrupt.
    pub(super) fn raise(&self, intid: u32) -> Option<bool> {
        let bus = bus()?;
        let mut functions = self.functions.0.lock();
        let list = (PCI_INTID..).zip(functions.iter_mut());
        let sharing = list.filter(|(_, owned)| owned.intid == Some(intid));
        sharing
            .map(|(own, owned)| {
                if !owned.waiting && owned.seen.asserts(&bus.pci.space) {
                    owned.waiting = self.vm().raise_line(own).is_ok();
                }
                owned.waiting
            })
            .reduce(|a, b| a | b)
    }

    /// The VM has ended an interrupt of its own; gives the machine's that is behind it.
    pub(super) fn interrupt_ended(&self, own: u32) -> Option<u32> {
        let index = own.checked_sub(PCI_INTID)? as usize;
        let mut functions = self.functions.0.lock();
        let owned = functions.get_mut(index)?;
        owned.waiting = false;
        owned.intid
    }

    /// Whether a function waits until the VM has ended this interrupt of the machine.
    pub(super) fn waits_for(&self, intid: u32) -> bool {
        let functions = self.functions.0.lock();
        functions
            .iter()
            .any(|owned| owned.waiting && owned.intid == Some(intid))
    }
}
