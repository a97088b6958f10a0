//! Runs one emulator under a wall-clock limit: keeps its console, types replies, ends it by its process id.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Most console output that is kept, in bytes; a machine that prints more is ended.
const MAX_CONSOLE: usize = 8 << 20;
/// How long the loop sleeps at most before it looks at the clock again.
const TICK: Duration = Duration::from_millis(200);

/// What to run, and when to end it.
#[derive(Debug, Clone)]
pub struct Run {
    /// The program: QEMU, or a stand-in in the runner's own tests.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Wall-clock limit.
    pub timeout: Duration,
    /// File that gets a copy of the console as it comes.
    pub log: PathBuf,
    /// What to type, in order, each once its cue has been seen.
    pub replies: Vec<Reply>,
    /// A complete line that ends in one of these ends the machine: it has halted and would never exit.
    pub stop_at: Vec<String>,
}

/// One thing to type.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Text (not necessarily a whole line) that must have come since the reply before.
    pub cue: String,
    /// What is then typed, newline included.
    pub send: String,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// By itself, with this exit status (`None`: killed by a signal that we did not send).
    Exited(Option<i32>),
    /// We ended it on seeing one of the lines of [`Run::stop_at`].
    Stopped,
    /// We ended it because its time was up.
    TimedOut,
    /// We ended it because it printed more than 8 MiB.
    Flooded,
}

/// What came over the console, and how it ended.
#[derive(Debug, Clone)]
pub struct Transcript {
    /// Lines without line ends and terminal escapes; the last may be incomplete.
    pub lines: Vec<String>,
    /// How the machine ended.
    pub end: End,
    /// Wall-clock time.
    pub elapsed: Duration,
}

/// The console so far.
struct Console<'a> {
    run: &'a Run,
    log: File,
    text: String,
    /// Where in `text` the next cue is looked for.
    cue_from: usize,
    /// Where in `text` the next complete line begins.
    line_from: usize,
    next_reply: usize,
}

/// Runs it to its end.
///
/// # Errors
/// The program cannot be started, or the log cannot be written. A machine that misbehaves is no error here: see
/// [`Transcript::end`].
pub fn run(run: &Run) -> Result<Transcript> {
    let start = Instant::now();
    if let Some(folder) = run.log.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut log =
        File::create(&run.log).with_context(|| format!("cannot write {}", run.log.display()))?;
    writeln!(log, "$ {} {}", run.program.display(), quote(&run.args))?;
    let mut child = spawn(run)?;
    let console = Console {
        run,
        log,
        text: String::new(),
        cue_from: 0,
        line_from: 0,
        next_reply: 0,
    };
    let watched = watch(&mut child, console, start + run.timeout);
    // Whatever happened, the machine must not outlive this function.
    let _ = child.kill();
    let status = child.wait()?;
    let (text, end) = watched?;
    let end = end.unwrap_or(End::Exited(status.code()));
    Ok(Transcript {
        lines: clean_lines(&text),
        end,
        elapsed: start.elapsed(),
    })
}

fn spawn(run: &Run) -> Result<Child> {
    Command::new(&run.program)
        .args(&run.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}: run `make setup`", run.program.display()))
}

/// Follows the console until the program closes it (`None`) or must be ended.
fn watch(
    child: &mut Child,
    mut console: Console<'_>,
    deadline: Instant,
) -> Result<(String, Option<End>)> {
    let mut stdin = child.stdin.take();
    let chunks = read_in_background(child);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok((console.text, Some(End::TimedOut)));
        }
        match chunks.recv_timeout(left.min(TICK)) {
            Ok(chunk) => console.append(&chunk)?,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        }
        // Several cues may have come at once, and after the last one nothing more before it is answered.
        while let Some(text) = console.next_reply()
            && let Some(stdin) = &mut stdin
        {
            // A machine that is just ending closes its console: its end says all there is to say.
            let _ = stdin
                .write_all(text.as_bytes())
                .and_then(|()| stdin.flush());
        }
        if console.reached_stop() {
            return Ok((console.text, Some(End::Stopped)));
        }
        if console.text.len() > MAX_CONSOLE {
            return Ok((console.text, Some(End::Flooded)));
        }
    }
    Ok((console.text, exit_in_time(child, deadline)?))
}

/// The console is closed: waits for the exit, `None` if it came.
fn exit_in_time(child: &mut Child, deadline: Instant) -> Result<Option<End>> {
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            return Ok(Some(End::TimedOut));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(None)
}

fn read_in_background(child: &mut Child) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, sender.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, sender);
    }
    receiver
}

fn forward(mut from: impl Read + Send + 'static, to: Sender<Vec<u8>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to.send(buffer[..length].to_vec()).is_err() {
                break;
            }
        }
    });
}

