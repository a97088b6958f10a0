//! The virtual interrupt controller: accesses, lines and SGIs from all vCPUs, and what the hardware does to
//! list registers while guests run.

use std::collections::BTreeSet;
use std::ops::Range;

use arbitrary::{Result, Unstructured};
use el2::vgic::{CpuInterface, GicVersion, Kicks, Vgic};

/// The only interrupt with a physical one behind it: the virtual timer's.
const TIMER: u64 = 27;
/// ICH_HCR.EOIcount, GICH_HCR.EOIcount: the lowest bit.
const EOI_COUNT: u32 = 27;

struct Machine {
    version: GicVersion,
    vcpus: usize,
    vgic: Vgic,
    /// The virtual CPU interface of each vCPU that is in its guest.
    loaded: Vec<Option<CpuInterface>>,
    lists: u8,
    /// What a guest has made pending by ISPENDR and not acknowledged since: the vCPU whose private
    /// interrupt it is ([`SHARED`] for others), and its INTID.
    owed: BTreeSet<(usize, u64)>,
}

const SHARED: usize = usize::MAX;

/// Which vCPU's interrupt it is, as in [`Machine::owed`].
const fn owner(vcpu: usize, intid: u64) -> usize {
    if intid < 32 { vcpu } else { SHARED }
}

/// Runs one input.
pub(crate) fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(mut machine) = machine(&mut input) else {
        return;
    };
    while !input.is_empty() {
        if step(&mut input, &mut machine).is_err() {
            return;
        }
    }
    machine.drain();
}

fn machine(input: &mut Unstructured<'_>) -> Result<Machine> {
    let version = *input.choose(&[GicVersion::V2, GicVersion::V3])?;
    let vcpus = input.int_in_range(1..=8u8)?;
    let machine = Machine {
        version,
        vcpus: vcpus.into(),
        vgic: Vgic::new(version, vcpus),
        loaded: vec![None; vcpus.into()],
        lists: input.int_in_range(1..=16)?,
        owed: BTreeSet::new(),
    };
    if input.arbitrary()? {
        machine.enable_all();
    }
    Ok(machine)
}

fn step(input: &mut Unstructured<'_>, machine: &mut Machine) -> Result<()> {
    let vcpu = input.choose_index(machine.vcpus)?;
    let vgic = &machine.vgic;
    let kicks = match input.int_in_range(0..=9u8)? {
        0 => distributor(input, machine, vcpu)?,
        1 => redistributor(input, machine, vcpu)?,
        2 => vgic.sgi1r(vcpu, input.arbitrary()?),
        3 => {
            let kicks = vgic.set_spi(input.arbitrary::<u8>()?.into(), input.arbitrary()?);
            kicks.unwrap_or(Kicks::NONE)
        }
        4 => vgic.set_ppi(vcpu, input.arbitrary::<u8>()?.into(), input.arbitrary()?),
        5 | 6 => machine.enter_or_leave(vcpu),
        7 | 8 => {
            machine.guest_acts(vcpu, input)?;
            Kicks::NONE
        }
        _ => {
            machine.ask(vcpu, input.arbitrary()?);
            Kicks::NONE
        }
    };
    assert!(kicks.iter().all(|index| index < machine.vcpus), "{kicks:?}");
    machine.check();
    Ok(())
}

fn size(input: &mut Unstructured<'_>) -> Result<u8> {
    Ok(*input.choose(&[4, 4, 4, 1, 2, 8])?)
}

fn distributor(input: &mut Unstructured<'_>, machine: &mut Machine, vcpu: usize) -> Result<Kicks> {
    let vgic = &machine.vgic;
    let offset = match input.int_in_range(0..=3u8)? {
        0 => input.arbitrary::<u16>()?.into(),
        // Registers of the first interrupts: the others are alike.
        1 => u64::from(input.arbitrary::<u8>()?) << 7 & 0xf80,
        _ => {
            u64::from(input.arbitrary::<u8>()? & 0x1f) << 7
                | u64::from(input.arbitrary::<u8>()? & 0xf)
        }
    };
    let size = size(input)?;
    let before = vgic.dist_read(vcpu, offset, size);
    assert!(
        size == 8 || before >> (8 * size) == 0,
        "{before:#x} of {size} bytes"
    );
    let value = input.arbitrary()?;
    let kicks = vgic.dist_write(vcpu, offset, size, value);
    let first = if machine.version == GicVersion::V3 {
        32
    } else {
        0
    };
    machine.note(vcpu, first..1020, (offset, size, value));
    Ok(kicks)
}

