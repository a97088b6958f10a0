//! What the image tool has put behind the hypervisor: a few named files.
//!
//! | offset | what |
//! |---|---|
//! | 0 | `RVLNPAY1` |
//! | 8 | number of files, 32 bits |
//! | 12 | for each: 16 bytes of name, offset and size (32 bits each) |

/// The files.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a>(&'a [u8]);

const MARK: &[u8] = b"RVLNPAY1";
const TABLE: usize = 12;
const ENTRY: usize = 24;

impl<'a> Payload<'a> {
    /// The payload in these bytes, if there is one.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.starts_with(MARK).then_some(Self(bytes))
    }

    /// A file's bytes.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&'a [u8]> {
        let count = word(self.0, MARK.len())?;
        let entries = self.0.get(TABLE..)?.chunks_exact(ENTRY).take(count);
        let mut found = entries.filter_map(|entry| self.entry(entry, name));
        found.next()
    }

    fn entry(&self, entry: &[u8], name: &str) -> Option<&'a [u8]> {
        let (called, place) = entry.split_at_checked(16)?;
        let called = called.split(|byte| *byte == 0).next()?;
        let (start, size) = (word(place, 0)?, word(place, 4)?);
        let bytes = self.0.get(start..start.checked_add(size)?)?;
        (called == name.as_bytes()).then_some(bytes)
    }

    /// The value of `name=value` among the hypervisor's arguments.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<&'a str> {
        let text = core::str::from_utf8(self.file("arguments")?).ok()?;
        text.split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(four.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn payload(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = MARK.to_vec();
        out.extend(u32::try_from(files.len()).unwrap().to_le_bytes());
        let mut at = TABLE + ENTRY * files.len();
        for (name, bytes) in files {
            let mut padded = name.as_bytes().to_vec();
            padded.resize(16, 0);
            out.extend(padded);
            out.extend(u32::try_from(at).unwrap().to_le_bytes());
            out.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
            at += bytes.len();
        }
        files.iter().for_each(|(_, bytes)| out.extend(*bytes));
        out
    }

    #[test]
    fn files_and_arguments_are_found_by_name() {
        let bytes = payload(&[("arguments", b"run=checks x=1"), ("kernel", b"abc")]);
        let p = Payload::new(&bytes).unwrap();
        assert_eq!(p.file("kernel"), Some(&b"abc"[..]));
        assert_eq!(p.file("kern"), None);
        assert_eq!(p.argument("run"), Some("checks"));
        assert_eq!(p.argument("x"), Some("1"));
        assert_eq!(p.argument("ru"), None);
    }

    proptest! {
        #[test]
        fn no_payload_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for (n, byte) in MARK.iter().enumerate() {
                if let Some(place) = bytes.get_mut(n) {
                    *place = *byte;
                }
            }
            if let Some(p) = Payload::new(&bytes) {
                let _ = p.file("x");
                let _ = p.argument("run");
            }
        }
    }
}
