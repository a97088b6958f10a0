//! Commands, and the queue that takes them.

use spin::MutexGuard;

use super::driver::{Commands, PATIENCE, Port, Smmu};
use super::encode::Command;
use super::register as r;

/// More commands than this for a range, and all of the VMID is forgotten instead.
const MOST_COMMANDS: usize = 32;

/// Commands.
impl<P: Port> Smmu<P> {
    /// Forgets translations of a VMID, and waits for the accesses that used them.
    pub fn invalidate(&self, vmid: u16, start: u64, size: u64) {
        let mut queue = self.commands.lock();
        let pieces = Pieces::new(start, size, self.ids.range);
        // Without ranges, a whole address space has more pieces than anyone may count here.
        if pieces.clone().nth(MOST_COMMANDS).is_some() {
            self.push(&mut queue, Command::Vmid(vmid));
        } else {
            for (ipa, range) in pieces {
                self.push(&mut queue, Command::Pages { vmid, ipa, range });
            }
        }
        self.complete(&mut queue);
    }

    /// Issues commands and waits for all of them.
    pub(super) fn issue(&self, commands: &[Command]) {
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
            || (self.port.read(r::GERROR) ^ self.port.read(r::GERRORN)) & r::GERROR_CMDQ != 0;
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
            (
                Some((low_byte(count) - 1, low_byte(scale.into()))),
                count << scale,
            )
        } else {
            (None, 1)
        };
        self.page += pages;
        self.left -= pages;
        Some((ipa, range))
    }
}

/// A value that fits: counts of at most 31.
const fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}
