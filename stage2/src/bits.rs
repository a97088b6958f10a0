//! Words made of fields.

/// All fields in one word: the bits that any of them has.
///
/// The fields of a descriptor, of a software word, of an operand share no bits, so that any
/// operator that keeps lone bits would do. It is written here alone, where a test tells them apart.
#[inline(always)]
pub(crate) const fn join<const N: usize>(fields: [u64; N]) -> u64 {
    let mut word = 0;
    let mut n = 0;
    while n < N {
        word |= fields[n];
        n += 1;
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_has_the_bits_that_any_field_has() {
        assert_eq!(join([]), 0);
        assert_eq!(join([0x10, 0x3, 1 << 63]), 1 << 63 | 0x13);
        assert_eq!(join([0b0011, 0b0110, 0b0010]), 0b0111);
    }
}
