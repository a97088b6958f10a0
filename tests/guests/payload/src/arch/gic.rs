//! The interrupt controller, version 2 or 3, and what has been received.
//!
//! Sources: Arm GIC architecture version 2 (IHI 0048) and version 3 (IHI 0069).

use super::{cpu, instruction, mem, mrs, msr};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};

const GICD: u64 = 0x0800_0000;
const GICC: u64 = 0x0801_0000;
const GICR: u64 = 0x080a_0000;
const GICR_STRIDE: u64 = 0x2_0000;
const GICR_SGI: u64 = 0x1_0000;

const GICD_CTLR: u64 = 0;
const GICD_TYPER: u64 = 4;
const GICD_IGROUPR: u64 = 0x80;
const GICD_ISENABLER: u64 = 0x100;
const GICD_ICENABLER: u64 = 0x180;
const GICD_ISPENDR: u64 = 0x200;
const GICD_ICPENDR: u64 = 0x280;
const GICD_ISACTIVER: u64 = 0x300;
const GICD_ICACTIVER: u64 = 0x380;
const GICD_IPRIORITYR: u64 = 0x400;
const GICD_ITARGETSR: u64 = 0x800;
const GICD_ICFGR: u64 = 0xc00;
const GICD_SGIR: u64 = 0xf00;
const GICD_IROUTER: u64 = 0x6000;
const GICR_WAKER: u64 = 0x14;
const GICC_CTLR: u64 = 0;
const GICC_PMR: u64 = 4;
const GICC_IAR: u64 = 0xc;
const GICC_EOIR: u64 = 0x10;
const GICC_DIR: u64 = 0x1000;

/// INTIDs from here on mean "none".
pub const SPECIAL: u32 = 1020;
/// Most INTIDs that are counted.
pub const MAX: usize = 1024;
/// Default priority.
pub const PRIORITY: u8 = 0xa0;

static RECEIVED: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static BY_CPU: [AtomicU32; cpu::MAX] = [const { AtomicU32::new(0) }; cpu::MAX];
/// Order in which INTIDs came, on the CPU that [`start_log`] was called on.
static LOG: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
static LOGGED: AtomicUsize = AtomicUsize::new(usize::MAX);
/// What the handler does with an interrupt besides counting: [`Quiet`].
static QUIET: AtomicU8 = AtomicU8::new(Quiet::Nothing as u8);

/// How the handler makes a level-triggered source be quiet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Quiet {
    /// Edge-triggered or by software: nothing to do.
    Nothing,
    /// Turns the virtual timer off.
    VirtualTimer,
    /// Turns the physical timer off.
    PhysicalTimer,
    /// Masks all interrupts of the PL011.
    Uart,
}

/// PL011: interrupt mask.
const UART_IMSC: u64 = 0x0900_0038;

/// Kept, because reading an identification register is a trap under a hypervisor.
static IS_V3: AtomicBool = AtomicBool::new(false);

/// Whether it is version 3.
#[inline(always)]
pub fn is_v3() -> bool {
    IS_V3.load(Ordering::Relaxed)
}

/// Number of INTIDs that the distributor has.
pub fn lines() -> u32 {
    let lines = (mem::read32(GICD + GICD_TYPER) as u32 & 0x1f) + 1;
    (lines * 32).min(SPECIAL)
}

/// The distributor's register at `offset`.
pub fn distributor(offset: u64) -> u64 {
    GICD + offset
}

/// Turns the distributor on; once.
pub fn enable_distributor() {
    IS_V3.store(mrs!("id_aa64pfr0_el1") >> 24 & 0xf != 0, Ordering::Relaxed);
    let control = if is_v3() { 1 << 4 | 1 << 1 } else { 1 };
    for first in (32..u64::from(lines())).step_by(32) {
        let word = first / 8;
        mem::write32(GICD + GICD_ICENABLER + word, 0xffff_ffff);
        mem::write32(GICD + GICD_ICPENDR + word, 0xffff_ffff);
        if is_v3() {
            mem::write32(GICD + GICD_IGROUPR + word, 0xffff_ffff);
        }
    }
    mem::write32(GICD + GICD_CTLR, control);
}

