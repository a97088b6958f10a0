//! The driver: bring-up, streams, invalidation, events.
//!
//! Lock order: functions → commands. Events have their own, which nobody waits for.

use alloc::vec::Vec;
use spin::{Mutex, MutexGuard};
use thiserror::Error;

use super::encode::{Command, ENTRY_WORDS, SPLIT, StreamEntry, first_level};
use super::event::{EVENT_WORDS, Event, describe};
use super::ids::{Ids, Unfit};

/// Registers (IHI 0070 6.2), in bytes.
mod register {
    pub(super) const IDR0: u32 = 0x0;
    pub(super) const IDR1: u32 = 0x4;
    pub(super) const IDR3: u32 = 0xc;
    pub(super) const IDR5: u32 = 0x14;
    pub(super) const CR0: u32 = 0x20;
    pub(super) const CR0ACK: u32 = 0x24;
    pub(super) const CR1: u32 = 0x28;
    pub(super) const CR2: u32 = 0x2c;
    pub(super) const GBPA: u32 = 0x44;
    pub(super) const IRQ_CTRL: u32 = 0x50;
    pub(super) const GERROR: u32 = 0x60;
    pub(super) const GERRORN: u32 = 0x64;
    pub(super) const STRTAB_BASE: u32 = 0x80;
    pub(super) const STRTAB_BASE_CFG: u32 = 0x88;
    pub(super) const CMDQ_BASE: u32 = 0x90;
    pub(super) const CMDQ_PROD: u32 = 0x98;
    pub(super) const CMDQ_CONS: u32 = 0x9c;
    pub(super) const EVENTQ_BASE: u32 = 0xa0;
    pub(super) const EVENTQ_PROD: u32 = 0x1_00a8;
    pub(super) const EVENTQ_CONS: u32 = 0x1_00ac;
}
use register as r;

