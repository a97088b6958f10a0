//! One interrupt.

use super::GicVersion;

/// No vCPU.
pub(super) const NOBODY: u8 = 0xff;

const ENABLED: u8 = 1 << 0;
/// Pending by an edge, an SGI, or the guest's own ISPENDR.
const LATCH: u8 = 1 << 1;
const LINE: u8 = 1 << 2;
const ACTIVE: u8 = 1 << 3;
const EDGE: u8 = 1 << 4;
const GROUP1: u8 = 1 << 5;
/// A software-generated interrupt: senders are remembered.
const SGI: u8 = 1 << 6;
/// The line goes low when the guest ends the interrupt, and the host is told.
const UNTIL_END: u8 = 1 << 7;

/// [`LATCH`] and [`ACTIVE`] in `extra`: another vCPU has written them since the interrupt is in a list
/// register, which does not know; what was written counts.
const KEPT: u8 = (LATCH | ACTIVE) << 4;

/// State of one interrupt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Irq {
    flags: u8,
    /// 0 is the highest; the five upper bits are implemented.
    priority: u8,
    /// GICv2: a set of vCPUs; GICv3: a vCPU's number, 0xff for an affinity that nobody has.
    route: u8,
    /// SGIs of a GICv2: senders whose request is pending.
    sources: u8,
    /// Bits 2:0: SGIs of a GICv2, the sender of the one that is active. Upper half: [`KEPT`].
    extra: u8,
    /// The vCPU in whose list registers it is.
    holder: u8,
}

impl Irq {
    const RESET: Self = Self {
        flags: 0,
        priority: 0,
        route: 0,
        sources: 0,
        extra: 0,
        holder: NOBODY,
    };
    pub(super) const SPI: Self = Self::RESET;
    pub(super) const PPI: Self = Self::RESET;
    pub(super) const SGI: Self = Self {
        flags: SGI | EDGE,
        ..Self::RESET
    };

