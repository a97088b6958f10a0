//! The keys of the console: which of them are the monitor's, which go to a guest.
//!
//! Ctrl-A is the escape key. Behind it: a digit switches the input to that VM, `c` opens the
//! prompt, Ctrl-A sends one Ctrl-A, anything else is ignored.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;
/// Longest line at the prompt.
const LINE: usize = 80;

/// What a key means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Key {
    /// Nothing yet, or nothing at all.
    None,
    /// For the guest that has the input.
    Guest(u8),
    /// The input goes to the VM with this number from now on.
    Switch(u8),
    /// The prompt is open.
    OpenPrompt,
    /// A character of the prompt's line, to be shown.
    Echo(u8),
    /// The last character of the line is gone.
    Rubout,
    /// The prompt's line is complete: see [`Keys::line`].
    Line,
}

/// State of the keyboard.
#[derive(Debug)]
pub struct Keys {
    escaped: bool,
    prompt: bool,
    line: [u8; LINE],
    length: usize,
}

impl Default for Keys {
    fn default() -> Self {
        Self::new()
    }
}

impl Keys {
    /// Input goes to a guest.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            escaped: false,
            prompt: false,
            line: [0; LINE],
            length: 0,
        }
    }

    /// Whether the prompt is open.
    #[must_use]
    pub const fn at_prompt(&self) -> bool {
        self.prompt
    }

    /// A key was pressed.
    pub fn press(&mut self, byte: u8) -> Key {
        if core::mem::take(&mut self.escaped) {
            return self.escape(byte);
        }
        match byte {
            ESCAPE => {
                self.escaped = true;
                Key::None
            }
            byte if self.prompt => self.edit(byte),
            byte => Key::Guest(byte),
        }
    }

    fn escape(&mut self, byte: u8) -> Key {
        match byte {
            ESCAPE if !self.prompt => Key::Guest(ESCAPE),
            b'0'..=b'9' => {
                self.prompt = false;
                Key::Switch(byte - b'0')
            }
            b'c' => {
                self.prompt = true;
                self.length = 0;
                Key::OpenPrompt
            }
            _ => Key::None,
        }
    }

    fn edit(&mut self, byte: u8) -> Key {
        match byte {
            b'\r' | b'\n' => {
                self.prompt = false;
                Key::Line
            }
            0x7f | 0x08 if self.length > 0 => {
                self.length -= 1;
                Key::Rubout
            }
            0x20..0x7f => match self.line.get_mut(self.length) {
                Some(place) => {
                    *place = byte;
                    self.length += 1;
                    Key::Echo(byte)
                }
                None => Key::None,
            },
            _ => Key::None,
        }
    }

    /// The line that [`Key::Line`] has completed.
    #[must_use]
    pub fn line(&self) -> &str {
        let bytes = self.line.get(..self.length).unwrap_or(&[]);
        core::str::from_utf8(bytes).unwrap_or("")
    }
}

/// A command of the prompt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// `help`, or an empty line.
    Help,
    /// `vm list`
    List,
    /// `vm stat N`
    Stat(u8),
    /// `vm map N`
    Map(u8),
    /// `vm young N`: how much of its memory a VM has used since this was last asked.
    Young(u8),
    /// Try to read a VM's memory.
    Scan(u8),
    /// `vm pause N`
    Pause(u8),
    /// `vm resume N`
    Resume(u8),
    /// `vm reset N`
    Reset(u8),
    /// `vm stop N`
    Stop(u8),
    /// Anything else.
    Unknown,
}

impl Command {
    /// What `help` shows.
    pub const HELP: &'static str = "vm list | vm stat N | vm map N | vm young N | vm scan N | vm pause N | vm resume N | \
        vm reset N | vm stop N | help    (Ctrl-A N: input to VM N, Ctrl-A c: this prompt)";

    /// Reads a line.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let (first, verb, number) = (words.next(), words.next(), words.next());
        if words.next().is_some() {
            return Self::Unknown;
        }
        let number = number.map(|text| text.parse::<u8>().ok());
        match (first, verb, number) {
            (None | Some("help"), None, None) => Self::Help,
            (Some("vm"), Some("list"), None) => Self::List,
            (Some("vm"), Some(verb), Some(Some(n))) => match verb {
                "stat" => Self::Stat(n),
                "map" => Self::Map(n),
                "young" => Self::Young(n),
                "scan" => Self::Scan(n),
                "pause" => Self::Pause(n),
                "resume" => Self::Resume(n),
                "reset" => Self::Reset(n),
                "stop" => Self::Stop(n),
                _ => Self::Unknown,
            },
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(keys: &mut Keys, bytes: &[u8]) -> Key {
        bytes.iter().fold(Key::None, |_, byte| keys.press(*byte))
    }

    #[test]
    fn ordinary_keys_go_to_the_guest() {
        let mut keys = Keys::new();
        assert_eq!(keys.press(b'x'), Key::Guest(b'x'));
        assert_eq!(keys.press(0x03), Key::Guest(0x03));
    }

    #[test]
    fn the_escape_key_switches_sends_itself_or_opens_the_prompt() {
        let mut keys = Keys::new();
        assert_eq!(press(&mut keys, b"\x012"), Key::Switch(2));
        assert_eq!(press(&mut keys, b"\x01\x01"), Key::Guest(1));
        assert_eq!(press(&mut keys, b"\x01z"), Key::None);
        assert_eq!(press(&mut keys, b"\x01c"), Key::OpenPrompt);
        assert!(keys.at_prompt());
    }

    #[test]
    fn a_line_is_edited_and_read() {
        let mut keys = Keys::new();
        press(&mut keys, b"\x01c");
        assert_eq!(press(&mut keys, b"vm lisx"), Key::Echo(b'x'));
        assert_eq!(keys.press(0x7f), Key::Rubout);
        assert_eq!(press(&mut keys, b"t\r"), Key::Line);
        assert_eq!(keys.line(), "vm list");
        assert_eq!(keys.press(b'a'), Key::Guest(b'a'));
        press(&mut keys, b"\x01c");
        assert_eq!(press(&mut keys, b"\r"), Key::Line);
        assert_eq!(keys.line(), "");
    }

    #[test]
    fn a_line_that_is_too_long_stays_as_long_as_it_may_be() {
        let mut keys = Keys::new();
        press(&mut keys, b"\x01c");
        assert_eq!(press(&mut keys, &[b'a'; 200]), Key::None);
        press(&mut keys, b"\r");
        assert_eq!(keys.line().len(), LINE);
    }

    #[test]
    fn commands_are_read_and_others_are_unknown() {
        assert_eq!(Command::parse(" help "), Command::Help);
        assert_eq!(Command::parse(""), Command::Help);
        assert_eq!(Command::parse("vm list"), Command::List);
        assert_eq!(Command::parse("vm stat 1"), Command::Stat(1));
        assert_eq!(Command::parse("vm young 2"), Command::Young(2));
        assert_eq!(Command::parse("vm stop 3"), Command::Stop(3));
        for wrong in [
            "vm",
            "vm list 1",
            "vm stat",
            "vm stat x",
            "vm stat 1 2",
            "vm fly 1",
        ] {
            assert_eq!(Command::parse(wrong), Command::Unknown, "{wrong}");
        }
    }
}
