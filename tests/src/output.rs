//! Standard output. A reader that has seen enough (`scripts/ravelin.sh test all --list | head`) ends the program
//! quietly: Rust's `println!` would panic, as the signal that ends other programs then, SIGPIPE, is ignored in a
//! Rust program. It stays ignored: with it, an emulator that dies while something is typed would end the runner too.

use std::fmt;
use std::io::{Error, ErrorKind, Result, Stdout, Write};

/// The exit status of a program whose reader has gone: what a shell shows of one that SIGPIPE ended, 128 + 13.
pub const CLOSED_STATUS: u8 = 141;

/// Standard output, whose errors [`is_closed`] knows.
#[derive(Debug)]
pub struct Output(Stdout);

/// Nobody reads standard output any more.
#[derive(Debug)]
struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for Closed {}

/// Where results go. Each error is the caller's to pass on.
#[must_use]
pub fn stdout() -> Output {
    Output(std::io::stdout())
}

/// Says what went wrong, on standard error. Where that can't be said either, the exit status says it.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Whether the cause is that nobody reads standard output any more, and not some other pipe that broke.
#[must_use]
pub fn is_closed(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|cause: &Error| cause.get_ref().is_some_and(|inner| inner.is::<Closed>()))
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.write(bytes).map_err(closed)
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush().map_err(closed)
    }
}

fn closed(error: Error) -> Error {
    if error.kind() == ErrorKind::BrokenPipe {
        Error::new(ErrorKind::BrokenPipe, Closed)
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn a_pipe_of_our_own_that_broke_is_another_matter() {
        let other = anyhow::Error::from(Error::from(ErrorKind::BrokenPipe));
        assert!(!is_closed(&other));
        let ours = Err::<(), _>(closed(ErrorKind::BrokenPipe.into())).context("while printing");
        assert!(is_closed(&ours.unwrap_err()));
    }
}