const CR0_SMMUEN: u32 = 1;
const CR0_EVENTQEN: u32 = 1 << 2;
const CR0_CMDQEN: u32 = 1 << 3;
/// ATSCHK: what devices say they have translated themselves is checked, too.
const CR0_ATSCHK: u32 = 1 << 4;
/// Tables and queues: inner shareable, write-back inside and outside.
const CR1_CACHED: u32 = 0b11_01_01 | 0b11_01_01 << 6;
/// RECINVSID: unknown streams are recorded. PTM: the CPUs' own TLBIs do not reach the SMMU.
const CR2_RECORD_PRIVATE: u32 = 1 << 1 | 1 << 2;
/// GBPA: abort everything while the SMMU is off.
const GBPA_ABORT: u32 = 1 << 20;
const GBPA_UPDATE: u32 = 1 << 31;
/// GERROR: the command queue has stopped.
const GERROR_CMDQ: u32 = 1;
/// An event was lost: the flag in PROD differs from that in CONS.
const OVERFLOW: u32 = 1 << 31;
/// RA or WA of a base register: allocate in caches.
const ALLOCATE: u64 = 1 << 62;
/// Base-two logarithm of the most entries that we use of either queue: a page, or two.
const QUEUE_BITS: u32 = 8;
/// Bits of stream numbers that get a table: what PCI functions of one host bridge need.
const STREAM_BITS: u32 = 16;
/// More commands than this for a range, and all of the VMID is forgotten instead.
const MOST_COMMANDS: u64 = 32;
/// Times that a register is read before the SMMU is given up.
const PATIENCE: u32 = 50_000_000;
/// Most functions that are taken from the host at a time, and whose faults are counted one by one.
pub const MAX_FUNCTIONS: usize = 64;
/// Most events handled at once.
const EVENTS_AT_ONCE: usize = 16;

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
    const fn entry(&self) -> StreamEntry {
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
struct Taken {
    stream: u32,
    owner: Owner,
}

/// The command queue: always empty between two operations.
#[derive(Debug)]
struct Commands {
    base: u64,
    bits: u32,
    /// PROD, with its wrap bit.
    next: u32,
    dead: bool,
}

#[derive(Debug)]
struct Events {
    base: u64,
    bits: u32,
    /// CONS, with its wrap bit.
    next: u32,
    /// Never more than there is room for from the start.
    streams: Vec<(u32, Faults)>,
}

#[derive(Debug)]
struct Tables {
    /// Bits of stream numbers in the table.
    bits: u32,
    /// First level, or the only one.
    base: u64,
    two_level: bool,
    /// The second-level table of streams that are all the host's.
    shared: u64,
}

/// An SMMU that EL2 drives.
#[derive(Debug)]
pub struct Smmu<P> {
    port: P,
    ids: Ids,
    tables: Tables,
    host: Walk,
    /// Never more than there is room for from the start.
    taken: Mutex<Vec<Taken>>,
    commands: Mutex<Commands>,
    events: Mutex<Events>,
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
            taken: Mutex::new(room()?),
            commands: Mutex::new(Commands {
                base: commands,
                bits,
                next: 0,
                dead: false,
            }),
            events: Mutex::new(Events {
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
        self.port.write(r::CR1, CR1_CACHED);
        self.port.write(r::CR2, CR2_RECORD_PRIVATE);
        self.tables.fill_shared(&self.port, self.host.entry());
        self.port.publish();
        let format = if self.tables.two_level {
            1 << 16 | SPLIT << 6
        } else {
            0
        };
        self.write64(r::STRTAB_BASE, ALLOCATE | self.tables.base);
        self.port
            .write(r::STRTAB_BASE_CFG, format | self.tables.bits);
        let (commands, events) = (self.commands.lock(), self.events.lock());
        self.write64(
            r::CMDQ_BASE,
            ALLOCATE | commands.base | u64::from(commands.bits),
        );
        self.port.write(r::CMDQ_PROD, 0);
        self.port.write(r::CMDQ_CONS, 0);
        self.write64(
            r::EVENTQ_BASE,
            ALLOCATE | events.base | u64::from(events.bits),
        );
        self.port.write(r::EVENTQ_PROD, 0);
        self.port.write(r::EVENTQ_CONS, 0);
        drop((commands, events));
        // What firmware left behind is not ours to answer.
        let errors = self.port.read(r::GERROR);
        self.port.write(r::GERRORN, errors);
        self.set_acknowledged(r::CR0, r::CR0ACK, CR0_CMDQEN)?;
        self.issue(&[Command::AllStreams, Command::All]);
        let on = CR0_CMDQEN | CR0_EVENTQEN | CR0_ATSCHK | CR0_SMMUEN;
        if self.commands.lock().dead {
            return Err(Unfit::Dead);
        }
        self.set_acknowledged(r::CR0, r::CR0ACK, on)
    }

    fn write64(&self, offset: u32, value: u64) {
        self.port.write(offset, value as u32);
        self.port.write(offset + 4, (value >> 32) as u32);
    }

    fn set_acknowledged(&self, register: u32, ack: u32, value: u32) -> Result<(), Unfit> {
        self.port.write(register, value);
        let done = || self.port.read(ack) == value;
        if wait_for(done) {
            Ok(())
        } else {
            Err(Unfit::Dead)
        }
    }

    /// GBPA (6.3.14): it takes a value when UPDATE reads as 0.
    fn abort_while_off(&self) -> Result<(), Unfit> {
        let ready = || self.port.read(r::GBPA) & GBPA_UPDATE == 0;
        if !wait_for(ready) {
            return Err(Unfit::Dead);
        }
        self.port.write(r::GBPA, GBPA_ABORT | GBPA_UPDATE);
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

fn page_at_least(size: u64) -> u64 {
    size.max(board::PAGE_SIZE)
}

const fn fits(ids: &Ids, walk: &Walk) -> bool {
    walk.output_bits <= ids.output_bits
        && (!walk.fwb || ids.fwb)
        && (ids.vmid16 || walk.vmid < 0x100)
}

/// Commands.
impl<P: Port> Smmu<P> {
    /// Forgets translations of a VMID, and waits for the accesses that used them.
    pub fn invalidate(&self, vmid: u16, start: u64, size: u64) {
        let mut queue = self.commands.lock();
        let mut pieces = Pieces::new(start, size, self.ids.range);
        if pieces.clone().count() as u64 > MOST_COMMANDS {
            self.push(&mut queue, Command::Vmid(vmid));
        } else {
            while let Some((ipa, range)) = pieces.next() {
                self.push(&mut queue, Command::Pages { vmid, ipa, range });
            }
        }
        self.complete(&mut queue);
    }

    /// Issues commands and waits for all of them.
    fn issue(&self, commands: &[Command]) {
        let mut queue = self.commands.lock();
        for command in commands {
            self.push(&mut queue, *command);
        }
        self.complete(&mut queue);
    }

    fn complete(&self, queue: &mut MutexGuard<'_, Commands>) {
        self.push(queue, Command::Sync);
        self.drain(queue);
    }

    fn push(&self, queue: &mut MutexGuard<'_, Commands>, command: Command) {
        let size = 1 << queue.bits;
        let at = queue.base + u64::from(queue.next & (size - 1)) * 16;
        let [first, second] = command.encode();
        self.port.store(at, first);
        self.port.store(at + 8, second);
        queue.next = (queue.next + 1) & (2 * size - 1);
        if queue.next & (size - 1) == 0 {
            // The last place: what is in the queue goes before it is used anew.
            self.drain(queue);
        }
    }

    /// Hands over what is in the queue and waits until the SMMU has taken it.
    fn drain(&self, queue: &mut MutexGuard<'_, Commands>) {
        if queue.dead {
            return;
        }
        self.port.publish();
        self.port.write(r::CMDQ_PROD, queue.next);
        let wrap = (2 << queue.bits) - 1;
        let stopped =
            || (self.port.read(r::GERROR) ^ self.port.read(r::GERRORN)) & GERROR_CMDQ != 0;
        let taken = || self.port.read(r::CMDQ_CONS) & wrap == queue.next;
        let mut reads = 0u32;
        while !taken() {
            reads += 1;
            if reads == PATIENCE || (reads.is_multiple_of(1024) && stopped()) {
                return self.cut_off(queue);
            }
            core::hint::spin_loop();
        }
        self.port.publish();
    }

    /// The SMMU does not do what it is told: nothing gets through it any more. If it can't even be
    /// turned off, this does not return, and memory that its devices may reach stays whose it is.
    #[cold]
    fn cut_off(&self, queue: &mut MutexGuard<'_, Commands>) {
        log::error!("smmu: it takes no commands: everything behind it is cut off");
        queue.dead = true;
        while self.abort_while_off().is_err()
            || self.set_acknowledged(r::CR0, r::CR0ACK, 0).is_err()
        {
            log::error!("smmu: it can't be turned off: waiting for it");
        }
    }
}

/// A range in pieces that one command each forgets: first address, and NUM and SCALE.
#[derive(Clone, Debug)]
struct Pieces {
    page: u64,
    left: u64,
    ranges: bool,
}

impl Pieces {
    const fn new(start: u64, size: u64, ranges: bool) -> Self {
        let first = start / board::PAGE_SIZE;
        let end = start.saturating_add(size).div_ceil(board::PAGE_SIZE);
        Self {
            page: first,
            left: end - first,
            ranges,
        }
    }
}

impl Iterator for Pieces {
    type Item = (u64, Option<(u8, u8)>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let ipa = self.page * board::PAGE_SIZE;
        // The five lowest bits that matter; what is above them comes with a larger scale.
        let scale = self.left.trailing_zeros().min(31);
        let count = (self.left >> scale & 31).max(1);
        // NUM, SCALE and TTL all 0 are reserved: one page goes without a range.
        let (range, pages) = if self.ranges && count << scale > 1 {
            (Some((count as u8 - 1, scale as u8)), count << scale)
        } else {
            (None, 1)
        };
        self.page += pages;
        self.left -= pages;
        Some((ipa, range))
    }
}

/// Streams.
impl<P: Port> Smmu<P> {
    /// Takes a stream from the host.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn take(&self, stream: u32) -> Result<(), AttachError> {
        self.check_alive()?;
        let mut taken = self.taken.lock();
        if taken.iter().any(|t| t.stream == stream) {
            return Err(AttachError::Taken);
        }
        if taken.len() == MAX_FUNCTIONS {
            return Err(AttachError::Full);
        }
        let entry = self.own_entry(stream)?;
        self.close(entry, stream, self.host.vmid);
        let owner = Owner::Nobody;
        taken.push(Taken { stream, owner });
        Ok(())
    }

    /// Gives a stream back to the host that nobody has.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn give(&self, stream: u32) -> Result<(), AttachError> {
        let mut taken = self.taken.lock();
        let at = position(&taken, stream, Owner::Nobody)?;
        let entry = self.own_entry(stream)?;
        self.open(entry, stream, &self.host);
        taken.swap_remove(at);
        Ok(())
    }

    /// Lets a stream that was taken go through a VM's tables.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach(&self, stream: u32, walk: &Walk) -> Result<(), AttachError> {
        self.check_alive()?;
        let mut taken = self.taken.lock();
        let at = position(&taken, stream, Owner::Nobody)?;
        if !fits(&self.ids, walk) {
            return Err(AttachError::Tables);
        }
        let entry = self.own_entry(stream)?;
        self.open(entry, stream, walk);
        taken[at].owner = Owner::Vm(walk.vmid);
        Ok(())
    }

    /// Lets a stream of a VM abort; says how many the VM has left. No access of it is in flight when
    /// this returns.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn detach(&self, stream: u32, vmid: u16) -> Result<Uses, AttachError> {
        let mut taken = self.taken.lock();
        let at = position(&taken, stream, Owner::Vm(vmid))?;
        let entry = self.own_entry(stream)?;
        self.close(entry, stream, vmid);
        taken[at].owner = Owner::Nobody;
        Ok(uses(&taken, vmid))
    }

    /// How many streams a VM has.
    pub fn uses(&self, vmid: u16) -> Uses {
        uses(&self.taken.lock(), vmid)
    }

    /// Some stream of a VM.
    pub fn stream_of(&self, vmid: u16) -> Option<u32> {
        let taken = self.taken.lock();
        let of_vm = taken.iter().find(|t| t.owner == Owner::Vm(vmid));
        of_vm.map(|t| t.stream)
    }

    /// Whose a stream is.
    pub fn owner(&self, stream: u32) -> Owner {
        let taken = self.taken.lock();
        let found = taken.iter().find(|t| t.stream == stream);
        found.map_or(Owner::Host, |t| t.owner)
    }

    fn check_alive(&self) -> Result<(), AttachError> {
        if self.is_dead() {
            Err(AttachError::Dead)
        } else {
            Ok(())
        }
    }

    /// The address of a stream's entry in a table that is not shared with other streams' defaults.
    fn own_entry(&self, stream: u32) -> Result<u64, AttachError> {
        if stream >> self.tables.bits != 0 {
            return Err(AttachError::NoStream);
        }
        let size = (ENTRY_WORDS * 8) as u64;
        if !self.tables.two_level {
            return Ok(self.tables.base + u64::from(stream) * size);
        }
        let descriptor = self.tables.base + u64::from(stream >> SPLIT) * 8;
        let mut table = self.port.load(descriptor) & !0x3f;
        if table == self.tables.shared {
            let bytes = size << SPLIT;
            table = self.port.alloc(bytes).ok_or(AttachError::NoMemory)?;
            for at in (0..bytes).step_by(8) {
                self.port
                    .store(table + at, self.port.load(self.tables.shared + at));
            }
            // The same entries as before: it does not matter when the SMMU sees the new place.
            self.port.publish();
            self.port.store(descriptor, first_level(table));
            self.port.publish();
            self.issue(&[Command::AllStreams]);
        }
        Ok(table + u64::from(stream & ((1 << SPLIT) - 1)) * size)
    }

    /// From aborting to a walk: everything but the word that says so, then that one.
    fn open(&self, entry: u64, stream: u32, walk: &Walk) {
        let words = walk.entry().encode();
        for (at, word) in (0..).step_by(8).zip(words).skip(1) {
            self.port.store(entry + at, word);
        }
        self.port.publish();
        // What was cached of the words behind the first one, before it made them matter.
        self.issue(&[Command::Stream(stream)]);
        self.port.store(entry, words[0]);
        self.port.publish();
        self.issue(&[Command::Stream(stream)]);
    }

    /// From a walk to aborting, by one word; then the accesses in flight are waited for, which only
    /// an invalidation of their translations does.
    fn close(&self, entry: u64, stream: u32, vmid: u16) {
        self.port.store(entry, StreamEntry::Abort.encode()[0]);
        self.port.publish();
        self.issue(&[Command::Stream(stream)]);
        self.issue(&[Command::Vmid(vmid)]);
    }
}

