//! Whose a stream is, and the tables that say so to the SMMU.

use super::driver::{
    AttachError, MAX_FUNCTIONS, Owner, Port, Smmu, Tables, Taken, Uses, Walk, fits, page_at_least,
};
use super::encode::{Command, ENTRY_WORDS, SPLIT, StreamEntry, first_level};
use super::ids::Ids;

/// Bits of stream numbers that get a table: what PCI functions of one host bridge need.
const STREAM_BITS: u32 = 16;

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
    pub(super) fn new<P: Port>(port: &P, ids: &Ids) -> Option<Self> {
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
    pub(super) fn fill_shared<P: Port>(&self, port: &P, entry: StreamEntry) {
        let entries = if self.two_level {
            1 << SPLIT
        } else {
            1 << self.bits
        };
        let words = (0..entries).flat_map(|_| entry.encode());
        for (at, word) in (self.shared..).step_by(8).zip(words) {
            port.store(at, word);
        }
    }
}