/// Registers of this CPU's private interrupts.
fn private() -> u64 {
    if is_v3() {
        GICR + GICR_STRIDE * cpu::index() as u64 + GICR_SGI
    } else {
        GICD
    }
}

/// Turns this CPU's interface on: all priorities; SGIs 0 to 15 enabled.
pub fn enable_cpu() {
    if is_v3() {
        wake_redistributor();
        mem::write32(private() + GICD_IGROUPR, 0xffff_ffff);
        msr!("s3_0_c12_c12_5", mrs!("s3_0_c12_c12_5") | 1); // ICC_SRE_EL1
        instruction!("isb");
    }
    set_split_eoi(false);
    set_threshold(0xff);
    (0..16).for_each(enable);
    if is_v3() {
        msr!("s3_0_c12_c12_7", 1); // ICC_IGRPEN1_EL1
        instruction!("isb");
    }
}

fn wake_redistributor() {
    let waker = GICR + GICR_STRIDE * cpu::index() as u64 + GICR_WAKER;
    mem::write32(waker, mem::read32(waker) & !2);
    cpu::wait(100_000, || mem::read32(waker) & 4 == 0);
}

/// EOI only drops the priority (mode 1), or deactivates too (mode 0).
pub fn set_split_eoi(split: bool) {
    if is_v3() {
        msr!("s3_0_c12_c12_4", u64::from(split) << 1); // ICC_CTLR_EL1
        instruction!("isb");
    } else {
        mem::write32(GICC + GICC_CTLR, 1 | u64::from(split) << 9);
    }
}

/// Only interrupts of a priority value below this are signalled.
pub fn set_threshold(priority: u8) {
    if is_v3() {
        msr!("s3_0_c4_c6_0", u64::from(priority)); // ICC_PMR_EL1
        instruction!("isb");
    } else {
        mem::write32(GICC + GICC_PMR, u64::from(priority));
    }
}

/// Where the register with a bit for `intid` is, and the bit.
fn bit(register: u64, intid: u32) -> (u64, u64) {
    let base = if intid < 32 { private() } else { GICD };
    (
        base + register + u64::from(intid / 32 * 4),
        1 << (intid % 32),
    )
}

fn set(register: u64, intid: u32) {
    let (address, bit) = bit(register, intid);
    mem::write32(address, bit);
}

/// Enables an interrupt, at [`PRIORITY`], for this CPU.
pub fn enable(intid: u32) {
    set_priority(intid, PRIORITY);
    if intid >= 32 {
        route(intid, cpu::index());
    }
    set(GICD_ISENABLER, intid);
}

/// Disables it.
pub fn disable(intid: u32) {
    set(GICD_ICENABLER, intid);
}

/// Makes it pending by software.
pub fn set_pending(intid: u32) {
    set(GICD_ISPENDR, intid);
}

/// Takes that back.
pub fn clear_pending(intid: u32) {
    set(GICD_ICPENDR, intid);
}

/// Whether it is pending.
pub fn is_pending(intid: u32) -> bool {
    let (address, bit) = bit(GICD_ISPENDR, intid);
    mem::read32(address) & bit != 0
}

/// Whether it is active.
pub fn is_active(intid: u32) -> bool {
    let (address, bit) = bit(GICD_ISACTIVER, intid);
    mem::read32(address) & bit != 0
}

/// Makes it not active; its priority runs on, if it does.
pub fn clear_active(intid: u32) {
    set(GICD_ICACTIVER, intid);
}

/// Sets its priority; lower is more urgent.
pub fn set_priority(intid: u32, priority: u8) {
    let base = if intid < 32 { private() } else { GICD };
    mem::write8(
        base + GICD_IPRIORITYR + u64::from(intid),
        u64::from(priority),
    );
}

/// Edge-triggered, so that pending by software survives without a line.
pub fn set_edge(intid: u32) {
    let address = GICD + GICD_ICFGR + u64::from(intid / 16 * 4);
    let bit = 2 << (intid % 16 * 2);
    mem::write32(address, mem::read32(address) | bit);
}

/// Sends a shared interrupt to this CPU.
pub fn route(intid: u32, cpu: usize) {
    if is_v3() {
        mem::write64(GICD + GICD_IROUTER + 8 * u64::from(intid), cpu as u64);
    } else {
        mem::write8(GICD + GICD_ITARGETSR + u64::from(intid), 1 << cpu);
    }
}

