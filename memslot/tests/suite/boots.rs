//! Firmware on several vCPU threads: each turns MTRRs off, writes them, turns them on and toggles
//! CR0.CD, as OVMF does, all at the same time. Whenever an event returns, no leaf of the old type
//! is left on pages that only this vCPU touches.

use std::sync::Barrier;

use crate::kit::{NONE, gfn, slot};
use crate::machine::{Real, ept};
use memslot::edge::Dma::NonSnooping;
use memslot::fault::{Access, FaultKind, FaultOutcome};
use memslot::mtrr::Msr;
use memslot::policy::{CdQuirk, EptPolicy, MemTypePolicy, TypeQuery, VcpuTypes};
use memslot::slot::SlotId;
use stage2::{Entry, Ept, Ipa};

const POLICY: EptPolicy = EptPolicy::guest_mtrr(CdQuirk::WriteBack);
const A: SlotId = SlotId(1);
/// 32 MiB from address 0 on.
const PAGES: u64 = 0x2000;
const VCPUS: [u64; 4] = [0, 1, 2, 3];
const ROUNDS: u64 = 4;
const ALL_WB: u64 = 0x0606_0606_0606_0606;

type Vm = Real<Ept, EptPolicy>;

/// A vCPU and three pages of its own: in the fixed area, in the first and in the second range.
struct Firmware<'a> {
    vm: &'a Vm,
    types: VcpuTypes,
    private: [u64; 3],
}

impl Firmware<'_> {
    fn touch(&self) {
        for page in self.private {
            while self
                .vm
                .fault(page, Access::Write, FaultKind::Translation, &self.types)
                != Ok(FaultOutcome::Resolved)
            {}
        }
    }

    /// Looks for stale leaves, then has all pages mapped again.
    fn check(&self, event: &str) {
        let slot = self.vm.mem.slot(A).unwrap();
        for page in self.private {
            let at = Ipa::new(page << 12);
            let found = self.vm.mem.with_table(|t| t.lookup(at).unwrap().entry);
            let Entry::Leaf { attrs, .. } = found else {
                continue;
            };
            let query = TypeQuery::of(&slot, gfn(page), true);
            let wanted = POLICY.encode(POLICY.leaf_type(&query, &self.types));
            assert_eq!((attrs.mem, attrs.combine), wanted, "{event}, {page:#x}");
        }
        self.touch();
    }

    fn write(&mut self, msr: Msr, value: u64) {
        self.vm
            .mem
            .write_memory_type_msr(&mut self.types, msr, value, std::thread::yield_now)
            .unwrap();
        self.check("register");
    }

    fn toggle(&mut self, cd: bool) {
        self.vm
            .mem
            .write_cd(&mut self.types, cd, std::thread::yield_now);
        self.check("CD");
    }

    fn boot(&mut self) {
        self.touch();
        for round in 0..ROUNDS {
            self.toggle(true);
            self.write(Msr::DefaultType, 0x6);
            for n in 0..11 {
                self.write(Msr::Fixed(n), if n < 2 { ALL_WB } else { 0 });
            }
            // UC, 8 MiB at 8 MiB; and in every other round 8 MiB at 16 MiB, live.
            self.write(Msr::VariableBase(0), 0x80_0000);
            self.write(Msr::VariableMask(0), 0x3fff_ff80_0800);
            self.write(Msr::DefaultType, 0xc06);
            self.toggle(false);
            self.write(Msr::VariableBase(1), 0x100_0000);
            self.write(Msr::VariableMask(1), 0x3fff_ff80_0000 | (round & 1) << 11);
            self.write(Msr::VariableBase(0), 0x80_0001);
        }
    }
}

#[test]
fn no_zap_is_lost_when_vcpus_program_their_registers_together() {
    let vm = ept(POLICY, 1, 0);
    vm.mem
        .create_slot(slot(A, 0, PAGES, 0x10_0000, NONE))
        .unwrap();
    vm.mem.register_device(NonSnooping).unwrap();
    let start = Barrier::new(VCPUS.len());
    std::thread::scope(|scope| {
        for me in VCPUS {
            let (vm, start) = (&vm, &start);
            scope.spawn(move || {
                let mut firmware = Firmware {
                    vm,
                    types: VcpuTypes::new(46, true),
                    private: [0xa0 + me, 0x900 + me, 0x1100 + me],
                };
                start.wait();
                firmware.boot();
            });
        }
    });
    // Some asked while another was at it, and had their ranges removed with the others'.
    assert!(vm.mem.counters().zap_passes > 0);
    assert_eq!(vm.violations(), [""; 0]);
}
