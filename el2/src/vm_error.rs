//! What the host is told when memory management of a VM refuses something.

use abi::ErrorCode;
use memslot::error::{Error, ErrorKind};

use crate::ownership::OwnershipError;
use crate::smmu::AttachError;

/// A refusal: the code, and for [`ErrorCode::NoMemory`] how many pages are enough.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// For `x1`.
    pub code: ErrorCode,
    /// For `x2`; 0 if EL2 does not know.
    pub pages: u64,
}

impl Refusal {
    /// `x1` to `x4` of the call's answer.
    #[must_use]
    pub fn to_registers(self) -> [u64; 4] {
        [self.code.to_register(), self.pages, 0, 0]
    }
}

impl From<ErrorCode> for Refusal {
    fn from(code: ErrorCode) -> Self {
        Self { code, pages: 0 }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let code = match (error, error.kind()) {
            (Error::NoSuchSlot(_) | Error::NoLeaf(_), _) => ErrorCode::NotFound,
            (Error::NeedTables(tables), _) => {
                return Self {
                    code: ErrorCode::NoMemory,
                    pages: tables as u64,
                };
            }
            (Error::OutOfMemory, _) => ErrorCode::NoHeap,
            (_, ErrorKind::Invalid) => ErrorCode::Invalid,
            (_, ErrorKind::Busy) => ErrorCode::Busy,
            (_, ErrorKind::NotPermitted) => ErrorCode::NotPermitted,
            (_, ErrorKind::NoMemory) => ErrorCode::NoMemory,
            (_, ErrorKind::Again) => ErrorCode::Again,
            (_, ErrorKind::Exists) => ErrorCode::Exists,
        };
        code.into()
    }
}

impl From<OwnershipError> for Refusal {
    fn from(error: OwnershipError) -> Self {
        match error {
            OwnershipError::NotOwned(_)
            | OwnershipError::Reserved(_)
            | OwnershipError::NotShared(_) => ErrorCode::NotPermitted.into(),
            OwnershipError::Leased(_) => ErrorCode::Busy.into(),
            OwnershipError::NotLeased(_) => ErrorCode::NotFound.into(),
            OwnershipError::NoHeap => ErrorCode::NoHeap.into(),
            OwnershipError::NoTables(_) => ErrorCode::NoHeap.into(),
            OwnershipError::HostMap(_) => ErrorCode::Invalid.into(),
        }
    }
}

impl From<AttachError> for Refusal {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::NoStream => ErrorCode::NotFound,
            AttachError::Taken => ErrorCode::Exists,
            AttachError::NotOwned => ErrorCode::NotPermitted,
            AttachError::Tables => ErrorCode::Mismatch,
            AttachError::Full => ErrorCode::NoSpace,
            AttachError::NoMemory => ErrorCode::NoHeap,
            AttachError::Dead => ErrorCode::Busy,
        }
        .into()
    }
}

#[cfg(test)]
mod tests {
    use memslot::slot::SlotId;

    use super::*;

    fn code(error: Error) -> (ErrorCode, u64) {
        let refusal = Refusal::from(error);
        (refusal.code, refusal.pages)
    }

    #[test]
    fn missing_tables_name_their_number() {
        assert_eq!(code(Error::NeedTables(3)), (ErrorCode::NoMemory, 3));
    }

    #[test]
    fn every_class_has_its_code() {
        assert_eq!(code(Error::NoSuchSlot(SlotId(1))).0, ErrorCode::NotFound);
        assert_eq!(code(Error::OutOfMemory).0, ErrorCode::NoHeap);
        assert_eq!(code(Error::LockNeedsRead).0, ErrorCode::Invalid);
        assert_eq!(code(Error::VcpuRunning).0, ErrorCode::Busy);
        assert_eq!(
            code(Error::WriteLockRefused(SlotId(1))).0,
            ErrorCode::NotPermitted
        );
        assert_eq!(code(Error::BackingChanged).0, ErrorCode::Again);
        assert_eq!(code(Error::Overlap(SlotId(2))).0, ErrorCode::Exists);
    }
}
