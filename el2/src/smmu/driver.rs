//! The driver: what it is made of, and bring-up.
//!
//! Lock order: functions → commands. Events have their own, which nobody waits for.

use crate::sync::SpinLock;
use alloc::vec::Vec;
use thiserror::Error;

use super::encode::{Command, SPLIT, StreamEntry};
use super::event::Event;
use super::ids::{Ids, Unfit};
use super::register as r;

/// Base-two logarithm of the most entries that we use of either queue: a page, or two.
const QUEUE_BITS: u32 = 8;
/// Times that a register is read before the SMMU is given up.
pub(super) const PATIENCE: u32 = 50_000_000;
/// Most functions that are taken from the host at a time, and whose faults are counted one by one.
pub const MAX_FUNCTIONS: usize = 64;

/// What the driver asks of the machine.
pub trait Port {
    /// Reads a 32-bit register.
    fn read(&self, offset: u32) -> u32;

    /// Writes a 32-bit register.
    fn write(&self, offset: u32, value: u32);

    /// Reads a word of memory from [`Port::alloc`].
    fn load(&self, address: u64) -> u64;

    /// Writes a word of memory from [`Port::alloc`], in one piece.
    fn store(&self, address: u64, value: u64);

    /// Orders stores before it with register and memory accesses behind it, for the SMMU, too; and
    /// register reads before it with loads behind it.
    fn publish(&self);

    /// `size` bytes of zeros, a power of two, aligned to their size; never given back.
    fn alloc(&self, size: u64) -> Option<u64>;
}

/// A stage 2 as the SMMU walks it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Walk {
    /// VMID.
    pub vmid: u16,
    /// VTCR_EL2 of the tables.
    pub vtcr: u64,
    /// The root's address.
    pub root: u64,
    /// Bits of an output address in the tables.
    pub output_bits: u8,
    /// The tables are written for forced write-back.
    pub fwb: bool,
}

impl Walk {
    pub(super) const fn entry(&self) -> StreamEntry {
        StreamEntry::Stage2 {
            vmid: self.vmid,
            vtcr: self.vtcr,
            root: self.root,
            fwb: self.fwb,
        }
    }
}

/// Whose a stream is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// The host's.
    Host,
    /// Taken from the host: it aborts.
    Nobody,
    /// The VM's with this VMID.
    Vm(u16),
}

/// Why a stream does not change its owner. Nothing has changed then.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum AttachError {
    /// The SMMU has no such stream.
    #[error("no stream of this SMMU")]
    NoStream,
    /// It is taken already.
    #[error("it is taken already")]
    Taken,
    /// It is not taken, or has a VM already, or another VM.
    #[error("it is not whose it should be")]
    NotOwned,
    /// The SMMU can't walk these tables.
    #[error("the SMMU can't walk these tables as the CPUs do")]
    Tables,
    /// As many streams are taken as there is room for.
    #[error("{MAX_FUNCTIONS} streams are taken")]
    Full,
    /// EL2's memory is used up.
    #[error("EL2's memory does not hold another stream table")]
    NoMemory,
    /// The SMMU has stopped answering, and everything behind it aborts.
    #[error("the SMMU does not answer")]
    Dead,
}

/// How many streams of a VM there are left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Uses(pub usize);

/// Refused accesses of a stream.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Faults {
    /// How many.
    pub count: u64,
    /// The last one.
    pub last: Event,
    /// VMID of the tables that refused it.
    pub vmid: u16,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) stream: u32,
    pub(super) owner: Owner,
}

/// The command queue: always empty between two operations.
#[derive(Debug)]
pub(super) struct Commands {
    pub(super) base: u64,
    pub(super) bits: u32,
    /// PROD, with its wrap bit.
    pub(super) next: u32,
    pub(super) dead: bool,
}

#[derive(Debug)]
pub(super) struct Events {
    pub(super) base: u64,
    pub(super) bits: u32,
    /// CONS, with its wrap bit.
    pub(super) next: u32,
    /// Never more than there is room for from the start.
    pub(super) streams: Vec<(u32, Faults)>,
}

#[derive(Debug)]
pub(super) struct Tables {
    /// Bits of stream numbers in the table.
    pub(super) bits: u32,
    /// First level, or the only one.
    pub(super) base: u64,
    pub(super) two_level: bool,
    /// The second-level table of streams that are all the host's.
    pub(super) shared: u64,
}

/// An SMMU that EL2 drives.
#[derive(Debug)]
pub struct Smmu<P> {
    pub(super) port: P,
    pub(super) ids: Ids,
    pub(super) tables: Tables,
    pub(super) host: Walk,
    /// Never more than there is room for from the start.
    pub(super) taken: SpinLock<Vec<Taken>>,
    pub(super) commands: SpinLock<Commands>,
    pub(super) events: SpinLock<Events>,
}

impl<P: Port> Smmu<P> {
    /// What the SMMU can do.
    pub fn identify(port: &P) -> Ids {
        let read = |offset| port.read(offset);
        Ids::decode(read(r::IDR0), read(r::IDR1), read(r::IDR3), read(r::IDR5))
    }

