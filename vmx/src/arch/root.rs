//! VMX root operation: the checks' raw words, VMXON, and the invalidation instructions.

use core::arch::asm;

use spin::Once;
use vmx::capability::{Capabilities, Missing, Words};

use super::cpu::{cpuid, cr0, cr4, rdmsr, set_cr4, wrmsr};
use super::{Frames, power};

const FEATURE_CONTROL: u32 = 0x3a;
const BASIC: u32 = 0x480;
const PIN: u32 = 0x481;
const PRIMARY: u32 = 0x482;
const EXIT: u32 = 0x483;
const ENTRY: u32 = 0x484;
const MISC: u32 = 0x485;
const CR0_FIXED0: u32 = 0x486;
const CR4_FIXED0: u32 = 0x488;
const SECONDARY: u32 = 0x48b;
const EPT_VPID: u32 = 0x48c;
/// The "true" registers follow the plain ones at this distance, if IA32_VMX_BASIC bit 55 is set.
const TRUE: u32 = 0x48d - 0x481;
const HAS_TRUE: u64 = 1 << 55;
const CPUID_VMX: u32 = 1 << 5;
const CR4_VMXE: u64 = 1 << 13;

/// Reads a register that CPUs with VMX have (SDM vol. 3D A.1). The secondary controls' register
/// is there if the primary word allows bit 31, and the one of EPT and VPID if the secondary word
/// allows either (A.3.3, A.10): callers look first.
fn capability(register: u32) -> u64 {
    // SAFETY: see above; reading has no effect.
    unsafe { rdmsr(register) }
}

/// Reads what the checks need, and no register that the CPU does not have.
fn words() -> Words {
    let [_, _, ecx, edx] = cpuid(1, 0);
    let [widths, ..] = cpuid(0x8000_0008, 0);
    let mut words = Words {
        cpuid_1_ecx: ecx,
        cpuid_1_edx: edx,
        physical_bits: widths.to_le_bytes()[0],
        ..Words::default()
    };
    if ecx & CPUID_VMX == 0 {
        return words;
    }
    if let Some(value) = Words::feature_control_to_set(capability(FEATURE_CONTROL)) {
        // SAFETY: the register is there, and it is not locked.
        unsafe { wrmsr(FEATURE_CONTROL, value) };
    }
    words.feature_control = capability(FEATURE_CONTROL);
    words.basic = capability(BASIC);
    let shift = if words.basic & HAS_TRUE == 0 { 0 } else { TRUE };
    words.pin = capability(PIN + shift);
    words.primary = capability(PRIMARY + shift);
    words.exit = capability(EXIT + shift);
    words.entry = capability(ENTRY + shift);
    words.misc = capability(MISC);
    if words.primary >> 63 != 0 {
        words.secondary = capability(SECONDARY);
    }
    if words.secondary >> 32 & (1 << 1 | 1 << 5) != 0 {
        words.ept_vpid = capability(EPT_VPID);
    }
    words
}

/// Checks this CPU and enters VMX root operation; it stays there.
pub(super) fn start() -> Result<Capabilities, Missing> {
    let capabilities = words().check()?;
    let (fixed0, fixed4) = (capability(CR0_FIXED0), capability(CR4_FIXED0));
    if cr0() & fixed0 != fixed0 {
        power::fatal(format_args!("CR0 is {:#x}, VMX needs {fixed0:#x}", cr0()));
    }
    // SAFETY: VMXE and what else VMX fixes to 1.
    unsafe { set_cr4(cr4() | CR4_VMXE | fixed4) };
    let region = vmcs_region(capabilities.revision);
    if !vmxon(region.at().get()) {
        power::fatal(format_args!("VMXON failed"));
    }
    // The region belongs to the CPU from here on.
    core::mem::forget(region);
    Ok(capabilities)
}

/// A VMXON or VMCS region: a frame that begins with the revision.
pub(super) fn vmcs_region(revision: u32) -> Frames {
    let Some(frames) = Frames::new(super::FRAME) else {
        power::fatal(format_args!("no memory for a VMCS"))
    };
    frames.write_words(&[u64::from(revision)]);
    frames
}

fn vmxon(region: u64) -> bool {
    let failed: u8;
    // SAFETY: CR4.VMXE is set, CR0 is as VMX wants it, the region has the revision and is given
    // away for good.
    unsafe { asm!("vmxon [{}]", "setbe {}", in(reg) &raw const region, out(reg_byte) failed) };
    failed == 0
}

/// Makes this CPU forget what it cached of one EPT pointer (SDM vol. 3C 29.4.3.1, type 1).
pub(crate) fn invept(pointer: u64) {
    let descriptor = [pointer, 0];
    let failed: u8;
    // SAFETY: invalidating loses nothing; the type was checked at start.
    unsafe {
        asm!(
            "invept {}, [{}]", "setbe {}",
            in(reg) 1u64, in(reg) &raw const descriptor, out(reg_byte) failed,
        );
    }
    debug_assert!(failed == 0, "single-context INVEPT is there");
}

/// Makes this CPU forget what it cached for one virtual processor (type 1).
pub(crate) fn invvpid(vpid: u16) {
    let descriptor = [u64::from(vpid), 0];
    let failed: u8;
    // SAFETY: invalidating loses nothing; the type was checked at start.
    unsafe {
        asm!(
            "invvpid {}, [{}]", "setbe {}",
            in(reg) 1u64, in(reg) &raw const descriptor, out(reg_byte) failed,
        );
    }
    debug_assert!(failed == 0, "single-context INVVPID is there");
}

/// The MSR bitmaps that all vCPUs share.
#[derive(Debug)]
pub(crate) struct MsrBitmap(Frames);

static BITMAP: Once<MsrBitmap> = Once::new();

impl MsrBitmap {
    /// Address of the bitmaps; made at the first call.
    pub(crate) fn address() -> u64 {
        let bitmap = BITMAP.call_once(|| {
            let Some(frames) = Frames::new(super::FRAME) else {
                power::fatal(format_args!("no memory for the MSR bitmaps"))
            };
            frames.write_words(&vmx::msr::bitmap());
            Self(frames)
        });
        bitmap.0.at().get()
    }
}