fn position(taken: &[Taken], stream: u32, owner: Owner) -> Result<usize, AttachError> {
    let mine = |t: &Taken| t.stream == stream && t.owner == owner;
    taken.iter().position(mine).ok_or(AttachError::NotOwned)
}

fn uses(taken: &[Taken], vmid: u16) -> Uses {
    let mine = |t: &&Taken| t.owner == Owner::Vm(vmid);
    Uses(taken.iter().filter(mine).count())
}

impl Tables {
    /// Tables in which every entry is invalid, which aborts.
    fn new<P: Port>(port: &P, ids: &Ids) -> Option<Self> {
        let entry = (ENTRY_WORDS * 8) as u64;
        let two_level = ids.two_level && ids.stream_bits > SPLIT;
        if !two_level {
            let bits = ids.stream_bits.min(SPLIT);
            let base = port.alloc(page_at_least(entry << bits))?;
            return Some(Self {
                bits,
                base,
                two_level,
                shared: base,
            });
        }
        let bits = ids.stream_bits.min(STREAM_BITS);
        let base = port.alloc(page_at_least(8 << (bits - SPLIT)))?;
        let shared = port.alloc(entry << SPLIT)?;
        for index in 0..1 << (bits - SPLIT) {
            port.store(base + index * 8, first_level(shared));
        }
        Some(Self {
            bits,
            base,
            two_level,
            shared,
        })
    }