/// Sends SGI `intid` to the CPUs of the mask.
#[inline(always)]
pub fn send(intid: u32, targets: u64) {
    instruction!("dsb ishst");
    if is_v3() {
        msr!("s3_0_c12_c11_5", u64::from(intid) << 24 | targets); // ICC_SGI1R_EL1
        instruction!("isb");
    } else {
        mem::write32(GICD + GICD_SGIR, targets << 16 | u64::from(intid));
    }
}

/// Sends it to all CPUs but this one.
pub fn send_to_others(intid: u32) {
    instruction!("dsb ishst");
    if is_v3() {
        msr!("s3_0_c12_c11_5", 1 << 40 | u64::from(intid) << 24);
        instruction!("isb");
    } else {
        mem::write32(GICD + GICD_SGIR, 1 << 24 | u64::from(intid));
    }
}

/// Acknowledges the most urgent interrupt: its INTID, and the value that [`end`] needs.
#[inline(always)]
pub fn acknowledge() -> (u32, u64) {
    let value = if is_v3() {
        mrs!("s3_0_c12_c12_0")
    } else {
        mem::read32(GICC + GICC_IAR)
    };
    (
        (value & if is_v3() { 0xff_ffff } else { 0x3ff }) as u32,
        value,
    )
}

/// End of interrupt.
#[inline(always)]
pub fn end(value: u64) {
    if is_v3() {
        msr!("s3_0_c12_c12_1", value);
        instruction!("isb");
    } else {
        mem::write32(GICC + GICC_EOIR, value);
    }
}

/// Deactivates, after an [`end`] that only dropped the priority.
pub fn deactivate(value: u64) {
    if is_v3() {
        msr!("s3_0_c12_c11_1", value);
        instruction!("isb");
    } else {
        mem::write32(GICC + GICC_DIR, value);
    }
}

/// Sets what the handler does to the source.
pub fn set_quiet(quiet: Quiet) {
    QUIET.store(quiet as u8, Ordering::SeqCst);
}

/// How often `intid` was received, on any CPU.
pub fn received(intid: u32) -> u32 {
    RECEIVED[intid as usize % MAX].load(Ordering::SeqCst)
}

/// How many interrupts this CPU has received.
pub fn received_by(cpu: usize) -> u32 {
    BY_CPU[cpu].load(Ordering::SeqCst)
}

/// Forgets the counts.
pub fn forget() {
    RECEIVED
        .iter()
        .chain(&BY_CPU)
        .for_each(|count| count.store(0, Ordering::SeqCst));
}

/// Begins to note the order in which interrupts come.
pub fn start_log() {
    LOGGED.store(0, Ordering::SeqCst);
}

/// Ends that; gives what came at this place, and how many came.
pub fn stop_log() -> (impl Fn(usize) -> u32, usize) {
    let count = LOGGED.swap(usize::MAX, Ordering::SeqCst).min(LOG.len());
    (|place: usize| LOG[place % 64].load(Ordering::SeqCst), count)
}

/// The handler: one interrupt.
pub fn on_irq() {
    let (intid, value) = acknowledge();
    if intid >= SPECIAL {
        return;
    }
    hush();
    RECEIVED[intid as usize % MAX].fetch_add(1, Ordering::SeqCst);
    BY_CPU[cpu::index()].fetch_add(1, Ordering::SeqCst);
    let place = LOGGED.load(Ordering::SeqCst);
    if let Some(slot) = LOG.get(place) {
        slot.store(intid, Ordering::SeqCst);
        LOGGED.store(place + 1, Ordering::SeqCst);
    }
    end(value);
}

fn hush() {
    let quiet = QUIET.load(Ordering::SeqCst);
    if quiet == Quiet::VirtualTimer as u8 {
        msr!("cntv_ctl_el0", 0);
    } else if quiet == Quiet::PhysicalTimer as u8 {
        msr!("cntp_ctl_el0", 0);
    } else if quiet == Quiet::Uart as u8 {
        mem::write32(UART_IMSC, 0);
    }
    instruction!("isb");
}
