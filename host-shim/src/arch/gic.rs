//! As much of a GIC as the host needs: interrupts become pending and end a WFI, or a guest's run,
//! but stay masked in PSTATE; who waits takes them by hand.
//!
//! Source: GICv2 (Arm IHI 0048), GICv3 and v4 (Arm IHI 0069).

use core::arch::asm;

use board::Gic;
use board::uart::UartRegs;

use super::{Mmio, mrs, ticks, ticks_per_second};

/// INTID of the EL1 virtual timer's private interrupt.
const VIRTUAL_TIMER: u32 = 27;
const REDISTRIBUTOR_STRIDE: u64 = 0x2_0000;

macro_rules! msr {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the host's own interrupt controller interface and timer; interrupts are masked.
        unsafe {
            asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value,
                options(nostack, preserves_flags));
        }
    }};
}

/// Lets this core's virtual timer signal its interrupt after `milliseconds`.
pub(crate) fn arm_timer(gic: &Gic, milliseconds: u64) -> Result<(), &'static str> {
    arm_timer_at(gic, ticks() + ticks_per_second() * milliseconds / 1000)
}

/// The same when CNTVCT_EL0 reaches `deadline`.
fn arm_timer_at(gic: &Gic, deadline: u64) -> Result<(), &'static str> {
    match gic {
        Gic::V2 { gicd, gicc, .. } => enable_v2(gicd.start(), gicc.start()),
        Gic::V3 { gicd, gicr } => enable_v3(gicd.start(), gicr.start(), gicr.end())?,
    }
    msr!("cntv_cval_el0", deadline);
    msr!("cntv_ctl_el0", 1);
    Ok(())
}

/// Waits in WFI until CNTVCT_EL0 reaches `deadline`: an emulator whose clock counts instructions
/// skips the time. Takes this core's virtual timer.
pub(crate) fn sleep_until(gic: &Gic, deadline: u64) -> Result<(), &'static str> {
    while ticks() < deadline {
        arm_timer_at(gic, deadline)?;
        wait();
        disarm_timer(gic);
    }
    Ok(())
}

/// Stops the timer and takes its interrupt back.
pub(crate) fn disarm_timer(gic: &Gic) {
    msr!("cntv_ctl_el0", 3);
    match gic {
        Gic::V2 { gicc, .. } => {
            let interface = Mmio::new(gicc.start());
            let id = interface.read(0xc); // GICC_IAR
            if id & 0x3ff == VIRTUAL_TIMER {
                interface.write(0x10, id); // GICC_EOIR
            }
        }
        Gic::V3 { .. } => {
            let id = mrs!("s3_0_c12_c12_0"); // ICC_IAR1_EL1
            if id & 0xff_ffff == u64::from(VIRTUAL_TIMER) {
                msr!("s3_0_c12_c12_1", id); // ICC_EOIR1_EL1
            }
        }
    }
}

fn enable_v2(gicd: u64, gicc: u64) {
    Mmio::new(gicd).write(0x100, 1 << VIRTUAL_TIMER); // GICD_ISENABLER0, this core's
    Mmio::new(gicd).write(0, 1); // GICD_CTLR
    Mmio::new(gicc).write(4, 0xff); // GICC_PMR: every priority
    Mmio::new(gicc).write(0, 1); // GICC_CTLR
}

fn enable_v3(gicd: u64, gicr: u64, end: u64) -> Result<(), &'static str> {
    Mmio::new(gicd).write(0, 1 << 4 | 1 << 1); // GICD_CTLR: ARE, group 1
    let frame = redistributor(gicr, end).ok_or("this core has no redistributor")?;
    let control = Mmio::new(frame);
    control.write(0x14, 0); // GICR_WAKER: awake
    while control.read(0x14) & 1 << 2 != 0 {
        core::hint::spin_loop();
    }
    let private = Mmio::new(frame + 0x1_0000);
    private.write(0x80, u32::MAX); // GICR_IGROUPR0: group 1
    private.write(0x100, 1 << VIRTUAL_TIMER); // GICR_ISENABLER0
    msr!("s3_0_c12_c12_5", 7); // ICC_SRE_EL1
    msr!("s3_0_c4_c6_0", 0xff); // ICC_PMR_EL1: every priority
    msr!("s3_0_c12_c12_7", 1); // ICC_IGRPEN1_EL1
    Ok(())
}