    /// Lets all streams go through one walk, before the SMMU is on.
    fn fill_shared<P: Port>(&self, port: &P, entry: StreamEntry) {
        let entries = if self.two_level {
            1 << SPLIT
        } else {
            1 << self.bits
        };
        let words = entry.encode();
        for index in 0..entries * ENTRY_WORDS as u64 {
            let word = words[index as usize % ENTRY_WORDS];
            port.store(self.shared + index * 8, word);
        }
    }
}

/// Events.
impl<P: Port> Smmu<P> {
    /// Counts what was refused since the last call, a bounded number at once, and logs some of it by
    /// `name`, which writes whose stream it is. Costs one register read when there is nothing.
    pub fn poll(&self, name: impl Fn(u32, Owner) -> Option<u16>) {
        let Some(mut events) = self.events.try_lock() else {
            return; // Another core is at it.
        };
        let produced = self.port.read(r::EVENTQ_PROD);
        let wrap = (2 << events.bits) - 1;
        if produced & wrap == events.next & wrap {
            return;
        }
        self.port.publish();
        for _ in 0..EVENTS_AT_ONCE {
            if produced & wrap == events.next & wrap {
                break;
            }
            self.handle(&mut events, &name);
        }
        // The flag that says that records were lost is answered by repeating it.
        let flag = produced & OVERFLOW;
        self.port.write(r::EVENTQ_CONS, events.next & wrap | flag);
    }

