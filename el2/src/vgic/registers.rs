//! The registers of distributor and redistributors.
//!
//! What is not listed here reads as zero and ignores writes, as do accesses of a width that a
//! register does not have (IHI 0048B 4.1, IHI 0069H 12.1). Bit maps and words take 32-bit accesses,
//! priorities and targets bytes, too, IROUTER and GICR_TYPER 64-bit ones.

use super::irq::{Irq, NOBODY};
use super::{GicVersion, Kicks, PRIVATE, SPIS, State, VCPUS, Vgic};

const CTLR: u64 = 0x0;
const TYPER: u64 = 0x4;
const IIDR: u64 = 0x8;
const GROUP: u64 = 0x80;
const SET_ENABLE: u64 = 0x100;
const CLEAR_ENABLE: u64 = 0x180;
const SET_PENDING: u64 = 0x200;
const CLEAR_PENDING: u64 = 0x280;
const SET_ACTIVE: u64 = 0x300;
const CLEAR_ACTIVE: u64 = 0x380;
const PRIORITY: u64 = 0x400;
const TARGETS: u64 = 0x800;
const CONFIG: u64 = 0xc00;
const CONFIG_END: u64 = 0xd00;
const SGIR: u64 = 0xf00;
const CLEAR_SGI: u64 = 0xf10;
const SET_SGI: u64 = 0xf20;
const SGI_END: u64 = 0xf30;
const ROUTER: u64 = 0x6100;
const ROUTER_END: u64 = ROUTER + 8 * SPIS as u64;
const PIDR2_V2: u64 = 0xfe8;
const PIDR2_V3: u64 = 0xffe8;

/// Redistributor: its second frame, with the registers of the private interrupts.
const SGI_FRAME: u64 = 0x1_0000;
const GICR_TYPER: u64 = 0x8;
const GICR_TYPER_HIGH: u64 = 0xc;
const GICR_IIDR: u64 = 0x4;

/// IIDR: implementer Arm, as everything that software might know to work around is absent.
const IIDR_VALUE: u64 = 0x43b;
/// GICD_CTLR of a GICv3: ARE and DS are always set (IHI 0069H 12.9.4).
const CTLR_ARE_DS: u64 = 1 << 4 | 1 << 6;
/// GICD_TYPER.ITLinesNumber: 1020 INTIDs.
const LINES: u64 = 31;
/// GICD_TYPER.IDbits: INTIDs have ten bits.
const ID_BITS: u64 = 9 << 19;

/// Bit-map registers, one bit an interrupt.
#[derive(Clone, Copy)]
enum Map {
    Group,
    Enable(bool),
    Pending(bool),
    Active(bool),
}

impl Map {
    /// The register at `offset` below [`PRIORITY`], and its first interrupt.
    fn at(offset: u64) -> Option<(Self, usize)> {
        let map = match offset & !0x7f {
            GROUP => Self::Group,
            SET_ENABLE => Self::Enable(true),
            CLEAR_ENABLE => Self::Enable(false),
            SET_PENDING => Self::Pending(true),
            CLEAR_PENDING => Self::Pending(false),
            SET_ACTIVE => Self::Active(true),
            CLEAR_ACTIVE => Self::Active(false),
            _ => return None,
        };
        let word = usize::try_from((offset & 0x7f) / 4).ok()?;
        Some((map, word * 32))
    }

    fn get(self, irq: &Irq) -> bool {
        match self {
            Self::Group => irq.is_group1(),
            Self::Enable(_) => irq.is_enabled(),
            Self::Pending(_) => irq.is_pending(),
            Self::Active(_) => irq.is_active(),
        }
    }

    fn set(self, irq: &mut Irq, bit: bool) {
        match self {
            Self::Group => irq.set_group1(bit),
            Self::Enable(to) if bit => irq.set_enabled(to),
            Self::Pending(to) if bit => irq.set_latch(to),
            Self::Active(to) if bit => irq.set_active(to),
            Self::Enable(_) | Self::Pending(_) | Self::Active(_) => {}
        }
    }
}