/// The redistributor of this core, by the affinity in GICR_TYPER.
fn redistributor(gicr: u64, end: u64) -> Option<u64> {
    let me = super::mpidr();
    let affinity = (me >> 8 & 0xff00_0000) | (me & 0xff_ffff);
    let mut frame = gicr;
    while frame + REDISTRIBUTOR_STRIDE <= end {
        let registers = Mmio::new(frame);
        if u64::from(registers.read(0xc)) == affinity {
            return Some(frame);
        }
        if registers.read(8) & 1 << 4 != 0 {
            return None; // GICR_TYPER.Last
        }
        frame += REDISTRIBUTOR_STRIDE;
    }
    None
}

/// Tries to make a redistributor use tables in memory, as an LPI's set-up does. Says what it did not
/// refuse.
pub(crate) fn enable_lpis(redistributor: u64) -> Result<(), &'static str> {
    const TABLES: [usize; 4] = [0x70, 0x74, 0x78, 0x7c]; // GICR_PROPBASER, GICR_PENDBASER
    let registers = Mmio::new(redistributor);
    if registers.read(8) & 0xf != 0 {
        return Err("GICR_TYPER offers LPIs");
    }
    for table in TABLES {
        registers.write(table, 0x4000_0000);
        if registers.read(table) != 0 {
            return Err("a table's address was taken");
        }
    }
    registers.write(0, registers.read(0) | 1);
    if registers.read(0) & 1 != 0 {
        return Err("LPIs are on");
    }
    Ok(())
}

/// INTID of the EL1 physical timer, the host's own.
pub(crate) const PHYSICAL_TIMER: u32 = 30;
/// The host's own software-generated interrupt: "look at your vCPUs".
pub(crate) const WAKE_SGI: u32 = 1;
/// INTIDs from here on are not interrupts (IHI 0069H 2.2.1).
const SPECIAL: u32 = 1020;

/// Lets this core take what the scheduler waits for: its timer, its SGI and EL2's; and the guests'
/// timer, which only ever fires while a guest runs.
pub(crate) fn enable(gic: &Gic) -> Result<(), &'static str> {
    // From now on the virtual timer is the guests'; one that a suspended core was woken by is over.
    msr!("cntv_ctl_el0", 0);
    let wanted =
        1 << PHYSICAL_TIMER | 1 << WAKE_SGI | 1 << abi::KICK_SGI | 1 << abi::GUEST_TIMER_PPI;
    match gic {
        Gic::V2 { gicd, gicc, .. } => {
            enable_v2(gicd.start(), gicc.start());
            Mmio::new(gicd.start()).write(0x100, wanted);
        }
        Gic::V3 { gicd, gicr } => {
            enable_v3(gicd.start(), gicr.start(), gicr.end())?;
            let frame = redistributor(gicr.start(), gicr.end());
            let frame = frame.ok_or("this core has no redistributor")?;
            Mmio::new(frame + 0x1_0000).write(0x100, wanted);
        }
    }
    Ok(())
}

/// Disables all private interrupts of this core, as firmware does that turns it on.
pub(crate) fn disable_private(gic: &Gic) {
    match gic {
        Gic::V2 { gicd, .. } => Mmio::new(gicd.start()).write(0x180, u32::MAX), // GICD_ICENABLER0
        Gic::V3 { gicr, .. } => {
            if let Some(frame) = redistributor(gicr.start(), gicr.end()) {
                Mmio::new(frame + 0x1_0000).write(0x180, u32::MAX); // GICR_ICENABLER0
            }
        }
    }
}

/// First interrupt of a device that all cores share (IHI 0069H 2.2.1).
pub(crate) const FIRST_SHARED: u32 = 32;

/// Lets a device's level-triggered interrupt come to core `number`, whose affinity is `mpidr`. It is
/// masked whenever [`take`] has given it, until [`unmask`].
pub(crate) fn route(gic: &Gic, intid: u32, number: usize, mpidr: u64) {
    let distributor = distributor(gic);
    let word = 4 * u64::from(intid / 32);
    let bit = 1 << (intid % 32);
    let configuration = 0xc00 + 4 * u64::from(intid / 16);
    let level = Mmio::new(distributor + configuration);
    level.write(0, level.read(0) & !(2 << (intid % 16 * 2))); // GICD_ICFGR
    match gic {
        Gic::V2 { .. } => {
            // GICD_ITARGETSR: a byte for each interrupt.
            let targets = Mmio::new(distributor + 0x800 + u64::from(intid & !3));
            let shift = intid % 4 * 8;
            let core = 1u32 << (number % 8);
            targets.write(0, targets.read(0) & !(0xff << shift) | core << shift);
        }
        Gic::V3 { .. } => {
            let group = Mmio::new(distributor + 0x80 + word);
            group.write(0, group.read(0) | bit); // GICD_IGROUPR: group 1
            let affinity = mpidr & 0xff_00ff_ffff;
            // GICD_IROUTER: 64 bits for each interrupt.
            Mmio::new(distributor).write_long(0x6000 + 8 * u64::from(intid), affinity);
        }
    }
    unmask(gic, intid);
}

