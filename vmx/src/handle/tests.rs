//! Exits over a fake VMCS and the checking machine of `stage2`.

use super::*;
use crate::cr::{CD, PE, PG};
use crate::field::FakeVmcs;
use crate::start::{Start, write_start};
pub(crate) use crate::vcpu::tests::vcpu;
use crate::vm::VmSettings;
use memslot::addr::Gfn;
use memslot::edge::Dma;
use memslot::policy::{CdQuirk, EptPolicy};
use memslot::slot::{Memslot, SlotFlags, SlotId, SlotKind};
use stage2::testing::{Arch, FakeMachine};
use stage2::{Ept, EptConfig, Offered, Stage2};

pub(crate) fn vm() -> Vm<FakeMachine> {
    with_policy(EptPolicy::TODAY)
}

fn with_policy(policy: EptPolicy) -> Vm<FakeMachine> {
    let format = Ept::new(&EptConfig {
        output_bits: 40,
        execute_only: Offered::Yes,
        gigabyte: Offered::Yes,
        access_dirty: Offered::Yes,
    })
    .unwrap();
    let machine = FakeMachine::new(Arch::ept_4k(), 32);
    let table = Stage2::new(format, machine, 0).unwrap();
    table.platform().attach(table.root());
    let settings = VmSettings {
        policy,
        mtrrs: true,
        apic: true,
        physical_bits: 40,
        tsc_hz: 1_000_000,
        locked_limit: 100,
    };
    let vm = Vm::new(settings, table);
    let base = Gfn::try_new(0).unwrap();
    let (flags, kind) = (SlotFlags::empty(), SlotKind::Ram);
    let slot = Memslot::new(SlotId(0), base, 0x400, 0x4000_0000, flags, kind).unwrap();
    vm.memory.create_slot(slot).unwrap();
    vm
}

struct Fake;

impl Machine for Fake {
    fn cpuid(&self, _leaf: u32, _subleaf: u32) -> Answer {
        [0; 4]
    }
    fn now(&self) -> u64 {
        77
    }
    fn guest_word(&self, at: Ipa) -> Option<u64> {
        Some(at.get() + 1)
    }
}

fn exits(v: &mut Vcpu<FakeVmcs>, vm: &Vm<FakeMachine>, reason: u64, qualification: u64) -> Next {
    v.vmcs.write(Field::EXIT_REASON, reason);
    v.vmcs.write(Field::QUALIFICATION, qualification);
    v.vmcs.write(Field::INSTRUCTION_LENGTH, 3);
    handle(v, vm, &Fake)
}

fn runs(vm: &Vm<FakeMachine>) -> usize {
    let whole = stage2::IpaRange::new(Ipa::new(0), 1 << 30).unwrap();
    vm.memory.with_table(|t| t.runs(whole).unwrap().count())
}

#[test]
fn a_fault_in_a_slot_installs_a_leaf_and_elsewhere_ends_the_vcpu() {
    let (vm, mut v) = (vm(), vcpu());
    v.vmcs.write(Field::GUEST_PHYSICAL, 0x1000);
    assert_eq!(exits(&mut v, &vm, 48, 2), Next::Resume);
    assert_eq!(runs(&vm), 1);
    v.vmcs.write(Field::GUEST_PHYSICAL, 0x40_0000);
    let end = exits(&mut v, &vm, 48, 1);
    assert!(matches!(end, Next::End(End::NoDevice(_))), "{end:?}");
    assert_eq!(vm.exits.of("memory fault"), 2);
    assert_eq!(v.vmcs.read(Field::RIP), 0, "the access is repeated");
}

#[test]
fn instructions_are_stepped_over_before_the_owner_is_asked() {
    let (vm, mut v) = (vm(), vcpu());
    assert_eq!(exits(&mut v, &vm, 18, 0), Next::Ask(Request::Hypercall));
    assert_eq!(v.vmcs.read(Field::RIP), 3);
    v.registers.rax = 0x1234;
    let out = Request::Output {
        port: 0x3f8,
        width: 1,
        value: 0x34,
    };
    assert_eq!(exits(&mut v, &vm, 30, 0x3f8_0000), Next::Ask(out));
    assert_eq!(exits(&mut v, &vm, 12, 0), Next::Ask(Request::Halt));
    assert!(v.halted);
}