impl Vgic {
    /// A read of the distributor by `vcpu`: `size` bytes (1, 2, 4, 8) at `offset`.
    #[must_use]
    pub fn dist_read(&self, vcpu: usize, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (CTLR, 4) => {
                let enables = u64::from(self.state.lock().enabled);
                match self.version {
                    GicVersion::V2 => enables,
                    GicVersion::V3 => enables | CTLR_ARE_DS,
                }
            }
            (TYPER, 4) => self.typer(),
            (IIDR, 4) => IIDR_VALUE,
            (PIDR2_V2, 4) if self.version == GicVersion::V2 => 0x2b,
            (PIDR2_V3, 4) if self.version == GicVersion::V3 => 0x3b,
            _ => self.irq_read(vcpu, offset, size, Frame::Distributor),
        }
    }

    /// A write of the distributor.
    pub fn dist_write(&self, vcpu: usize, offset: u64, size: u8, value: u64) -> Kicks {
        match (offset, size) {
            (CTLR, 4) => self.enable_groups(value),
            (SGIR, 4) if self.version == GicVersion::V2 => self.sgir(vcpu, value),
            _ => self.irq_write(vcpu, (offset, size), value, Frame::Distributor),
        }
    }

    /// A read of vCPU `of`'s redistributor, both frames.
    #[must_use]
    pub fn redist_read(&self, of: usize, offset: u64, size: u8) -> u64 {
        let last = of + 1 == usize::from(self.vcpus);
        // Affinity in the upper half, processor number in 23:8, Last in bit 4 (IHI 0069H 12.11.34).
        let typer = (of as u64) << 32 | (of as u64) << 8 | u64::from(last) << 4;
        match (offset, size) {
            (GICR_TYPER, 8) => typer,
            (GICR_TYPER, 4) => typer & 0xffff_ffff,
            (GICR_TYPER_HIGH, 4) => typer >> 32,
            (GICR_IIDR, 4) => IIDR_VALUE,
            (PIDR2_V3, 4) => 0x3b,
            // GICR_WAKER: awake, always.
            (SGI_FRAME.., _) => self.irq_read(of, offset - SGI_FRAME, size, Frame::Private),
            _ => 0,
        }
    }

    /// A write of vCPU `of`'s redistributor.
    pub fn redist_write(&self, of: usize, offset: u64, size: u8, value: u64) -> Kicks {
        match offset.checked_sub(SGI_FRAME) {
            Some(offset) => self.irq_write(of, (offset, size), value, Frame::Private),
            None => Kicks::NONE,
        }
    }

    fn typer(&self) -> u64 {
        let cpus = u64::from(self.vcpus - 1) << 5;
        match self.version {
            GicVersion::V2 => LINES | cpus,
            // CPUNumber counts cores that can be targets without affinity routing: none.
            GicVersion::V3 => LINES | ID_BITS,
        }
    }

    fn enable_groups(&self, value: u64) -> Kicks {
        let mut state = self.state.lock();
        let enabled = value.to_le_bytes()[0] & 3;
        let changed = state.enabled != enabled;
        state.enabled = enabled;
        let mut kicks = Kicks::NONE;
        if changed {
            (0..self.vcpus).for_each(|vcpu| kicks.add(vcpu));
        }
        kicks
    }

    /// GICD_SGIR (IHI 0048B 4.3.15): filter in 25:24, targets in 23:16, SGI in 3:0.
    fn sgir(&self, vcpu: usize, value: u64) -> Kicks {
        let me = 1 << vcpu;
        let targets = match value >> 24 & 3 {
            0 => (value >> 16).to_le_bytes()[0],
            1 => !me,
            2 => me,
            _ => return Kicks::NONE,
        };
        self.send_sgi(vcpu, (value & 0xf) as usize, targets)
    }

    /// The interrupts whose state a register of this frame shows: private ones of a GICv3 are in
    /// the redistributor only, shared ones in the distributor only.
    fn shows(&self, frame: Frame, number: usize) -> bool {
        match frame {
            Frame::Private => number < PRIVATE,
            Frame::Distributor => {
                number < PRIVATE + SPIS && (number >= PRIVATE || self.version == GicVersion::V2)
            }
        }
    }

    fn irq_read(&self, vcpu: usize, offset: u64, size: u8, frame: Frame) -> u64 {
        let Some(register) = Register::at(offset, size, self.version) else {
            return 0;
        };
        let state = self.state.lock();
        let mut value = 0;
        for (number, shift) in register.interrupts() {
            if self.shows(frame, number) {
                value |= self.field(&state, vcpu, number, register.kind) << shift;
            }
        }
        value
    }

    fn field(&self, state: &State, vcpu: usize, number: usize, kind: Kind) -> u64 {
        let irq = state.irq(vcpu, number);
        match kind {
            Kind::Map(map) => u64::from(map.get(irq)),
            Kind::Priority => u64::from(irq.priority()),
            // Of a private interrupt: the reader itself.
            Kind::Targets if number < PRIVATE => 1 << vcpu,
            Kind::Targets => u64::from(irq.route()),
            Kind::Config => u64::from(irq.is_edge()) << 1,
            Kind::Sgi(_) => u64::from(irq.sources()),
            Kind::Router if irq.route() == NOBODY => 0xff,
            Kind::Router => u64::from(irq.route()),
        }
    }

    fn irq_write(&self, vcpu: usize, (offset, size): (u64, u8), value: u64, frame: Frame) -> Kicks {
        let Some(register) = Register::at(offset, size, self.version) else {
            return Kicks::NONE;
        };
        let mut kicks = Kicks::NONE;
        let mut state = self.state.lock();
        for (number, shift) in register.interrupts() {
            if !self.shows(frame, number) {
                continue;
            }
            let before = state.irq(vcpu, number).target(self.version);
            let changed = self.change_in(&mut state, vcpu, number, |irq| {
                self.set_field(irq, number, register.kind, value >> shift);
            });
            kicks.0 |= changed.0;
            if changed != Kicks::NONE && number >= PRIVATE {
                kicks.add(before);
            }
        }
        kicks
    }

    fn set_field(&self, irq: &mut Irq, number: usize, kind: Kind, value: u64) {
        let byte = value.to_le_bytes()[0];
        let implemented = 0xff >> (VCPUS - usize::from(self.vcpus));
        match kind {
            // SGIs of a GICv2 are set and cleared with their senders only, and always enabled
            // as far as the guest can see.
            Kind::Map(Map::Pending(_)) if number < 16 && self.version == GicVersion::V2 => {}
            Kind::Map(map) => map.set(irq, value & 1 != 0),
            Kind::Priority => irq.set_priority(byte),
            Kind::Targets if number < PRIVATE => {}
            Kind::Targets => irq.set_route(byte & implemented),
            // Private ones have a fixed trigger (Arm IHI 0069, GICR_ICFGR1: the implementation's
            // choice); what is asserted of the timer's is what keeps the physical one quiet.
            Kind::Config if number < PRIVATE => {}
            Kind::Config => irq.set_edge(value & 2 != 0),
            Kind::Sgi(true) => bits_of(byte & implemented).for_each(|from| irq.add_source(from)),
            Kind::Sgi(false) => irq.clear_sources(byte),
            Kind::Router => irq.set_route(self.route(value)),
        }
    }

    /// GICD_IROUTER: any vCPU (bit 31) is the first one; an affinity that no vCPU has is nobody.
    fn route(&self, value: u64) -> u8 {
        if value & 1 << 31 != 0 {
            0
        } else if value & 0xff_00ff_ffff < u64::from(self.vcpus) {
            value.to_le_bytes()[0]
        } else {
            NOBODY
        }
    }
}

