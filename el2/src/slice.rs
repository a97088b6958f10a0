//! How long one call keeps its core.

use abi::ErrorCode;
use memslot::steps::Progress;

use crate::vm_error::Refusal;

/// Steps of one call at most. A step cleans 2 MiB or maps 64 MiB (`memslot::steps`).
const STEPS: u32 = 8;

/// What is left of a call's time.
#[derive(Debug)]
pub struct Slice<F> {
    steps: u32,
    interrupted: F,
}

impl<F: Fn() -> bool> Slice<F> {
    /// A whole one. `interrupted` says whether the host has an interrupt.
    pub const fn new(interrupted: F) -> Self {
        Self {
            steps: STEPS,
            interrupted,
        }
    }

    /// Whether there is time for another step: not if the host has an interrupt, which it gets only
    /// when the call returns.
    pub fn go_on(&mut self) -> bool {
        self.steps = self.steps.saturating_sub(1);
        self.steps > 0 && !(self.interrupted)()
    }
}

/// What the host is told: to call again if something is left.
///
/// # Errors
///
/// [`ErrorCode::Again`].
pub fn done(progress: Progress) -> Result<u64, Refusal> {
    match progress {
        Progress::Done => Ok(0),
        Progress::More => Err(ErrorCode::Again.into()),
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn a_call_takes_eight_steps_at_most() {
        let mut slice = Slice::new(|| false);
        let steps = 1 + (0..100).take_while(|_| slice.go_on()).count();
        assert_eq!(steps, 8);
        assert!(!slice.go_on());
    }

    #[test]
    fn an_interrupt_of_the_host_ends_it_behind_the_first_step() {
        assert!(!Slice::new(|| true).go_on());
    }
}
