//! As much of a GIC as it takes to let the virtual timer wake a core: its interrupt becomes
//! pending and is signalled, but stays masked in PSTATE.
//!
//! Source: GICv2 (Arm IHI 0048), GICv3 and v4 (Arm IHI 0069).

use core::arch::asm;

use board::Gic;
use board::uart::UartRegs;

use super::{Mmio, mrs, ticks_per_second};

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
    match gic {
        Gic::V2 { gicd, gicc, .. } => enable_v2(gicd.start(), gicc.start()),
        Gic::V3 { gicd, gicr } => enable_v3(gicd.start(), gicr.start(), gicr.end())?,
    }
    msr!("cntv_tval_el0", ticks_per_second() * milliseconds / 1000);
    msr!("cntv_ctl_el0", 1);
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
