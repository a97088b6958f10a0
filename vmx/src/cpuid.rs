//! What CPUID tells a guest: the machine's answer, less what the guest does not get.
//!
//! Left out: VMX and SVM, XSAVE and everything that needs it (AVX), MONITOR, PCID, INVPCID,
//! RDTSCP, performance counters, thermal and machine-check features. Added: the hypervisor bit
//! with a signature, and the frequency of the time-stamp counter.

/// One answer: EAX, EBX, ECX, EDX.
pub type Answer = [u32; 4];

/// What the answers depend on besides the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCpu {
    /// The vCPU's number, its APIC identifier.
    pub number: u8,
    /// Frequency of the time-stamp counter in Hz.
    pub tsc_hz: u32,
    /// Whether the guest has MTRRs.
    pub mtrrs: bool,
    /// Whether the guest has a local APIC (an x2APIC; there is none in memory).
    pub apic: bool,
}

/// The highest basic leaf: frequencies.
const LAST_LEAF: u32 = 0x16;
const HYPERVISOR: u32 = 0x4000_0000;
const LAST_EXTENDED: u32 = 0x8000_0008;

mod leaf1 {
    /// SSE3, PCLMUL, SSSE3, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
    pub(super) const ECX: u32 =
        1 | 1 << 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 22 | 1 << 23 | 1 << 25 | 1 << 30;
    /// FPU to CX8, SEP, PGE, CMOV, PAT, PSE-36, CLFSH, MMX, FXSR, SSE, SSE2, SS; not MCE, DS,
    /// ACPI, HTT, TM, PBE.
    pub(super) const EDX: u32 = 0x17f
        | 1 << 11
        | 1 << 13
        | 1 << 15
        | 1 << 16
        | 1 << 17
        | 1 << 19
        | 1 << 23
        | 1 << 24
        | 1 << 25
        | 1 << 26
        | 1 << 27;
    pub(super) const APIC: u32 = 1 << 9;
    pub(super) const MTRR: u32 = 1 << 12;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
}

/// FSGSBASE, BMI1, SMEP, BMI2, ERMS, RDSEED, ADX, SMAP, CLFLUSHOPT.
const LEAF7_EBX: u32 =
    1 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23;
/// LAHF, LZCNT, PREFETCHW.
const EXTENDED1_ECX: u32 = 1 | 1 << 5 | 1 << 8;
/// SYSCALL, NX, 1 GiB pages, long mode.
const EXTENDED1_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 29;
/// Invariant time-stamp counter.
const EXTENDED7_EDX: u32 = 1 << 8;

/// Answers a guest. `machine` asks the CPU.
pub fn answer(
    leaf: u32,
    subleaf: u32,
    guest: &GuestCpu,
    machine: impl Fn(u32, u32) -> Answer,
) -> Answer {
    let [a, b, c, d] = machine(leaf, subleaf);
    match leaf {
        0 => [LAST_LEAF, b, c, d],
        1 => leaf_1([a, b, c, d], guest),
        // Caches, as the machine has them.
        2 => [a, b, c, d],
        4 => [a & 0x3fff, b, c, d],
        7 if subleaf == 0 => [0, b & LEAF7_EBX, 0, 0],
        0x15 => [1, 1, guest.tsc_hz, 0],
        0x16 => [guest.tsc_hz / 1_000_000, guest.tsc_hz / 1_000_000, 100, 0],
        HYPERVISOR => signature(),
        0x8000_0000 => [LAST_EXTENDED, b, c, d],
        0x8000_0001 => [a, 0, c & EXTENDED1_ECX, d & EXTENDED1_EDX],
        0x8000_0002..=0x8000_0006 => [a, b, c, d],
        0x8000_0007 => [0, 0, 0, d & EXTENDED7_EDX],
        0x8000_0008 => [a & 0xffff, 0, 0, 0],
        _ => [0; 4],
    }
}

fn leaf_1([a, b, c, d]: Answer, guest: &GuestCpu) -> Answer {
    // CLFLUSH line size stays; one logical processor a package.
    let b = b & 0xff00 | 1 << 16 | u32::from(guest.number) << 24;
    let mut c = c & leaf1::ECX | leaf1::HYPERVISOR;
    let mut edx = d & leaf1::EDX;
    if guest.apic {
        edx |= leaf1::APIC;
        c |= leaf1::X2APIC;
    }
    if guest.mtrrs {
        edx |= d & leaf1::MTRR;
    }
    [a, b, c, edx]
}

fn signature() -> Answer {
    let word = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
    [HYPERVISOR, word(*b"Rave"), word(*b"linV"), word(*b"MX\0\0")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUEST: GuestCpu = GuestCpu {
        number: 3,
        tsc_hz: 50_000_000,
        mtrrs: true,
        apic: true,
    };

    fn everything(_: u32, _: u32) -> Answer {
        [!0; 4]
    }

    #[test]
    fn what_is_not_emulated_is_not_offered() {
        let [_, _, c, d] = answer(1, 0, &GUEST, everything);
        for bit in [3, 5, 6, 7, 12, 15, 17, 24, 26, 27, 28, 29] {
            assert_eq!(c & 1 << bit, 0, "ECX bit {bit}");
        }
        for bit in [7, 14, 18, 21, 22, 28, 29, 31] {
            assert_eq!(d & 1 << bit, 0, "EDX bit {bit}");
        }
        let [_, _, c, d] = answer(0x8000_0001, 0, &GUEST, everything);
        assert_eq!(c & 1 << 2, 0, "SVM");
        assert_eq!(d & 1 << 27, 0, "RDTSCP");
        let [_, b, ..] = answer(7, 0, &GUEST, everything);
        assert_eq!(b & (1 << 10 | 1 << 5), 0, "INVPCID, AVX2");
        assert_eq!(answer(0xd, 0, &GUEST, everything), [0; 4]);
        assert_eq!(answer(0xa, 0, &GUEST, everything), [0; 4]);
    }

    #[test]
    fn mtrrs_and_apic_follow_the_vm() {
        let without = GuestCpu {
            mtrrs: false,
            apic: false,
            ..GUEST
        };
        let [_, b, c, d] = answer(1, 0, &GUEST, everything);
        assert_eq!(b >> 24, 3);
        assert_ne!(d & 1 << 12, 0);
        assert_ne!(d & 1 << 9, 0);
        assert_ne!(c & 1 << 21, 0);
        let [_, _, c, d] = answer(1, 0, &without, everything);
        assert_eq!(d & (1 << 12 | 1 << 9), 0);
        assert_eq!(c & 1 << 21, 0);
    }

    #[test]
    fn the_hypervisor_and_its_clock_are_announced() {
        let [_, _, c, _] = answer(1, 0, &GUEST, |_, _| [0; 4]);
        assert_eq!(c >> 31, 1);
        let [_, b, c, d] = answer(0x4000_0000, 0, &GUEST, everything);
        let text: std::vec::Vec<u8> = [b, c, d].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(&text, b"RavelinVMX\0\0");
        assert_eq!(answer(0x15, 0, &GUEST, everything), [1, 1, 50_000_000, 0]);
    }

    proptest! {
        #[test]
        fn nothing_appears_that_the_machine_lacks(leaf in any::<u32>(), words in any::<Answer>()) {
            let got = answer(leaf, 0, &GUEST, |_, _| words);
            if leaf == 7 || leaf == 0x8000_0001 {
                for (ours, machine) in got.iter().zip(words) {
                    prop_assert_eq!(ours & !machine, 0);
                }
            }
        }
    }
}
