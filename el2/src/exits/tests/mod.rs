//! Whole exits of a vCPU without a machine, one behaviour each.
//!
//! Syndromes are written as the Arm ARM has them (DDI 0487, D24.2.40), not with the code's constants.

mod calls;
mod devices;
mod gic;
mod interrupts;
mod memory;
mod registers;

use std::vec::Vec;

use super::testing::{Did, FakeVcpu, FakeVm, Ground, RAM, Shape};
use super::{Next, handle};
use crate::vgic::GicVersion;

/// Synchronous exception from AArch64.
const SYNC: u64 = 8;
/// A device of the host's.
const UART: u64 = 0x0900_0000;
/// VBAR_EL1 of the guests here; an exception of EL1's with its own stack pointer goes to 0x200 there.
const VECTORS: u64 = 0xffff_0000_0000_0000;
const VECTOR: u64 = VECTORS + 0x200;
/// What every FAR_EL2 here has above the page offset: nothing of it may count.
const FAR: u64 = 0xffff_8000_1234_5000;

/// ESR_ELx: IL; classes.
const IL: u64 = 1 << 25;
const FETCH: u64 = 0x20 << 26 | IL;
const DATA: u64 = 0x24 << 26 | IL;
/// Data aborts: valid syndrome, bytes, sign, 64 bits, on a walk, write; fault status codes.
const ISV: u64 = 1 << 24;
const BYTE: u64 = ISV;
const HALF: u64 = ISV | 1 << 22;
const WORD: u64 = ISV | 2 << 22;
const DOUBLE: u64 = ISV | 3 << 22;
const SIGN: u64 = 1 << 21;
const SF: u64 = 1 << 15;
const FNV: u64 = 1 << 10;
const CM: u64 = 1 << 8;
const S1PTW: u64 = 1 << 7;
const WRITE: u64 = 1 << 6;
const TRANSLATION: u64 = 0b00_0111;
const ACCESS_FLAG: u64 = 0b00_1011;
const PERMISSION: u64 = 0b00_1111;

/// The register that an access names.
const fn rt(number: u64) -> u64 {
    number << 16
}

const PLAIN: Shape = Shape {
    protected: false,
    gic: GicVersion::V3,
    vcpus: 2,
};
const PROTECTED: Shape = Shape {
    protected: true,
    ..PLAIN
};
const WITH_GICV2: Shape = Shape {
    gic: GicVersion::V2,
    ..PLAIN
};

/// Lets vCPU 0 of such a VM have exits; its tables must be in order afterwards.
fn on(shape: Shape, act: impl FnOnce(&mut FakeVcpu<'_, '_>)) {
    let ground = Ground::new();
    let ownership = ground.ownership();
    let vm = FakeVm::new(&ground, &ownership, shape);
    let mut vcpu = FakeVcpu::new(&vm, 0);
    vcpu.el1.vbar = VECTORS;
    act(&mut vcpu);
    assert_eq!(vm.violations(), Vec::<std::string::String>::new());
}

/// An abort at an IPA.
fn abort(vcpu: &mut FakeVcpu<'_, '_>, esr: u64, ipa: u64) -> Next {
    (vcpu.esr, vcpu.far) = (esr, FAR | ipa & 0xfff);
    vcpu.hpfar = ipa >> 12 << 4;
    handle(vcpu, SYNC)
}

/// A permission fault: the IPA is not in HPFAR_EL2, but what stage 1 says of the address.
fn permission_fault(vcpu: &mut FakeVcpu<'_, '_>, esr: u64, ipa: u64) -> Next {
    (vcpu.esr, vcpu.far) = (esr | PERMISSION, FAR | ipa & 0xfff);
    (vcpu.hpfar, vcpu.stage1) = (0x4_0000_0000, Some(ipa & !0xfff));
    handle(vcpu, SYNC)
}

/// The exception that the guest got has this syndrome, and came from where the guest was.
fn assert_injected(vcpu: &FakeVcpu<'_, '_>, esr: u64) {
    assert_eq!((vcpu.pc, vcpu.el1.esr), (VECTOR, esr));
    assert_eq!((vcpu.el1.elr, vcpu.el1.spsr), (RAM, 0b0101));
    assert_eq!(vcpu.exit, None);
    let injected = |did: &Did| matches!(did, Did::Inject(_));
    assert_eq!(
        vcpu.take_did().iter().filter(|did| injected(did)).count(),
        1
    );
}
