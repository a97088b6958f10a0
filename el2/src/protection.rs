//! What a protected VM is besides its memory: how far it has come, what it measures.
//!
//! Invariant: it runs only after it was sealed; what it found in its memory then is in its
//! measurement, and is what was expected if anything was. See docs/protection.md.

use crate::sync::SpinLock;
use abi::ErrorCode;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::MutexGuard;

use crate::guest::protected::MmioGuard;
use crate::measure::{self, Measurer, Start};
use crate::vm_error::Refusal;

/// A protected VM's protection.
#[derive(Debug)]
pub struct Protection {
    /// Where it expects devices.
    pub guard: MmioGuard,
    sealed: AtomicBool,
    stage: SpinLock<Stage>,
}

/// How far it has come.
#[derive(Debug)]
pub enum Stage {
    /// The host puts its memory together.
    Building {
        /// What it measures so far.
        measurer: Measurer,
        /// What it must measure in the end.
        expected: Option<[u8; measure::SIZE]>,
    },
    /// It is not what was expected: it never runs.
    Refused,
    /// It may run; this is what it was when it started.
    Sealed([u8; measure::SIZE]),
}

impl Stage {
    /// The measurement that is being made.
    #[must_use]
    pub fn measurer(&mut self) -> Option<&mut Measurer> {
        match self {
            Self::Building { measurer, .. } => Some(measurer),
            Self::Refused | Self::Sealed(_) => None,
        }
    }
}

impl Default for Protection {
    fn default() -> Self {
        Self::new()
    }
}

impl Protection {
    /// Of a VM without memory.
    #[must_use]
    pub fn new() -> Self {
        Self {
            guard: MmioGuard::new(),
            sealed: AtomicBool::new(false),
            stage: SpinLock::new(Stage::Building {
                measurer: Measurer::new(),
                expected: None,
            }),
        }
    }

    /// Whether it may run.
    #[inline]
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// How far it has come; it stays there as long as this is held.
    pub fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock()
    }

    /// Keeps it from being sealed.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPermitted`] if it is.
    pub fn building(&self) -> Result<MutexGuard<'_, Stage>, ErrorCode> {
        let stage = self.stage.lock();
        match *stage {
            Stage::Building { .. } => Ok(stage),
            Stage::Refused | Stage::Sealed(_) => Err(ErrorCode::NotPermitted),
        }
    }

    /// A half of the measurement, as two little-endian words.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPermitted`] before it is sealed.
    pub fn measurement(&self, half: u64) -> Result<[u64; 2], ErrorCode> {
        let Stage::Sealed(measured) = *self.stage.lock() else {
            return Err(ErrorCode::NotPermitted);
        };
        let [a, b, c, d] = words(&measured);
        Ok(if half == 0 { [a, b] } else { [c, d] })
    }

    /// Says what the measurement must be, before anything is measured, and once.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPermitted`].
    pub fn expect(&self, words: [u64; 4]) -> Result<u64, Refusal> {
        let mut stage = self.building()?;
        match &mut *stage {
            Stage::Building { measurer, expected } if measurer.is_empty() && expected.is_none() => {
                let mut bytes = [0; measure::SIZE];
                for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                    *to = word.to_le_bytes();
                }
                *expected = Some(bytes);
                Ok(0)
            }
            _ => Err(ErrorCode::NotPermitted.into()),
        }
    }

    /// Completes the measurement of a VM that starts like this, and lets `start` make its first
    /// vCPU runnable.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPermitted`] if it has been completed; [`ErrorCode::Mismatch`]; or what
    /// `start` says, then nothing has changed.
    pub fn seal(
        &self,
        how: &Start,
        start: impl FnOnce() -> Result<(), ErrorCode>,
    ) -> Result<u64, Refusal> {
        let mut stage = self.building()?;
        let Stage::Building { measurer, expected } = &*stage else {
            return Err(ErrorCode::NotPermitted.into());
        };
        let measured = measurer.clone().finish(how);
        if expected.is_some_and(|expected| expected != measured) {
            *stage = Stage::Refused;
            return Err(ErrorCode::Mismatch.into());
        }
        start()?;
        *stage = Stage::Sealed(measured);
        self.sealed.store(true, Ordering::Release);
        Ok(0)
    }
}

fn words(bytes: &[u8; measure::SIZE]) -> [u64; 4] {
    let mut words = [0; 4];
    for (word, eight) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*eight);
    }
    words
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const START: Start = Start {
        vcpus: 1,
        entry: 0x4000_0000,
        context: 0,
    };

    fn seal(protection: &Protection) -> Result<u64, ErrorCode> {
        protection.seal(&START, || Ok(())).map_err(|r| r.code)
    }

    #[test]
    fn it_is_sealed_once_and_has_a_measurement_from_then() {
        let protection = Protection::new();
        assert_eq!(protection.measurement(0), Err(ErrorCode::NotPermitted));
        assert!(!protection.is_sealed() && protection.building().is_ok());
        assert_eq!(seal(&protection), Ok(0));
        assert!(protection.is_sealed() && protection.building().is_err());
        assert_eq!(seal(&protection), Err(ErrorCode::NotPermitted));
        let expected = Measurer::new().finish(&START);
        let told = [protection.measurement(0), protection.measurement(1)];
        let told = told.map(Result::unwrap).concat();
        assert_eq!(told, words(&expected));
    }

    #[test]
    fn what_is_not_expected_is_never_sealed() {
        let protection = Protection::new();
        let expected = words(&Measurer::new().finish(&START));
        let [a, b, c, d] = expected;
        protection.expect([a, b, c, d ^ 1]).unwrap();
        assert!(protection.expect(expected).is_err());
        assert_eq!(seal(&protection), Err(ErrorCode::Mismatch));
        assert_eq!(seal(&protection), Err(ErrorCode::NotPermitted));
        assert!(!protection.is_sealed());
    }

    #[test]
    fn the_expectation_comes_before_the_first_page() {
        let protection = Protection::new();
        protection.stage().measurer().unwrap().zeros(0, 4096);
        assert!(protection.expect([0; 4]).is_err());
        assert_eq!(seal(&protection), Ok(0));
    }

    #[test]
    fn a_start_that_fails_leaves_it_unsealed() {
        let protection = Protection::new();
        let refused = protection.seal(&START, || Err(ErrorCode::Invalid));
        assert_eq!(refused, Err(ErrorCode::Invalid.into()));
        assert_eq!(seal(&protection), Ok(0));
    }
}
