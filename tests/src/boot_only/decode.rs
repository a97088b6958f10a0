//! The A64 instructions that name an address: direct branches and PC-relative addressing (Arm ARM C4.1).

/// What an instruction says about addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Names {
    /// Control may go there: B, BL, B.cond, CBZ, CBNZ, TBZ, TBNZ.
    Branch(u64),
    /// It puts this address into a register, or loads from it: ADR, LDR (literal).
    Address(u64),
    /// ADRP: a page and the register; what follows adds the rest.
    Page(u64, u32),
    /// ADD (immediate), 64-bit: source register and what is added.
    Add(u32, u64),
}

/// What the instruction at `pc` names, if anything.
pub(crate) fn decode(word: u32, pc: u64) -> Option<Names> {
    let to = |low: u32, bits: u32| pc.wrapping_add_signed(field(word, low, bits) << 2);
    let near = || (field(word, 5, 19) << 2) | i64::from(word >> 29 & 3);
    if word & 0x7c00_0000 == 0x1400_0000 {
        return Some(Names::Branch(to(0, 26)));
    }
    match word & 0x7f00_0000 {
        0x3400_0000 | 0x3500_0000 => return Some(Names::Branch(to(5, 19))),
        0x3600_0000 | 0x3700_0000 => return Some(Names::Branch(to(5, 14))),
        _ => {}
    }
    match word & 0x9f00_0000 {
        0x1000_0000 => return Some(Names::Address(pc.wrapping_add_signed(near()))),
        0x9000_0000 => {
            let page = (pc & !0xfff).wrapping_add_signed(near() << 12);
            return Some(Names::Page(page, word & 0x1f));
        }
        _ => {}
    }
    if word & 0xff00_0000 == 0x5400_0000 {
        return Some(Names::Branch(to(5, 19)));
    }
    if word & 0x3b00_0000 == 0x1800_0000 {
        return Some(Names::Address(to(5, 19)));
    }
    (word & 0xff80_0000 == 0x9100_0000).then(|| {
        let shift = if word >> 22 & 1 == 1 { 12 } else { 0 };
        Names::Add(word >> 5 & 0x1f, u64::from(word >> 10 & 0xfff) << shift)
    })
}

/// A signed field of an instruction.
fn field(word: u32, low: u32, bits: u32) -> i64 {
    let value = i64::from(word >> low) & ((1 << bits) - 1);
    (value << (64 - bits)) >> (64 - bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PC: u64 = 0x1_2344;

    // Encodings by LLVM 14, llvm-mc -triple aarch64.
    #[test]
    fn branches_name_their_target() {
        let branches = [
            (0x1400_0002, PC + 8),                      // b .+8
            (0x97ff_ffff, PC - 4),                      // bl .-4
            (0x5400_0041, PC + 8),                      // b.ne .+8
            (0xb4ff_ffe0, PC - 4),                      // cbz x0, .-4
            (0x3500_0043, PC + 8),                      // cbnz w3, .+8
            (0x3607_fffc, PC - 4),                      // tbz w28, #0, .-4
            (0xb700_0041, PC + 8),                      // tbnz x1, #32, .+8
            (0x1600_0000, PC.wrapping_sub(0x800_0000)), // b .-128M
        ];
        for (word, target) in branches {
            assert_eq!(decode(word, PC), Some(Names::Branch(target)), "{word:#x}");
        }
    }

    #[test]
    fn addressing_names_an_address_or_a_page() {
        let found = |word| decode(word, PC);
        assert_eq!(found(0x1000_0040), Some(Names::Address(PC + 8))); // adr x0, .+8
        assert_eq!(found(0x70ff_ffe0), Some(Names::Address(PC - 1))); // adr x0, .-1
        assert_eq!(found(0x5800_0049), Some(Names::Address(PC + 8))); // ldr x9, .+8
        assert_eq!(found(0xb000_0001), Some(Names::Page(0x1_3000, 1))); // adrp x1, .+4096
        assert_eq!(found(0x90ff_ffe8), Some(Names::Page(0xe000, 8))); // adrp x8, .-16384
        assert_eq!(found(0x9100_4108), Some(Names::Add(8, 0x10))); // add x8, x8, #16
        assert_eq!(found(0x9140_0528), Some(Names::Add(9, 0x1000))); // add x8, x9, #1, lsl #12
    }

    #[test]
    fn others_name_nothing() {
        // ret, blr x8, mov x0, x1, str x0, [sp], add w0, w0, #1, nop
        for word in [
            0xd65f_03c0,
            0xd63f_0100,
            0xaa01_03e0,
            0xf900_03e0,
            0x1100_0400,
            0xd503_201f,
        ] {
            assert_eq!(decode(word, PC), None, "{word:#x}");
        }
    }
}
