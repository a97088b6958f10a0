//! Random steps against an oracle that knows no list registers; random accesses.

use proptest::prelude::*;
use std::vec::Vec;

use super::*;

/// What a step of the random test does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Line(u32, bool),
    Sgi(usize, usize, u32),
    Acknowledge(usize),
    End(usize),
    Pass(usize),
    Enable(u32, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (32u32..40, any::<bool>()).prop_map(|(i, l)| Step::Line(i, l)),
        (0usize..2, 0usize..2, 0u32..4).prop_map(|(f, t, i)| Step::Sgi(f, t, i)),
        (0usize..2).prop_map(Step::Acknowledge),
        (0usize..2).prop_map(Step::End),
        (0usize..2).prop_map(Step::Pass),
        (32u32..40, any::<bool>()).prop_map(|(i, e)| Step::Enable(i, e)),
    ];
    prop::collection::vec(step, 1..120)
}

/// The architecture's view, without list registers: lines, latched SGIs, what is active where.
#[derive(Default)]
struct Oracle {
    lines: [bool; 8],
    enabled: [bool; 8],
    active: [Option<usize>; 8],
    sgis: [[bool; 4]; 2],
    active_sgis: [[bool; 4]; 2],
}

impl Oracle {
    fn deliverable(&self, cpu: usize) -> Vec<u32> {
        let sgis = (0..4u32)
            .filter(|i| self.sgis[cpu][*i as usize] && !self.active_sgis[cpu][*i as usize]);
        let spis = (0..8u32).filter(|i| {
            let n = *i as usize;
            cpu == 0 && self.lines[n] && self.enabled[n] && self.active[n].is_none()
        });
        sgis.chain(spis.map(|i| i + 32)).collect()
    }

    fn acknowledge(&mut self, cpu: usize, intid: u32) {
        match (intid as usize).checked_sub(32) {
            None => {
                self.sgis[cpu][intid as usize] = false;
                self.active_sgis[cpu][intid as usize] = true;
            }
            Some(spi) => self.active[spi] = Some(cpu),
        }
    }

    fn end(&mut self, cpu: usize, intid: u32) {
        match (intid as usize).checked_sub(32) {
            None => self.active_sgis[cpu][intid as usize] = false,
            Some(spi) => self.active[spi] = None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever happens, with few or many list registers: what is acknowledged was deliverable,
    /// and nothing deliverable is withheld.
    #[test]
    fn nothing_is_lost_and_nothing_comes_twice(steps in steps(), lists in 2u8..6) {
        let vgic = enabled(V3, 2);
        let mut oracle = Oracle { enabled: [true; 8], ..Oracle::default() };
        let mut cpus = [Cpu::new(0, V3, lists), Cpu::new(1, V3, lists)];
        let mut stacks: [Vec<u32>; 2] = [Vec::new(), Vec::new()];
        for step in steps {
            match step {
                Step::Line(intid, level) => {
                    let _: Kicks = vgic.set_spi(intid, level).unwrap();
                    oracle.lines[intid as usize - 32] = level;
                }
                Step::Sgi(from, to, intid) => {
                    let _: Kicks = vgic.sgi1r(from, u64::from(intid) << 24 | 1 << to);
                    oracle.sgis[to][intid as usize] = true;
                }
                Step::Acknowledge(cpu) => {
                    let possible = oracle.deliverable(cpu);
                    // Real guests run an interrupt to its end before many others: as many may be
                    // active as there are list registers.
                    if stacks[cpu].len() + 1 >= usize::from(lists) {
                        continue;
                    }
                    prop_assert_eq!(vgic.has_pending(cpu), !possible.is_empty());
                    let got = cpus[cpu].acknowledge(&vgic);
                    prop_assert_eq!(got.is_some(), !possible.is_empty());
                    if let Some(intid) = got {
                        prop_assert!(possible.contains(&intid), "{} of {:?}", intid, possible);
                        oracle.acknowledge(cpu, intid);
                        stacks[cpu].push(intid);
                    }
                }
                Step::End(cpu) => {
                    if let Some(intid) = stacks[cpu].pop() {
                        cpus[cpu].end(&vgic, intid);
                        oracle.end(cpu, intid);
                    }
                }
                Step::Pass(cpu) => cpus[cpu].pass(&vgic),
                Step::Enable(intid, on) => {
                    let offset = if on { 0x104 } else { 0x184 };
                    let _: Kicks = vgic.dist_write(1, offset, 4, 1 << (intid - 32));
                    oracle.enabled[intid as usize - 32] = on;
                }
            }
        }
    }

    /// No access panics, whatever its offset and width, and reads fit the width.
    #[test]
    fn any_access_is_answered(offset in 0u64..0x2_0000, width in 0u32..4, value: u64, v3: bool) {
        let vgic = enabled(if v3 { V3 } else { V2 }, 3);
        let size = 1u8 << width;
        let _: Kicks = vgic.dist_write(1, offset, size, value);
        let _: Kicks = vgic.redist_write(2, offset, size, value);
        let read = vgic.dist_read(0, offset, size) | vgic.redist_read(2, offset, size);
        prop_assert!(size == 8 || read >> (u32::from(size) * 8) == 0);
        let mut cpu = Cpu::new(1, vgic.version, 4);
        let _: Option<u32> = cpu.acknowledge(&vgic);
    }
}
