//! The physical interrupt controller, as far as EL2 uses it: the virtual CPU interface, one SGI to
//! fetch a vCPU out of its guest, and the guest timer's interrupt.
//!
//! Everything else is the host's. Sources: GICv2 (Arm IHI 0048B), GICv3 and v4 (IHI 0069H).

use abi::{GUEST_TIMER_PPI, KICK_SGI};
use board::uart::UartRegs;
use board::{AddrRange, Gic};
use el2::core_interrupts::{self, CoreGic};
use el2::redistributor;
use el2::vgic::{CpuInterface, GicVersion};

use super::cpu::CpuData;
use super::instructions::isb;
use super::mmio::Mmio;
use super::regs::{mrs, msr};

/// The controller.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PhysicalGic {
    /// None that can serve guests, and why.
    None(&'static str),
    /// GICv2 with its virtualization extensions.
    V2(V2),
    /// GICv3 or v4.
    V3(V3),
}

/// GICv2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct V2 {
    gicd: AddrRange,
    gicc: AddrRange,
    gich: AddrRange,
    gicv: AddrRange,
    lists: u8,
}

/// GICv3.
#[derive(Clone, Copy, Debug)]
pub(crate) struct V3 {
    gicd: AddrRange,
    gicr: AddrRange,
    /// End of the last redistributor, and the bytes of each.
    gicr_end: u64,
    stride: u64,
    lists: u8,
    /// Active-priority registers per group: 1, 2 or 4.
    priorities: u8,
}

const GICH_HCR: usize = 0x0;
const GICH_VTR: usize = 0x4;
const GICH_VMCR: usize = 0x8;
const GICH_MISR: usize = 0x10;
const GICH_APR: usize = 0xf0;
const GICH_LR: usize = 0x100;
const GICC_HPPIR: usize = 0x18;
const GICD_ISACTIVER: usize = 0x300;
const GICD_ICACTIVER: usize = 0x380;
const GICD_SGIR: usize = 0xf00;
const GICD_CPENDSGIR: usize = 0xf10;
/// Where [`KICK_SGI`] is in it.
const KICK_BYTE: usize = KICK_SGI as usize;
/// From the frame of the private interrupts.
const GICR_ICPENDR0: usize = 0x280;
const GICR_SGI_FRAME: u64 = 0x1_0000;
const GICR_TYPER_HIGH: usize = 0xc;
const GICR_CTLR: usize = 0x0;
const GICR_TYPER: usize = 0x8;
/// GICR_TYPER.Last.
const LAST: u32 = 1 << 4;
const TIMER_BIT: u32 = 1 << GUEST_TIMER_PPI;

/// ICC_SRE_EL2 while a guest is loaded: SRE, DFB, DIB.
const SRE_GUEST: u64 = 0x7;

/// Bits of an INTID in GICC_HPPIR.
const INTID_V2: u32 = 0x3ff;

/// Does something with each of the first `$used` list registers ICH_LR<n>_EL2 and its value in memory.
/// Their numbers are in the instruction, so this is a sequence, which ends early.
macro_rules! each_list {
    ($interface:expr, $do:ident) => {{
        let used = usize::from($interface.used);
        each_list!($interface, used, $do, 0 "s3_4_c12_c12_0", 1 "s3_4_c12_c12_1", 2 "s3_4_c12_c12_2",
            3 "s3_4_c12_c12_3", 4 "s3_4_c12_c12_4", 5 "s3_4_c12_c12_5", 6 "s3_4_c12_c12_6",
            7 "s3_4_c12_c12_7", 8 "s3_4_c12_c13_0", 9 "s3_4_c12_c13_1", 10 "s3_4_c12_c13_2",
            11 "s3_4_c12_c13_3", 12 "s3_4_c12_c13_4", 13 "s3_4_c12_c13_5", 14 "s3_4_c12_c13_6",
            15 "s3_4_c12_c13_7")
    }};
    ($interface:expr, $used:ident, $do:ident, $($n:literal $name:literal),+) => {
        'all: {
            $(
                if $n >= $used {
                    break 'all;
                }
                $do!($name, $interface.lists[$n]);
            )+
        }
    };
}