fn bits_of(byte: u8) -> impl Iterator<Item = usize> {
    (0..8).filter(move |bit| byte & 1 << bit != 0)
}

/// Which frame is accessed.
#[derive(Clone, Copy)]
enum Frame {
    Distributor,
    Private,
}

/// What a field of a register is.
#[derive(Clone, Copy)]
enum Kind {
    Map(Map),
    Priority,
    Targets,
    Config,
    /// SPENDSGIR (true) or CPENDSGIR.
    Sgi(bool),
    Router,
}

/// The part of a register that an access touches: `count` fields of `width` bits.
#[derive(Clone, Copy)]
struct Register {
    kind: Kind,
    first: usize,
    count: usize,
    width: usize,
}

impl Register {
    fn at(offset: u64, size: u8, version: GicVersion) -> Option<Self> {
        let bytes = usize::from(size);
        let at = usize::try_from(offset).ok()?;
        if !at.is_multiple_of(bytes) {
            return None;
        }
        let by_byte = |kind, base: u64| {
            let first = at - usize::try_from(base).ok()?;
            (size <= 4).then_some(Self {
                kind,
                first,
                count: bytes,
                width: 8,
            })
        };
        let v2 = version == GicVersion::V2;
        match offset {
            GROUP..PRIORITY if size == 4 => {
                let (map, first) = Map::at(offset)?;
                Some(Self {
                    kind: Kind::Map(map),
                    first,
                    count: 32,
                    width: 1,
                })
            }
            PRIORITY..TARGETS => by_byte(Kind::Priority, PRIORITY),
            TARGETS..CONFIG if v2 => by_byte(Kind::Targets, TARGETS),
            CONFIG..CONFIG_END if size == 4 => Some(Self {
                kind: Kind::Config,
                first: (at - usize::try_from(CONFIG).ok()?) * 4,
                count: 16,
                width: 2,
            }),
            CLEAR_SGI..SET_SGI if v2 => by_byte(Kind::Sgi(false), CLEAR_SGI),
            SET_SGI..SGI_END if v2 => by_byte(Kind::Sgi(true), SET_SGI),
            ROUTER..ROUTER_END if !v2 && size == 8 => Some(Self {
                kind: Kind::Router,
                first: PRIVATE + (at - usize::try_from(ROUTER).ok()?) / 8,
                count: 1,
                width: 64,
            }),
            _ => None,
        }
    }

    /// Each interrupt with the position of its field.
    fn interrupts(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.count).map(move |n| (self.first + n, n * self.width))
    }
}