    fn handle(&self, events: &mut Events, name: &impl Fn(u32, Owner) -> Option<u16>) {
        let size = 1u32 << events.bits;
        let at = events.base + u64::from(events.next & (size - 1)) * (EVENT_WORDS as u64 * 8);
        let words = core::array::from_fn(|word| self.port.load(at + 8 * word as u64));
        events.next = (events.next + 1) & (2 * size - 1);
        let event = Event::decode(words);
        let owner = self.owner(event.stream);
        let vmid = match owner {
            Owner::Host => self.host.vmid,
            Owner::Nobody => 0,
            Owner::Vm(vmid) => vmid,
        };
        let count = events.count(event, vmid);
        // The first ones, and then ever fewer: a storm of them fills no log.
        if count <= 4 || count.is_power_of_two() {
            report(&event, owner, count, name(event.stream, owner));
        }
    }

    /// Refused accesses of a stream since boot.
    pub fn faults(&self, stream: u32) -> Faults {
        let events = self.events.lock();
        let found = events.streams.iter().find(|(s, _)| *s == stream);
        found.map_or_else(Faults::default, |(_, faults)| *faults)
    }
}

impl Events {
    /// Counts an event; gives the stream's count, the largest one if there is no room for it.
    fn count(&mut self, event: Event, vmid: u16) -> u64 {
        let at = self.streams.iter().position(|(s, _)| *s == event.stream);
        let at = at.unwrap_or(self.streams.len());
        if at == self.streams.len() && at < MAX_FUNCTIONS {
            self.streams.push((event.stream, Faults::default()));
        }
        let Some((_, faults)) = self.streams.get_mut(at) else {
            return u64::MAX;
        };
        faults.count += 1;
        faults.last = event;
        faults.vmid = vmid;
        faults.count
    }
}

#[cold]
fn report(event: &Event, owner: Owner, count: u64, function: Option<u16>) {
    let what = if event.read { "read" } else { "write" };
    let [device, bus] = function.unwrap_or_default().to_le_bytes();
    let (slot, number) = (device >> 3, device & 7);
    let (whose, vm) = match owner {
        Owner::Host => ("of the host", 0),
        Owner::Nobody => ("of nobody", 0),
        Owner::Vm(vmid) => ("of VM ", vmid),
    };
    let why = describe(event.number);
    let (at, stream) = (event.address, event.stream);
    if vm == 0 {
        log::warn!(
            "smmu: function {bus:02x}:{slot:02x}.{number} {whose} may not {what} {at:#x}: {why} \
             (stream {stream:#x}, number {count})"
        );
    } else {
        log::warn!(
            "smmu: function {bus:02x}:{slot:02x}.{number} {whose}{vm} may not {what} {at:#x}: {why} \
             (stream {stream:#x}, number {count})"
        );
    }
}