/// Active-priority registers ICH_AP0R<n>_EL2 and ICH_AP1R<n>_EL2.
macro_rules! priority_registers {
    ($do:ident, $group:expr, $n:expr) => {
        match ($group, $n) {
            (0, 0) => $do!("s3_4_c12_c8_0"),
            (0, 1) => $do!("s3_4_c12_c8_1"),
            (0, 2) => $do!("s3_4_c12_c8_2"),
            (0, _) => $do!("s3_4_c12_c8_3"),
            (_, 0) => $do!("s3_4_c12_c9_0"),
            (_, 1) => $do!("s3_4_c12_c9_1"),
            (_, 2) => $do!("s3_4_c12_c9_2"),
            (_, _) => $do!("s3_4_c12_c9_3"),
        }
    };
}

impl PhysicalGic {
    /// Looks at what the device tree names.
    pub(crate) fn probe(gic: Option<&Gic>, has_sysregs: bool) -> Self {
        match gic {
            Some(&Gic::V3 { gicd, gicr }) if has_sysregs => {
                let vtr = mrs!("s3_4_c12_c11_1"); // ICH_VTR_EL2
                let preemption_bits = (vtr >> 26 & 7) as u32 + 1;
                let (gicr_end, stride) = redistributors(gicr);
                Self::V3(V3 {
                    gicd,
                    gicr,
                    gicr_end,
                    stride,
                    lists: (vtr & 0xf) as u8 + 1,
                    priorities: 1 << preemption_bits.saturating_sub(5).min(2),
                })
            }
            Some(&Gic::V3 { .. }) => Self::None("a GICv3 whose registers the core does not have"),
            Some(&Gic::V2 {
                gicd,
                gicc,
                gich: Some(gich),
                gicv: Some(gicv),
            }) => {
                if !gicv.start().is_multiple_of(board::PAGE_SIZE) {
                    return Self::None("GICV shares its page with something else");
                }
                if gicv.size() < board::PAGE_SIZE {
                    return Self::None("GICV is smaller than a page");
                }
                let vtr = Mmio::gic(gich.start()).read(GICH_VTR);
                Self::V2(V2 {
                    gicd,
                    gicc,
                    gich,
                    gicv,
                    lists: ((vtr & 0x3f) as u8 + 1).min(16),
                })
            }
            Some(&Gic::V2 { .. }) => Self::None("a GICv2 without virtualization extensions"),
            None => Self::None("the device tree names no interrupt controller that EL2 knows"),
        }
    }

    /// Registers that EL2 maps.
    pub(crate) fn mapped(gic: Option<&Gic>) -> impl Iterator<Item = AddrRange> {
        let ranges = match gic {
            Some(&Gic::V2 {
                gicd, gicc, gich, ..
            }) => [Some(gicd), Some(gicc), gich],
            Some(&Gic::V3 { gicd, gicr }) => [Some(gicd), Some(gicr), None],
            None => [None; 3],
        };
        ranges.into_iter().flatten().map(AddrRange::grow_to_pages)
    }

    /// Registers that no guest may get, and the host loses those of the virtual interface.
    pub(crate) fn owned(&self) -> [Option<AddrRange>; 3] {
        match self {
            Self::None(_) => [None; 3],
            Self::V2(v2) => [Some(v2.gicd), Some(v2.gicc), Some(v2.gich)],
            Self::V3(v3) => [Some(v3.gicd), Some(v3.gicr), None],
        }
    }

    /// What the host does not reach: GICv2's control registers of the virtual interface, which are
    /// EL2's; GICv3's redistributors, whose registers it accesses by [`Self::host_access`].
    pub(crate) fn private(&self) -> Option<AddrRange> {
        match self {
            Self::V2(v2) => Some(v2.gich.grow_to_pages()),
            Self::V3(v3) => Some(v3.gicr.grow_to_pages()),
            Self::None(_) => None,
        }
    }

    /// Makes an access of the host to a redistributor, as far as it may: the value read. `None` where
    /// there is none, or for a size that it does not take.
    pub(crate) fn host_access(&self, address: u64, size: u8, write: Option<u64>) -> Option<u64> {
        let Self::V3(v3) = self else {
            return None;
        };
        let offset = address.checked_sub(v3.gicr.start())? % v3.stride;
        let end = address.checked_add(size.into())?;
        if end > v3.gicr_end {
            return None;
        }
        match size {
            1 if redistributor::has_bytes(offset) => Some(byte_access(address, write)),
            4 => Some(word_access(address, offset, write)),
            8 => {
                let high = write.map(|value| value >> 32);
                let low = word_access(address, offset, write);
                Some(low | word_access(address + 4, offset + 4, high) << 32)
            }
            _ => None,
        }
    }