fn redistributor(input: &mut Unstructured<'_>, machine: &mut Machine, of: usize) -> Result<Kicks> {
    let vgic = &machine.vgic;
    let offset =
        u64::from(input.arbitrary::<u16>()?) | if input.arbitrary()? { 0x1_0000 } else { 0 };
    let size = size(input)?;
    let before = vgic.redist_read(of, offset, size);
    assert!(
        size == 8 || before >> (8 * size) == 0,
        "{before:#x} of {size} bytes"
    );
    let value = input.arbitrary()?;
    let kicks = vgic.redist_write(of, offset, size, value);
    if let Some(offset) = offset.checked_sub(0x1_0000) {
        machine.note(of, 0..32, (offset, size, value));
    }
    Ok(kicks)
}

impl Machine {
    /// Both groups, every interrupt enabled.
    fn enable_all(&self) {
        let _: Kicks = self.vgic.dist_write(0, 0, 4, 3);
        for offset in (0x100..0x180).step_by(4) {
            let _: Kicks = self.vgic.dist_write(0, offset, 4, 0xffff_ffff);
        }
        for vcpu in 0..self.vcpus {
            let _: Kicks = match self.version {
                GicVersion::V2 => self.vgic.dist_write(vcpu, 0x100, 4, 0xffff_ffff),
                GicVersion::V3 => self.vgic.redist_write(vcpu, 0x1_0100, 4, 0xffff_ffff),
            };
        }
    }

    /// A write of a register that shows the interrupts `range`: what becomes pending by ISPENDR is owed
    /// until ICPENDR withdraws it; a change of the trigger leaves it unknown (IHI 0069H, GICD_ICFGR<n>).
    fn note(&mut self, vcpu: usize, range: Range<u64>, (offset, size, value): (u64, u8, u64)) {
        if size != 4 || !offset.is_multiple_of(4) {
            return;
        }
        let (first, count) = match offset {
            0x200..0x300 => ((offset & 0x7f) * 8, 32),
            0xc00..0xd00 => ((offset - 0xc00) * 4, 16),
            _ => return,
        };
        for bit in (0..count).filter(|bit| range.contains(&(first + bit))) {
            let interrupt = (owner(vcpu, first + bit), first + bit);
            let written = value >> bit & 1 != 0;
            match offset {
                // Those of a GICv2's SGIs are read-only.
                0x200..0x280
                    if written && (first + bit >= 16 || self.version == GicVersion::V3) =>
                {
                    self.owed.insert(interrupt);
                }
                0x200..0x280 => {}
                0x280..0x300 if !written => {}
                _ => {
                    self.owed.remove(&interrupt);
                }
            }
        }
    }

    fn enter_or_leave(&mut self, vcpu: usize) -> Kicks {
        match self.loaded[vcpu].take() {
            Some(mut interface) => self.vgic.save(vcpu, &mut interface),
            None => {
                let mut interface = CpuInterface::new(self.lists);
                self.vgic.load(vcpu, &mut interface);
                self.loaded[vcpu] = Some(interface);
                Kicks::NONE
            }
        }
    }

    fn state_shift(&self) -> u32 {
        match self.version {
            GicVersion::V2 => 28,
            GicVersion::V3 => 62,
        }
    }