    const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    const fn put(&mut self, flag: u8, value: bool) {
        if value {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
    }

    pub(super) const fn is_active(self) -> bool {
        self.has(ACTIVE)
    }

    /// Asserted by its line, or active.
    pub(super) const fn is_in_flight(self) -> bool {
        self.has(LINE) || self.has(ACTIVE)
    }

    pub(super) const fn is_edge(self) -> bool {
        self.has(EDGE)
    }

    pub(super) const fn is_enabled(self) -> bool {
        self.has(ENABLED)
    }

    pub(super) const fn is_group1(self) -> bool {
        self.has(GROUP1)
    }

    pub(super) const fn holder(self) -> u8 {
        self.holder
    }

    pub(super) const fn priority(self) -> u8 {
        self.priority
    }

    /// Pending: latched, or level-triggered with its line high.
    pub(super) const fn is_pending(self) -> bool {
        self.has(LATCH) || (self.has(LINE) && !self.has(EDGE))
    }

    /// Anything to keep track of.
    pub(super) const fn is_live(self) -> bool {
        self.is_pending() || self.has(ACTIVE) || self.has(LINE) || self.holder != NOBODY
    }

    /// Pending, enabled, its group enabled (`groups`: bit 0 group 0, bit 1 group 1), not active.
    pub(super) const fn is_deliverable(self, groups: u8) -> bool {
        self.is_pending() && !self.has(ACTIVE) && self.may_signal(groups)
    }

    /// Belongs into a list register of its vCPU, and is in none.
    #[inline]
    pub(super) const fn is_for_list(self, groups: u8) -> bool {
        self.holder == NOBODY && (self.has(ACTIVE) || self.is_deliverable(groups))
    }

    /// Enabled, and its group, too.
    pub(super) const fn may_signal(self, groups: u8) -> bool {
        self.has(ENABLED) && groups & 1 << (self.has(GROUP1) as u8) != 0
    }

    /// The vCPU that a shared interrupt goes to, [`NOBODY`] if none: of several the first.
    pub(super) const fn target(self, version: GicVersion) -> u8 {
        match version {
            GicVersion::V3 => self.route,
            GicVersion::V2 if self.route == 0 => NOBODY,
            GicVersion::V2 => self.route.trailing_zeros().to_le_bytes()[0],
        }
    }

    pub(super) const fn route(self) -> u8 {
        self.route
    }

    pub(super) const fn set_route(&mut self, route: u8) {
        self.route = route;
    }

    pub(super) const fn set_priority(&mut self, priority: u8) {
        self.priority = priority & 0xf8;
    }

    pub(super) const fn set_enabled(&mut self, enabled: bool) {
        self.put(ENABLED, enabled);
    }

    pub(super) const fn set_group1(&mut self, group1: bool) {
        self.put(GROUP1, group1);
    }

    pub(super) const fn set_edge(&mut self, edge: bool) {
        if !self.has(SGI) {
            self.put(EDGE, edge);
        }
    }

    /// ISACTIVER and ICACTIVER, and an end without a list register. One in a list register is not made
    /// active: the guest may end it there before it comes back, and nobody would end it again.
    pub(super) const fn set_active(&mut self, active: bool) {
        if self.holder != NOBODY && !active {
            // Its request may not have been offered: once too often is better than never.
            let kept = if self.has(EDGE) {
                ACTIVE
            } else {
                ACTIVE | LATCH
            };
            self.extra |= kept << 4;
        }
        self.put(ACTIVE, active);
    }

    /// A device sets its line: a rising edge latches an edge-triggered interrupt.
    pub(super) const fn set_line(&mut self, level: bool) {
        self.put(UNTIL_END, false);
        if self.has(EDGE) {
            if level {
                self.put(LATCH, true);
            }
        } else {
            self.put(LINE, level);
        }
    }

    /// A device's line is high until the guest has ended the interrupt.
    pub(super) const fn set_line_until_end(&mut self) {
        self.set_line(true);
        self.put(UNTIL_END, true);
    }

    /// Lowers a line that was high until now, if the guest has ended the interrupt; says whether it
    /// was such a one.
    pub(super) const fn lower_at_end(&mut self) -> bool {
        let ends = self.has(UNTIL_END) && !self.has(ACTIVE);
        if ends {
            self.put(UNTIL_END | LINE, false);
        }
        ends
    }

    /// ISPENDR and ICPENDR: the guest's own request, or its withdrawal. A line that is high keeps
    /// the interrupt pending; SGIs of a GICv2 have registers of their own.
    pub(super) const fn set_latch(&mut self, pending: bool) {
        if self.holder != NOBODY {
            self.extra |= LATCH << 4;
        }
        self.put(LATCH, pending);
        if !pending {
            self.sources = 0;
        }
    }

    /// An SGI of this sender.
    pub(super) const fn add_source(&mut self, from: usize) {
        self.sources |= 1 << (from & 7);
        self.put(LATCH, true);
    }

    /// Senders whose SGI is pending.
    pub(super) const fn sources(self) -> u8 {
        self.sources
    }

    pub(super) const fn clear_sources(&mut self, sources: u8) {
        self.sources &= !sources;
        self.put(LATCH, self.sources != 0);
    }

    /// The next sender whose SGI is to be delivered.
    pub(super) const fn next_source(self) -> u8 {
        if self.has(ACTIVE) {
            self.extra
        } else if self.sources == 0 {
            0
        } else {
            self.sources.trailing_zeros().to_le_bytes()[0]
        }
    }

    /// Goes into a list register of `vcpu`. What is latched is in the register from now on.
    pub(super) const fn take(&mut self, vcpu: u8, version: GicVersion) {
        self.holder = vcpu;
        if self.has(SGI) && matches!(version, GicVersion::V2) {
            let source = self.next_source();
            if !self.has(ACTIVE) {
                self.sources &= !(1 << source);
                self.put(LATCH, self.sources != 0);
                self.extra = source;
            }
        } else if self.has(EDGE) {
            self.put(LATCH, false);
            self.sources = 0;
        }
    }

    /// Goes into a list register of `vcpu` only as active.
    pub(super) const fn hold(&mut self, vcpu: u8) {
        self.holder = vcpu;
    }

    /// Comes back from a list register in which it is now `pending` and `active`.
    pub(super) const fn release(&mut self, pending: bool, active: bool, version: GicVersion) {
        self.holder = NOBODY;
        let before = self.flags;
        let was_active = self.has(ACTIVE);
        self.put(ACTIVE, active);
        if self.has(EDGE) {
            if pending {
                self.put(LATCH, true);
                if self.has(SGI) && matches!(version, GicVersion::V2) {
                    self.sources |= 1 << (self.extra & 7);
                }
            }
        } else if !pending && !was_active {
            // A level-triggered one that the guest has taken: its own request is served. One that went
            // in as active was not offered as pending: its request waits for the end.
            self.put(LATCH, false);
        }
        if self.extra & KEPT != 0 {
            let kept = self.extra >> 4;
            self.flags = self.flags & !kept | before & kept;
            self.extra &= !KEPT;
        }
    }

    /// Whether an end of this interrupt must be told: something else waits behind it.
    pub(super) const fn wants_end(self) -> bool {
        if self.has(EDGE) {
            self.has(SGI) && self.sources != 0
        } else {
            self.has(LINE) || (self.has(LATCH) && self.has(ACTIVE))
        }
    }
}