    /// GICv2's virtual CPU interface, which guests get as their GICC: two pages (IHI 0048B 5.5), or
    /// as much of it as there is; what lies behind it is not the guests'.
    pub(crate) fn guest_interface(&self) -> Option<AddrRange> {
        match self {
            Self::V2(v2) => {
                let there = v2.gicv.size() - v2.gicv.size() % board::PAGE_SIZE;
                AddrRange::with_size(v2.gicv.start(), there.min(2 * board::PAGE_SIZE))
            }
            Self::None(_) | Self::V3(_) => None,
        }
    }

    /// 2 or 3; 0 if there are no guests on this machine.
    pub(crate) const fn version(&self) -> u8 {
        match self {
            Self::None(_) => 0,
            Self::V2(_) => 2,
            Self::V3(_) => 3,
        }
    }

    /// A vCPU's interface after reset.
    pub(crate) const fn new_interface(&self) -> CpuInterface {
        CpuInterface::new(match self {
            Self::None(_) => 1,
            Self::V2(v2) => v2.lists,
            Self::V3(v3) => v3.lists,
        })
    }

    /// This core's frame of private interrupts.
    fn private_frame(&self, cpu: &CpuData) -> Option<Mmio> {
        match self {
            Self::None(_) => None,
            // Banked: each core sees its own.
            Self::V2(v2) => Some(Mmio::gic(v2.gicd.start())),
            Self::V3(v3) => v3.redistributor(cpu.mpidr),
        }
    }

    /// Makes this core take the private interrupts that EL2 needs, once after it has been turned on.
    #[inline]
    pub(crate) fn prepare_cpu(&self, cpu: &CpuData) {
        if cpu.gic_frame.load(core::sync::atomic::Ordering::Relaxed) == 0 {
            self.prepare(cpu);
        }
    }

    #[cold]
    #[inline(never)]
    fn prepare(&self, cpu: &CpuData) {
        use core::sync::atomic::Ordering;
        let Some(frame) = self.private_frame(cpu) else {
            return;
        };
        let base = frame.base();
        let target = core_interrupts::prepare(&ThisCore(self, frame));
        cpu.gic_target.store(target, Ordering::Relaxed);
        cpu.gic_frame.store(base, Ordering::Relaxed);
    }

    /// Makes the guest timer's physical interrupt active, so that it does not fire, or not.
    pub(crate) fn set_timer_active(&self, cpu: &CpuData, active: bool) {
        use core::sync::atomic::Ordering;
        if cpu.timer_active.load(Ordering::Relaxed) == active {
            return;
        }
        cpu.timer_active.store(active, Ordering::Relaxed);
        let base = cpu.gic_frame.load(Ordering::Relaxed);
        if base != 0 {
            let register = if active {
                GICD_ISACTIVER
            } else {
                GICD_ICACTIVER
            };
            Mmio::gic(base).write(register, TIMER_BIT);
        }
    }

    /// The guest's end of the timer's interrupt has deactivated the physical one behind it.
    pub(crate) fn timer_was_ended(&self, cpu: &CpuData, interface: &CpuInterface) {
        use core::sync::atomic::Ordering;
        let version = match self {
            Self::V3(_) => GicVersion::V3,
            Self::V2(_) | Self::None(_) => GicVersion::V2,
        };
        if cpu.timer_active.load(Ordering::Relaxed) && interface.has_ended(GUEST_TIMER_PPI, version)
        {
            cpu.timer_active.store(false, Ordering::Relaxed);
        }
    }