    /// The guest acknowledges (pending to active) or ends (no longer active) what is in a list register, or
    /// ends something that is in none.
    fn guest_acts(&mut self, vcpu: usize, input: &mut Unstructured<'_>) -> Result<()> {
        let shift = self.state_shift();
        let Some(interface) = &mut self.loaded[vcpu] else {
            return Ok(());
        };
        let at = input.choose_index(16)?;
        match interface
            .lists
            .get_mut(..interface.used.into())
            .and_then(|used| used.get_mut(at))
        {
            Some(list) => match *list >> shift & 3 {
                1 => {
                    *list ^= 3 << shift;
                    let intid = *list & 0x3ff;
                    self.owed.remove(&(owner(vcpu, intid), intid));
                }
                _ => *list &= !(2 << shift),
            },
            None if interface.hcr >> EOI_COUNT < 31 => interface.hcr += 1 << EOI_COUNT,
            None => {}
        }
        Ok(())
    }

    fn ask(&mut self, vcpu: usize, reset: bool) {
        let _: bool = self.vgic.has_pending(vcpu);
        if reset && self.loaded.iter().all(Option::is_none) {
            self.vgic.reset();
            self.owed.clear();
            assert!((0..self.vcpus).all(|vcpu| !self.vgic.has_pending(vcpu)));
        }
    }

    /// No interrupt is in two list registers; those that are not in use are zero.
    fn check(&self) {
        let mut shared = Vec::new();
        for interface in self.loaded.iter().flatten() {
            let used = usize::from(interface.used);
            assert!(used <= usize::from(self.lists));
            assert!(interface.lists[used..].iter().all(|list| *list == 0));
            let mut seen = Vec::new();
            for list in &interface.lists[..used] {
                let intid = list & 0x3ff;
                assert!(!seen.contains(&intid), "{intid} is twice in one vCPU");
                assert!(!shared.contains(&intid), "{intid} is in two vCPUs");
                assert!(intid < 1020);
                let hardware = match self.version {
                    GicVersion::V2 => list >> 31 & 1,
                    GicVersion::V3 => list >> 61 & 1,
                };
                assert!(
                    hardware == 0 || intid == TIMER,
                    "{list:#x} ends another interrupt"
                );
                seen.push(intid);
            }
            shared.extend(seen.into_iter().filter(|intid| *intid >= 32));
        }
    }

    /// Guests that take whatever comes, with all lines low, come to an end: nothing is pending then.
    fn drain(&mut self) {
        for intid in 0..1020 {
            let _: Result<Kicks, _> = self.vgic.set_spi(intid, false);
            for vcpu in 0..self.vcpus {
                let _: Kicks = self.vgic.set_ppi(vcpu, intid, false);
            }
        }
        for vcpu in 0..self.vcpus {
            if self.loaded[vcpu].is_some() {
                let _: Kicks = self.enter_or_leave(vcpu);
            }
        }
        self.enable_all();
        self.target_first();
        for _ in 0..3 * (1020 + 32 * 8) {
            if (0..self.vcpus).all(|vcpu| !self.take_all(vcpu)) {
                break;
            }
        }
        let waiting = (0..self.vcpus).find(|vcpu| self.vgic.has_pending(*vcpu));
        assert_eq!(waiting, None, "an interrupt stays pending for ever");
        assert!(self.owed.is_empty(), "never came: {:?}", self.owed);
    }

    /// What is owed of the shared interrupts goes to vCPU 0, wherever it went.
    fn target_first(&self) {
        for (_, intid) in self.owed.iter().filter(|(owner, _)| *owner == SHARED) {
            let _: Kicks = match self.version {
                GicVersion::V2 => self.vgic.dist_write(0, 0x800 + intid, 1, 1),
                GicVersion::V3 => self.vgic.dist_write(0, 0x6000 + 8 * intid, 8, 0),
            };
        }
    }

    /// One run of a guest that acknowledges and ends all it sees; whether it saw something.
    fn take_all(&mut self, vcpu: usize) -> bool {
        let shift = self.state_shift();
        let mut interface = CpuInterface::new(self.lists);
        self.vgic.load(vcpu, &mut interface);
        for list in &mut interface.lists[..usize::from(interface.used)] {
            let intid = *list & 0x3ff;
            if *list >> shift & 1 != 0 {
                self.owed.remove(&(owner(vcpu, intid), intid));
            }
            *list &= !(3 << shift);
        }
        let _: Kicks = self.vgic.save(vcpu, &mut interface);
        interface.used != 0
    }
}
