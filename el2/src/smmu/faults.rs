//! What devices were refused.

use super::driver::{Events, Faults, MAX_FUNCTIONS, Owner, Port, Smmu};
use super::event::{EVENT_WORDS, Event, describe};
use super::register as r;

/// Most events handled at once.
const EVENTS_AT_ONCE: usize = 16;

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
        let flag = produced & r::OVERFLOW;
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