    /// Whether the guest timer's physical interrupt can be what interrupted: it is not active.
    pub(crate) fn timer_may_fire(&self, cpu: &CpuData) -> bool {
        !cpu.timer_active.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Interrupts the core with this affinity.
    pub(crate) fn kick(&self, target: &CpuData) {
        super::mem::data_barrier();
        match self {
            Self::None(_) => {}
            Self::V2(v2) => {
                // Zero for a core that has never run a vCPU: nobody waits there.
                let target = target
                    .gic_target
                    .load(core::sync::atomic::Ordering::Relaxed);
                let targets = u32::from(target) << 16;
                Mmio::gic(v2.gicd.start()).write(GICD_SGIR, targets | KICK_SGI);
            }
            Self::V3(_) => {
                // ICC_SGI1R_EL1
                msr!(
                    "s3_0_c12_c11_5",
                    target.sgi_target | u64::from(KICK_SGI) << 24
                );
                isb();
            }
        }
    }

    /// Takes EL2's own SGI, if it is what is pending; anything else is the host's and stays.
    ///
    /// It is not acknowledged: by then a more urgent interrupt may be the one that acknowledging
    /// takes, and the host would never see that. Its pending state is withdrawn instead.
    pub(crate) fn take_kick(&self, cpu: &CpuData) -> bool {
        let highest = match self {
            Self::None(_) => return false,
            Self::V2(v2) => Mmio::gic(v2.gicc.start()).read(GICC_HPPIR) & INTID_V2,
            // With HCR_EL2.IMO set this means the physical interface at EL2: ICC_HPPIR1_EL1.
            Self::V3(_) => mrs!("s3_0_c12_c12_2") as u32,
        };
        let base = cpu.gic_frame.load(core::sync::atomic::Ordering::Relaxed);
        if highest != KICK_SGI || base == 0 {
            return false;
        }
        let frame = Mmio::gic(base);
        match self {
            // A byte an SGI, a bit a sender.
            Self::V2(_) => frame.write(
                GICD_CPENDSGIR + KICK_BYTE / 4 * 4,
                0xff << (KICK_BYTE % 4 * 8),
            ),
            Self::None(_) | Self::V3(_) => frame.write(GICR_ICPENDR0, 1 << KICK_SGI),
        }
        // What the sender changed before is looked at behind this.
        super::mem::data_barrier();
        true
    }

    /// Whether the virtual interface asks for maintenance.
    pub(crate) fn maintenance_pending(&self) -> bool {
        match self {
            Self::None(_) => false,
            Self::V2(v2) => Mmio::gic(v2.gich.start()).read(GICH_MISR) != 0,
            Self::V3(_) => mrs!("s3_4_c12_c11_2") != 0, // ICH_MISR_EL2
        }
    }

    /// Loads a vCPU's interface.
    pub(crate) fn enter(&self, interface: &CpuInterface) {
        match self {
            Self::None(_) => {}
            Self::V2(v2) => v2.enter(interface),
            Self::V3(_) => enter_lists(interface),
        }
    }

    /// Reads a vCPU's list registers back; the interface is off then.
    pub(crate) fn leave(&self, interface: &mut CpuInterface) {
        match self {
            Self::None(_) => {}
            Self::V2(v2) => v2.leave(interface),
            Self::V3(_) => leave_lists(interface),
        }
    }

    /// Loads what only the guest changes: its masks and running priorities.
    pub(crate) fn load(&self, interface: &CpuInterface) {
        match self {
            Self::None(_) => {}
            Self::V2(v2) => {
                let gich = Mmio::gic(v2.gich.start());
                gich.write(GICH_VMCR, interface.vmcr);
                gich.write(GICH_APR, interface.active_priorities[0][0]);
            }
            Self::V3(v3) => v3.load(interface),
        }
    }

    /// Saves it.
    pub(crate) fn unload(&self, interface: &mut CpuInterface) {
        match self {
            Self::None(_) => {}
            Self::V2(v2) => {
                let gich = Mmio::gic(v2.gich.start());
                interface.vmcr = gich.read(GICH_VMCR);
                interface.active_priorities[0][0] = gich.read(GICH_APR);
            }
            Self::V3(v3) => v3.unload(interface),
        }
    }
}

/// The core that we are on, and the frame of its private interrupts.
struct ThisCore<'a>(&'a PhysicalGic, Mmio);

impl CoreGic for ThisCore<'_> {
    fn read(&self, offset: usize) -> u32 {
        self.1.read(offset)
    }

    fn write(&self, offset: usize, value: u32) {
        self.1.write(offset, value);
    }

    fn empty_lists(&self) {
        let mut all = self.0.new_interface().in_use();
        self.0.leave(&mut all);
    }
}

/// End of the last redistributor of a region, and the bytes of each. None uses tables behind this.
fn redistributors(gicr: AddrRange) -> (u64, u64) {
    let typer = |base: u64| Mmio::gic(base).read(GICR_TYPER);
    let stride = redistributor::stride(typer(gicr.start()));
    let mut base = gicr.start();
    turn_lpis_off(base);
    while base + 2 * stride <= gicr.end() && typer(base) & LAST == 0 {
        base += stride;
        turn_lpis_off(base);
    }
    (base + stride, stride)
}

/// Some redistributors can't turn them off again (IHI 0069H 12.11.2, GICR_CTLR.EnableLPIs).
fn turn_lpis_off(redistributor: u64) {
    const ENABLE_LPIS: u32 = 1;
    let registers = Mmio::gic(redistributor);
    let control = registers.read(GICR_CTLR);
    if control & ENABLE_LPIS == 0 {
        return;
    }
    registers.write(GICR_CTLR, control & !ENABLE_LPIS);
    if registers.read(GICR_CTLR) & ENABLE_LPIS != 0 {
        log::error!(
            "redistributor {redistributor:#x} uses the tables of whoever booted this: not isolated"
        );
    }
}