    /// Turns the SMMU on. From its first step on, every stream aborts, and goes through the `host`'s
    /// tables when this returns. The caller fills them before, and tells [`Smmu::invalidate`] of every
    /// change.
    ///
    /// # Errors
    ///
    /// [`Unfit`]. If nothing but a check failed, the SMMU is as firmware left it; otherwise it aborts
    /// everything.
    pub fn start(port: P, coherent: bool, host: Walk) -> Result<Self, Unfit> {
        let ids = Self::identify(&port);
        ids.check(coherent, 0)?;
        if !fits(&ids, &host) {
            return Err(Unfit::Format);
        }
        let (bits, event_bits) = (
            ids.command_bits.min(QUEUE_BITS),
            ids.event_bits.min(QUEUE_BITS),
        );
        let commands = port
            .alloc(page_at_least(16 << bits))
            .ok_or(Unfit::NoMemory)?;
        let events = port
            .alloc(page_at_least(32 << event_bits))
            .ok_or(Unfit::NoMemory)?;
        let tables = Tables::new(&port, &ids).ok_or(Unfit::NoMemory)?;
        let smmu = Self {
            port,
            ids,
            tables,
            host,
            taken: SpinLock::new(room()?),
            commands: SpinLock::new(Commands {
                base: commands,
                bits,
                next: 0,
                dead: false,
            }),
            events: SpinLock::new(Events {
                base: events,
                bits: event_bits,
                next: 0,
                streams: room()?,
            }),
        };
        smmu.bring_up()?;
        Ok(smmu)
    }

    /// IHI 0070 3.11 and 6.3.9: off and aborting, then tables and queues, then on.
    fn bring_up(&self) -> Result<(), Unfit> {
        self.set_acknowledged(r::CR0, r::CR0ACK, 0)?;
        self.abort_while_off()?;
        self.port.write(r::IRQ_CTRL, 0);
        self.port.write(r::CR1, r::CR1_CACHED);
        self.port.write(r::CR2, r::CR2_RECORD_PRIVATE);
        self.tables.fill_shared(&self.port, self.host.entry());
        self.port.publish();
        let format = if self.tables.two_level {
            1 << 16 | SPLIT << 6
        } else {
            0
        };
        self.write64(r::STRTAB_BASE, r::ALLOCATE | self.tables.base);
        self.port
            .write(r::STRTAB_BASE_CFG, format | self.tables.bits);
        let (commands, events) = (self.commands.lock(), self.events.lock());
        self.write64(
            r::CMDQ_BASE,
            r::ALLOCATE | commands.base | u64::from(commands.bits),
        );
        self.port.write(r::CMDQ_PROD, 0);
        self.port.write(r::CMDQ_CONS, 0);
        self.write64(
            r::EVENTQ_BASE,
            r::ALLOCATE | events.base | u64::from(events.bits),
        );
        self.port.write(r::EVENTQ_PROD, 0);
        self.port.write(r::EVENTQ_CONS, 0);
        drop((commands, events));
        // What firmware left behind is not ours to answer.
        let errors = self.port.read(r::GERROR);
        self.port.write(r::GERRORN, errors);
        self.set_acknowledged(r::CR0, r::CR0ACK, r::CR0_CMDQEN)?;
        self.issue(&[Command::AllStreams, Command::All]);
        let on = r::CR0_CMDQEN | r::CR0_EVENTQEN | r::CR0_ATSCHK | r::CR0_SMMUEN;
        if self.commands.lock().dead {
            return Err(Unfit::Dead);
        }
        self.set_acknowledged(r::CR0, r::CR0ACK, on)
    }

    fn write64(&self, offset: u32, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.port.write(offset, u32::from_le_bytes([a, b, c, d]));
        self.port
            .write(offset + 4, u32::from_le_bytes([e, f, g, h]));
    }

    pub(super) fn set_acknowledged(
        &self,
        register: u32,
        ack: u32,
        value: u32,
    ) -> Result<(), Unfit> {
        self.port.write(register, value);
        let done = || self.port.read(ack) == value;
        if wait_for(done) {
            Ok(())
        } else {
            Err(Unfit::Dead)
        }
    }

    /// r::GBPA (6.3.14): it takes a value when UPDATE reads as 0.
    pub(super) fn abort_while_off(&self) -> Result<(), Unfit> {
        let ready = || self.port.read(r::GBPA) & r::GBPA_UPDATE == 0;
        if !wait_for(ready) {
            return Err(Unfit::Dead);
        }
        self.port.write(r::GBPA, r::GBPA_ABORT | r::GBPA_UPDATE);
        if wait_for(ready) {
            Ok(())
        } else {
            Err(Unfit::Dead)
        }
    }

    /// What it can do.
    pub const fn ids(&self) -> &Ids {
        &self.ids
    }

    /// Whether it has stopped answering; everything behind it aborts then.
    pub fn is_dead(&self) -> bool {
        self.commands.lock().dead
    }

    /// Whether a stage 2 can be walked.
    #[must_use]
    pub fn can_walk(&self, walk: &Walk) -> bool {
        fits(&self.ids, walk)
    }
}

/// Waits a while; says whether it came true.
fn wait_for(done: impl Fn() -> bool) -> bool {
    (0..PATIENCE).any(|_| {
        let now = done();
        if !now {
            core::hint::spin_loop();
        }
        now
    })
}

/// An empty list with all the room that it will ever need.
fn room<T>() -> Result<Vec<T>, Unfit> {
    let mut list = Vec::new();
    let reserved = list.try_reserve_exact(MAX_FUNCTIONS);
    reserved.map(|()| list).map_err(|_| Unfit::NoMemory)
}

pub(super) fn page_at_least(size: u64) -> u64 {
    size.max(board::PAGE_SIZE)
}

pub(super) const fn fits(ids: &Ids, walk: &Walk) -> bool {
    walk.output_bits <= ids.output_bits
        && (!walk.fwb || ids.fwb)
        && (ids.vmid16 || walk.vmid < 0x100)
}