#[test]
fn input_keeps_the_rest_of_rax_as_the_width_says() {
    let mut v = vcpu();
    for (width, want) in [
        (1, 0x1111_1111_1111_1122),
        (2, 0x1111_1111_1111_2222),
        (4, 0x2222_2222),
    ] {
        v.registers.rax = 0x1111_1111_1111_1111;
        v.set_input(width, 0x2222_2222);
        assert_eq!(v.registers.rax, want);
    }
}

#[test]
fn a_refused_register_write_raises_and_does_not_advance() {
    let (vm, mut v) = (vm(), vcpu());
    v.vmcs.write(Field::CR0, PE);
    v.registers.rcx = 0x277;
    v.registers.rax = 0x02;
    assert_eq!(exits(&mut v, &vm, 32, 0), Next::Resume);
    assert_eq!(v.vmcs.read(Field::ENTRY_EVENT), 0x8000_0b0d);
    assert_eq!(v.vmcs.read(Field::RIP), 0);
}

#[test]
fn cd_removes_the_leaves_whose_type_it_changes() {
    let vm = with_policy(EptPolicy::guest_mtrr(CdQuirk::Uncached));
    let mut v = vcpu();
    write_start(&mut v.vmcs, Start::RealMode(0x1000));
    vm.memory.register_device(Dma::NonSnooping).unwrap();
    v.vmcs.write(Field::GUEST_PHYSICAL, 0x1000);
    assert_eq!(exits(&mut v, &vm, 48, 2), Next::Resume);
    assert_eq!(runs(&vm), 1);
    // mov cr0, rax
    v.registers.rax = CD | PE;
    assert_eq!(exits(&mut v, &vm, 28, 0), Next::Resume);
    assert!(v.types.cd);
    assert_eq!(runs(&vm), 0);
    assert_eq!(v.vmcs.read(Field::CR0) & CD, 0);
}

#[test]
fn pae_paging_loads_four_pointers_from_guest_memory() {
    let (vm, mut v) = (vm(), vcpu());
    v.vmcs.write(Field::CR0, PE);
    v.vmcs.write(Field::CR4, crate::cr::PAE);
    v.vmcs.write(Field::CR3, 0x5020);
    v.registers.rax = PE | PG | CD;
    assert_eq!(exits(&mut v, &vm, 28, 0), Next::Resume);
    let loaded = Field::PDPTES.map(|field| v.vmcs.read(field));
    assert_eq!(loaded, [0x5021, 0x5029, 0x5031, 0x5039]);
    assert!(v.flush);
}

#[test]
fn a_kick_leaves_the_vcpu_open_to_the_next() {
    let (vm, mut v) = (vm(), vcpu());
    v.vmcs.write(Field::INTERRUPTIBILITY, 0b1001);
    v.vmcs.write(Field::EXIT_EVENT, 0x8000_0202);
    assert_eq!(exits(&mut v, &vm, 0, 0), Next::Ask(Request::Pause));
    assert_eq!(v.vmcs.read(Field::INTERRUPTIBILITY), 1);
}

#[test]
fn messages_reach_the_mailboxes() {
    let (vm, mut v) = (vm(), vcpu());
    v.registers.rcx = 0x830;
    v.registers.rax = 0x4608;
    v.registers.rdx = 1;
    let next = exits(&mut v, &vm, 32, 0);
    assert!(matches!(next, Next::Ask(Request::Message(_))));
    assert_eq!(vm.mail[1].take_start(), Some(8));
    assert_eq!(vm.mail[0].take_start(), None);
}

proptest::proptest! {
    #[test]
    fn no_exit_panics(reason: u64, basic in 0u64..70, qualification: u64, address: u64, rax: u64, rcx: u64, entry: bool) {
        let (vm, mut v) = (vm(), vcpu());
        write_start(&mut v.vmcs, Start::Reset);
        v.registers.rax = rax;
        v.registers.rcx = rcx;
        v.vmcs.write(Field::GUEST_PHYSICAL, address & ((1 << 48) - 1));
        let reason = if entry { reason } else { basic };
        let _ = exits(&mut v, &vm, reason, qualification);
        let hardware = v.vmcs.read(Field::CR0);
        proptest::prop_assert_eq!(hardware & 0x6000_0000, 0);
    }
}