/// A 32-bit access to a redistributor.
fn word_access(address: u64, offset: u64, write: Option<u64>) -> u64 {
    let register = Mmio::gic(address);
    let Some(value) = write else {
        let bits = redistributor::readable(offset);
        return if bits == 0 {
            0
        } else {
            u64::from(register.read(0) & bits)
        };
    };
    if let Some(bits) = redistributor::writable(offset) {
        register.write(0, value as u32 & bits);
    }
    0
}

/// An access to a byte of the priorities, which nobody else writes at the same time: they are those
/// of one core.
fn byte_access(address: u64, write: Option<u64>) -> u64 {
    let (register, shift) = (Mmio::gic(address & !3), address % 4 * 8);
    let word = register.read(0);
    let Some(value) = write else {
        return u64::from(word >> shift & 0xff);
    };
    let byte = (value as u32 & 0xff) << shift;
    register.write(0, word & !(0xff << shift) | byte);
    0
}

impl V2 {
    fn enter(&self, interface: &CpuInterface) {
        let gich = Mmio::gic(self.gich.start());
        for (n, list) in interface
            .lists
            .iter()
            .enumerate()
            .take(interface.used.into())
        {
            gich.write(GICH_LR + 4 * n, *list as u32);
        }
        gich.write(GICH_HCR, interface.hcr);
    }

    fn leave(&self, interface: &mut CpuInterface) {
        let gich = Mmio::gic(self.gich.start());
        interface.hcr = gich.read(GICH_HCR);
        gich.write(GICH_HCR, 0);
        let used = usize::from(interface.used);
        for (n, list) in interface.lists.iter_mut().enumerate().take(used) {
            *list = gich.read(GICH_LR + 4 * n).into();
            gich.write(GICH_LR + 4 * n, 0);
        }
    }
}

impl V3 {
    /// The frame with the private interrupts of the core with this affinity.
    fn redistributor(&self, mpidr: u64) -> Option<Mmio> {
        let affinity = (mpidr & 0xff_ffff | mpidr >> 8 & 0xff00_0000) as u32;
        let mut base = self.gicr.start();
        while base < self.gicr_end {
            let frame = Mmio::gic(base);
            if frame.read(GICR_TYPER_HIGH) == affinity {
                return Some(Mmio::gic(base + GICR_SGI_FRAME));
            }
            if frame.read(GICR_TYPER) & LAST != 0 {
                return None;
            }
            base += self.stride;
        }
        None
    }

    fn load(&self, interface: &CpuInterface) {
        // ICC_SRE_EL1 is not virtualised: the guest's accesses trap (Enable clear), so that it can't
        // take the system registers away from the host.
        msr!("s3_4_c12_c9_5", SRE_GUEST); // ICC_SRE_EL2
        msr!("s3_4_c12_c11_7", u64::from(interface.vmcr)); // ICH_VMCR_EL2
        for (group, values) in interface.active_priorities.iter().enumerate() {
            for (n, value) in values.iter().enumerate().take(self.priorities.into()) {
                macro_rules! write {
                    ($name:literal) => {
                        msr!($name, u64::from(*value))
                    };
                }
                priority_registers!(write, group, n);
            }
        }
    }

    fn unload(&self, interface: &mut CpuInterface) {
        msr!("s3_4_c12_c9_5", super::host_regs::SRE_HOST);
        interface.vmcr = mrs!("s3_4_c12_c11_7") as u32;
        for (group, values) in interface.active_priorities.iter_mut().enumerate() {
            for (n, value) in values.iter_mut().enumerate().take(self.priorities.into()) {
                macro_rules! read {
                    ($name:literal) => {
                        mrs!($name) as u32
                    };
                }
                *value = priority_registers!(read, group, n);
            }
        }
    }
}

fn enter_lists(interface: &CpuInterface) {
    each_list!(interface, msr);
    msr!("s3_4_c12_c11_0", u64::from(interface.hcr)); // ICH_HCR_EL2
}

fn leave_lists(interface: &mut CpuInterface) {
    macro_rules! take {
        ($name:literal, $value:expr) => {
            $value = mrs!($name);
            msr!($name, 0);
        };
    }
    interface.hcr = mrs!("s3_4_c12_c11_0") as u32;
    msr!("s3_4_c12_c11_0", 0);
    each_list!(interface, take);
}
