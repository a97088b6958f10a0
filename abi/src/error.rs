//! Error codes of hypercalls.

/// Why a hypercall was refused; nothing has changed then.
///
/// On the wire: the negative number in `x1`. The numbers are those of Linux's errno, which every
/// host knows how to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(i64)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The caller may not do that.
    NotPermitted = -1,
    /// There is no such object.
    NotFound = -2,
    /// Try again.
    Again = -11,
    /// Pages of the VM are lacking: give it some by [`crate::Call::VmTopUp`] and try again. `x2`
    /// holds how many are enough, if EL2 knows.
    NoMemory = -12,
    /// The object is in use.
    Busy = -16,
    /// The range or the number is taken.
    Exists = -17,
    /// An argument is wrong.
    Invalid = -22,
    /// No handle is free.
    NoSpace = -28,
    /// EL2's own heap is used up: give it pages by [`crate::Call::DonateHeap`] and try again.
    NoHeap = -105,
    /// A protected VM is not what was expected, or an IOMMU can't read the VM's tables.
    Mismatch = -129,
}

impl ErrorCode {
    const ALL: [Self; 10] = [
        Self::NotPermitted,
        Self::NotFound,
        Self::Again,
        Self::NoMemory,
        Self::Busy,
        Self::Exists,
        Self::Invalid,
        Self::NoSpace,
        Self::NoHeap,
        Self::Mismatch,
    ];

    /// The value for `x1`.
    #[must_use]
    pub const fn to_register(self) -> u64 {
        (self as i64).cast_unsigned()
    }

    /// The error that `x1` holds, if it holds one.
    #[must_use]
    pub fn from_register(value: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.to_register() == value)
    }
}

/// Packs a call's outcome for `x1`.
///
/// Values above `i64::MAX` can't be told from errors and are never produced by EL2.
#[must_use]
pub const fn to_register(result: Result<u64, ErrorCode>) -> u64 {
    match result {
        Ok(value) => value,
        Err(error) => error.to_register(),
    }
}

/// Unpacks what [`to_register`] packed; an unknown negative number is [`ErrorCode::Invalid`].
///
/// # Errors
///
/// The error that the register holds.
pub fn from_register(value: u64) -> Result<u64, ErrorCode> {
    if value.cast_signed() >= 0 {
        return Ok(value);
    }
    Err(ErrorCode::from_register(value).unwrap_or(ErrorCode::Invalid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_the_register() {
        for error in ErrorCode::ALL {
            assert_eq!(from_register(to_register(Err(error))), Err(error));
        }
    }

    #[test]
    fn busy_is_linux_ebusy() {
        assert_eq!(ErrorCode::Busy.to_register(), 0xffff_ffff_ffff_fff0);
    }

    #[test]
    fn values_survive_the_register_and_unknown_errors_are_invalid() {
        assert_eq!(from_register(to_register(Ok(7))), Ok(7));
        assert_eq!(from_register(u64::MAX - 500), Err(ErrorCode::Invalid));
    }
}