/// Lets an interrupt come again that [`take`] has given.
pub(crate) fn unmask(gic: &Gic, intid: u32) {
    let word = 0x100 + 4 * u64::from(intid / 32); // GICD_ISENABLER
    Mmio::new(distributor(gic) + word).write(0, 1 << (intid % 32));
}

/// Keeps an interrupt from coming.
pub(crate) fn mask(gic: &Gic, intid: u32) {
    let distributor = distributor(gic);
    let word = 0x180 + 4 * u64::from(intid / 32); // GICD_ICENABLER
    Mmio::new(distributor + word).write(0, 1 << (intid % 32));
    if matches!(gic, Gic::V3 { .. }) {
        // GICD_CTLR.RWP: the write has not taken effect yet.
        while Mmio::new(distributor).read(0) & 1 << 31 != 0 {
            core::hint::spin_loop();
        }
    }
}

const fn distributor(gic: &Gic) -> u64 {
    match gic {
        Gic::V2 { gicd, .. } | Gic::V3 { gicd, .. } => gicd.start(),
    }
}

/// Acknowledges and ends the most urgent interrupt that is pending on this core.
pub(crate) fn take(gic: &Gic) -> Option<u32> {
    match gic {
        Gic::V2 { gicc, .. } => {
            let interface = Mmio::new(gicc.start());
            let id = interface.read(0xc); // GICC_IAR
            if id & 0x3ff >= SPECIAL {
                return None;
            }
            silence(gic, id & 0x3ff);
            interface.write(0x10, id); // GICC_EOIR
            Some(id & 0x3ff)
        }
        Gic::V3 { .. } => {
            let id = mrs!("s3_0_c12_c12_0"); // ICC_IAR1_EL1
            if id >= u64::from(SPECIAL) {
                return None;
            }
            silence(gic, id as u32);
            msr!("s3_0_c12_c12_1", id); // ICC_EOIR1_EL1
            Some(id as u32)
        }
    }
}

/// A timer's line stays high until it is turned off, a device's until its driver has been there.
fn silence(gic: &Gic, id: u32) {
    if id == PHYSICAL_TIMER {
        msr!("cntp_ctl_el0", 0);
    } else if id >= FIRST_SHARED {
        mask(gic, id);
    }
}

/// Sends [`WAKE_SGI`] to core `number`, whose affinity is `mpidr`.
pub(crate) fn wake(gic: &Gic, number: usize, mpidr: u64) {
    // SAFETY: a barrier: who is woken sees what was stored before.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    match gic {
        Gic::V2 { gicd, .. } => {
            let target = 1u32 << (16 + number % 8);
            Mmio::new(gicd.start()).write(0xf00, target | WAKE_SGI); // GICD_SGIR
        }
        Gic::V3 { .. } => {
            let cluster = (mpidr >> 8 & 0xff) << 16 | (mpidr >> 16 & 0xff) << 32;
            let range = (mpidr >> 4 & 0xf) << 44;
            let value = u64::from(WAKE_SGI) << 24 | cluster | range | 1 << (mpidr & 0xf);
            msr!("s3_0_c12_c11_5", value); // ICC_SGI1R_EL1
        }
    }
}

/// Lets the host's timer fire when CNTPCT_EL0 reaches `deadline`.
pub(crate) fn set_timer(deadline: u64) {
    msr!("cntp_cval_el0", deadline);
    msr!("cntp_ctl_el0", 1);
}

/// Stops the host's timer.
pub(crate) fn stop_timer() {
    msr!("cntp_ctl_el0", 0);
}

/// CNTPCT_EL0.
pub(crate) fn now() -> u64 {
    mrs!("cntpct_el0")
}

/// Waits until an interrupt is pending.
pub(crate) fn wait() {
    // SAFETY: a barrier and a hint.
    unsafe { asm!("dsb sy", "wfi", options(nostack, preserves_flags)) };
}