impl Console<'_> {
    fn append(&mut self, chunk: &[u8]) -> Result<()> {
        self.log.write_all(chunk)?;
        self.text.push_str(&String::from_utf8_lossy(chunk));
        Ok(())
    }

    /// What to type now, if the next reply's cue has come.
    fn next_reply(&mut self) -> Option<String> {
        let reply = self.run.replies.get(self.next_reply)?;
        let at = self.text.get(self.cue_from..)?.find(&reply.cue)?;
        self.cue_from += at + reply.cue.len();
        self.next_reply += 1;
        Some(reply.send.clone())
    }

    /// Whether one of the complete lines that came since the last call ends the machine.
    fn reached_stop(&mut self) -> bool {
        let Some(new) = self.text.get(self.line_from..) else {
            return false;
        };
        let Some(length) = new.rfind('\n') else {
            return false;
        };
        let stop = new[..length].lines().any(|line| {
            self.run
                .stop_at
                .iter()
                .any(|stop| clean(line).trim().ends_with(stop.as_str()))
        });
        self.line_from += length + 1;
        stop
    }
}

fn clean_lines(text: &str) -> Vec<String> {
    text.lines().map(clean).collect()
}

/// The line without carriage returns and without terminal escape sequences (ECMA-48 5.4: `ESC [ ... final byte`).
fn clean(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' && chars.next_if_eq(&'[').is_some() {
            while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
        } else if c != '\r' && c != '\u{1b}' {
            out.push(c);
        }
    }
    out
}

/// The arguments as one could paste them into a shell.
#[must_use]
pub fn quote(args: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+@%".contains(c);
    let quoted = args.iter().map(|arg| {
        if !arg.is_empty() && arg.chars().all(plain) {
            arg.clone()
        } else {
            format!("'{}'", arg.replace('\'', "'\\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Run {
        Run {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            timeout: Duration::from_secs(20),
            log: PathBuf::new(),
            replies: Vec::new(),
            stop_at: Vec::new(),
        }
    }

    /// Runs it with a log that is gone afterwards.
    fn run(what: Run) -> Result<Transcript> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("console.log");
        super::run(&Run { log, ..what })
    }

    #[test]
    fn exit_status_and_lines_are_kept() {
        let transcript = run(shell(
            "printf 'a\\r\\n\\033[1mb\\033[0m\\n'; echo c >&2; exit 3",
        ))
        .unwrap();
        assert_eq!(transcript.end, End::Exited(Some(3)));
        assert!(
            transcript.lines.contains(&"a".to_owned())
                && transcript.lines.contains(&"b".to_owned())
        );
        assert!(transcript.lines.contains(&"c".to_owned()));
    }

    #[test]
    fn hanging_machine_is_ended_in_time() {
        let mut hang = shell("echo begin; exec sleep 60");
        hang.timeout = Duration::from_secs(2);
        let transcript = run(hang).unwrap();
        assert_eq!(transcript.end, End::TimedOut);
        assert_eq!(transcript.lines, ["begin"]);
        assert!(transcript.elapsed < Duration::from_secs(10));
    }

    #[test]
    fn closed_console_without_exit_is_a_timeout() {
        let mut hang = shell("exec sleep 60 >/dev/null 2>&1");
        hang.timeout = Duration::from_secs(2);
        assert_eq!(run(hang).unwrap().end, End::TimedOut);
    }

    #[test]
    fn flood_is_ended() {
        assert_eq!(run(shell("exec yes")).unwrap().end, End::Flooded);
    }

    #[test]
    fn stop_line_must_be_whole() {
        let mut halt = shell("echo 'ravelin: halted?'; echo 'ravelin: halted'; exec sleep 60");
        halt.stop_at = vec!["ravelin: halted".into()];
        let stop_at = halt.stop_at.clone();
        assert_eq!(run(halt).unwrap().end, End::Stopped);
        let mut other = shell("echo 'ravelin: halted?'; exit 0");
        other.stop_at = stop_at;
        assert_eq!(run(other).unwrap().end, End::Exited(Some(0)));
    }

    #[test]
    fn replies_are_typed_in_order_after_their_cues() {
        let mut talk = shell("printf 'one? '; read a; printf 'two? '; read b; echo \"got $a $b\"");
        talk.replies = vec![
            Reply {
                cue: "one? ".into(),
                send: "1\n".into(),
            },
            Reply {
                cue: "two? ".into(),
                send: "2\n".into(),
            },
        ];
        assert!(
            run(talk)
                .unwrap()
                .lines
                .last()
                .unwrap()
                .ends_with("got 1 2")
        );
    }

    #[test]
    fn cues_that_come_at_once_are_all_answered() {
        let mut talk = shell("printf 'one two '; read a; read b; echo \"got $a $b\"");
        talk.replies = vec![
            Reply {
                cue: "one ".into(),
                send: "1\n".into(),
            },
            Reply {
                cue: "two ".into(),
                send: "2\n".into(),
            },
        ];
        let transcript = run(talk).unwrap();
        assert!(transcript.lines.last().unwrap().ends_with("got 1 2"));
    }

    #[test]
    fn missing_program_is_an_error_that_says_what_to_do() {
        let mut missing = shell("");
        missing.program = "/nonexistent/qemu".into();
        assert!(format!("{:#}", run(missing).unwrap_err()).contains("make setup"));
    }

    #[test]
    fn arguments_are_quoted_for_a_shell() {
        assert_eq!(
            quote(&["-append".into(), "a b='c'".into()]),
            "-append 'a b='\\''c'\\'''"
        );
    }
}
