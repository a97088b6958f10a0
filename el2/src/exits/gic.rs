//! Accesses to the virtual GIC's frames, which EL2 emulates all itself.

use abi::VmCounter;

use super::fault::decoded;
use super::{Guest, Loaded, Next, external_abort, kick};
use crate::esr;
use crate::guest::mmio::{Decoded, MmioAccess};

/// The guest's GIC, as on QEMU's virt (docs/guest-platform.md).
const GICD: u64 = 0x0800_0000;
const GICD_SIZE: u64 = 0x1_0000;
const GICR: u64 = 0x080a_0000;
const GICR_STRIDE: u64 = 0x2_0000;

/// A frame of the virtual GIC, and the offset in it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Frame {
    Distributor(u64),
    Redistributor(usize, u64),
}

impl Frame {
    /// Whether the register shows what list registers hold: ISPENDR, ICPENDR, ISACTIVER, ICACTIVER,
    /// and a GICv2's pending SGIs.
    fn shows_lists(&self) -> bool {
        let (Self::Distributor(at) | Self::Redistributor(_, at)) = *self;
        matches!(at & 0xffff, 0x200..0x400 | 0xf00..0xf30)
    }

    /// The frame that an address is in.
    #[inline]
    pub(super) fn of(run: &impl Guest, ipa: u64) -> Option<Self> {
        if let Some(offset) = ipa.checked_sub(GICD).filter(|offset| *offset < GICD_SIZE) {
            return Some(Self::Distributor(offset));
        }
        let offset = ipa.checked_sub(GICR)?;
        let frame = offset / GICR_STRIDE;
        if !run.has_redistributors() || frame >= u64::from(run.vcpus()) {
            return None;
        }
        let frame = usize::try_from(frame).ok()?;
        Some(Self::Redistributor(frame, offset % GICR_STRIDE))
    }
}

/// An access to the distributor or a redistributor.
#[inline]
pub(super) fn in_gic(run: &mut impl Loaded, frame: Frame, ipa: u64, esr: u64) -> Next {
    let access = match decoded(ipa, esr) {
        Decoded::Access(access) => access,
        Decoded::SkipMaintenance => {
            run.skip_instruction();
            return Next::Resume;
        }
        Decoded::ExternalAbort => return external_abort(run, &esr::abort(esr), esr),
    };
    run.count(VmCounter::MmioInEl2);
    if matches!(access, MmioAccess::Write { .. }) {
        return gic_write(run, frame, access);
    }
    if frame.shows_lists() {
        // What the list registers say now belongs to the answer.
        run.save_interrupts();
    }
    let (vgic, index, size) = (run.vgic(), run.index(), access.size());
    let value = match frame {
        Frame::Distributor(at) => vgic.dist_read(index, at, size),
        Frame::Redistributor(of, at) => vgic.redist_read(of, at, size),
    };
    run.registers().set(access.rt(), access.loaded(value));
    run.skip_instruction();
    // The loop around this looks at the list registers.
    Next::Resume
}

#[inline(never)]
fn gic_write(run: &mut impl Loaded, frame: Frame, access: MmioAccess) -> Next {
    // What the list registers say now changes with it.
    run.save_interrupts();
    let value = access.stored(run.registers().get(access.rt()));
    let (vgic, index, size) = (run.vgic(), run.index(), access.size());
    let kicks = match frame {
        Frame::Distributor(at) => vgic.dist_write(index, at, size, value),
        Frame::Redistributor(of, at) => vgic.redist_write(of, at, size, value),
    };
    run.skip_instruction();
    let _: Next = kick(run, kicks);
    Next::Refresh
}
