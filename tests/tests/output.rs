//! The program itself, when nobody reads what it says.

#![expect(clippy::unwrap_used, reason = "in a test, a panic is the failure")]

use std::io::{Write as _, pipe};
use std::process::{Command, Output, Stdio};

/// Runs the program; its standard output is a pipe whose reader has gone.
fn unread(arguments: &[&str], input: &str) -> Output {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut program = Command::new(env!("CARGO_BIN_EXE_ravelin"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keys = program.stdin.take().unwrap();
    keys.write_all(input.as_bytes()).unwrap();
    drop(keys);
    program.wait_with_output().unwrap()
}

/// It says nothing, and ends like a program that SIGPIPE (13) ended, as a shell shows it.
fn ends_quietly(arguments: &[&str], input: &str) {
    let output = unread(arguments, input);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(128 + 13), "{}", output.status);
}

#[test]
fn a_list_that_nobody_reads_ends_quietly() {
    ends_quietly(&["test", "all", "--list"], "");
}

#[test]
fn a_filter_that_nobody_reads_ends_quietly() {
    let own = std::env::current_exe().unwrap();
    ends_quietly(
        &["symbolise", "--elf", own.to_str().unwrap()],
        "a line\nanother\n",
    );
}

/// What went wrong is said all the same: only the reader's absence is no error.
#[test]
fn another_error_is_still_told() {
    let output = unread(&["map-svg", "/nonexistent/console", "/nonexistent/out"], "");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.starts_with("ravelin: error: "), "{told}");
    assert_eq!(output.status.code(), Some(1));
}
