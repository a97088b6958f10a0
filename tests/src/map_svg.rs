//! A picture of a guest's address space, from the lines that `vm map` prints at the monitor's prompt.
//!
//! Each run of equal leaves is a box as long as the logarithm of its size; gaps are cut short. Colour is the memory
//! type, the text says addresses, permissions and the leaves' size.

use anyhow::{Result, ensure};
use std::fmt::Write;

/// A line of `vm map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leaves<'a> {
    start: u64,
    end: u64,
    output: u64,
    level: u8,
    permissions: &'a str,
    mem_attr: u8,
}

/// Height of a box per doubling of its size above a page, in pixels.
const STEP: u32 = 4;
const LEAST: u32 = 22;
const GAP: u32 = 26;
const LEFT: u32 = 150;
const WIDTH: u32 = 420;
const PAGE: u64 = 4096;

/// Draws the runs that `text` lists; other lines are skipped.
///
/// # Errors
/// There is no such line.
pub fn draw(text: &str) -> Result<String> {
    let runs: Vec<_> = text.lines().filter_map(parse).collect();
    ensure!(
        !runs.is_empty(),
        "no line like '0x40000000..0x40200000 -> 0x7f800000 level 2 rw-- MemAttr 0xf'"
    );
    let mut body = String::new();
    let mut y = 40;
    let mut end = None;
    for run in &runs {
        if end.is_some_and(|end| end < run.start) {
            gap(&mut body, &mut y);
        }
        boxed(&mut body, &mut y, run);
        end = Some(run.end);
    }
    Ok(frame(&body, y + 60, y + 20))
}

/// `0x…..0x… -> 0x… level N rwxu MemAttr 0xN`, with anything before it.
fn parse(line: &str) -> Option<Leaves<'_>> {
    let (range, rest) = line.split_once(" -> ")?;
    let (start, end) = range.trim().split_once("..")?;
    let start = start.split_whitespace().last()?;
    let mut words = rest.split_whitespace();
    let output = hexadecimal(words.next()?)?;
    let level = (words.next()? == "level").then(|| words.next())??;
    let permissions = words.next().filter(|text| text.len() == 4)?;
    let mem_attr = (words.next()? == "MemAttr").then(|| words.next())??;
    let run = Leaves {
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
        output,
        level: level.parse().ok().filter(|level| (1..=3).contains(level))?,
        permissions,
        mem_attr: u8::try_from(hexadecimal(mem_attr)?).ok()?,
    };
    (run.start < run.end).then_some(run)
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Name and colour of a memory type (Arm ARM D8.6.6; 6 and 7 only mean this with FEAT_S2FWB).
const fn memory_type(mem_attr: u8) -> (&'static str, &'static str) {
    match mem_attr {
        0..=3 => ("device", "#e07a5f"),
        5 => ("non-cacheable", "#f2cc8f"),
        6 => ("forced write-back", "#3d8b6e"),
        7 => ("as the guest says (forced write-back off)", "#81b29a"),
        0xa => ("write-through", "#b8c480"),
        0xf => ("as the guest says", "#6d9dc5"),
        _ => ("other", "#b0b0b0"),
    }
}

fn gap(out: &mut String, y: &mut u32) {
    let middle = *y + GAP / 2;
    // Writing to a string never fails.
    let _ = writeln!(
        out,
        r##"<text x="{}" y="{}" class="gap">nothing mapped</text>"##,
        LEFT + 12,
        middle + 4
    );
    *y += GAP;
}

fn boxed(out: &mut String, y: &mut u32, run: &Leaves<'_>) {
    let size = run.end - run.start;
    let height = LEAST + STEP * (size / PAGE).max(1).ilog2();
    let (name, colour) = memory_type(run.mem_attr);
    let leaf = [1 << 30, 2 << 20, PAGE][usize::from(run.level - 1)];
    let _ = writeln!(
        out,
        r##"<text x="{}" y="{}" class="address">{:#x}</text>"##,
        LEFT - 10,
        *y + 12,
        run.start
    );
    let _ = writeln!(
        out,
        r##"<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{height}" fill="{colour}"/>"##
    );
    let _ = writeln!(
        out,
        r##"<text x="{}" y="{}" class="label">{}, {} in leaves of {}, {name}</text>"##,
        LEFT + 12,
        *y + height / 2 + 4,
        run.permissions,
        bytes(size),
        bytes(leaf)
    );
    let _ = writeln!(
        out,
        r##"<text x="{}" y="{}" class="output">to {:#x}</text>"##,
        LEFT + WIDTH + 10,
        *y + 12,
        run.output
    );
    *y += height;
}

fn bytes(size: u64) -> String {
    match size {
        _ if size.is_multiple_of(1 << 30) => format!("{} GiB", size >> 30),
        _ if size.is_multiple_of(1 << 20) => format!("{} MiB", size >> 20),
        _ => format!("{} KiB", size >> 10),
    }
}

fn frame(body: &str, height: u32, legend: u32) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="740" height="{height}" font-family="sans-serif" font-size="12">
<style>.address {{ text-anchor: end; font-family: monospace }} .output {{ font-family: monospace; fill: #555 }} .gap {{ fill: #888; font-style: italic }} rect {{ stroke: white }}</style>
<rect width="100%" height="100%" fill="white"/>
<text x="{LEFT}" y="24" font-size="15">Stage 2 of a guest: IPA, leaves, physical address</text>
{body}<text x="{LEFT}" y="{legend}" fill="#555">r, w: read, write; x, u: execute at EL1, EL0. A box grows with the logarithm of its size.</text>
</svg>
"##
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
ravelin> vm map 1
0x0008010000..0x0008011000 -> 0x00ff846000 level 3 rw-- MemAttr 0x1
0x0040000000..0x0041200000 -> 0x001b800000 level 2 rwxu MemAttr 0xf
0x0041200000..0x0041e00000 -> 0x001ca00000 level 2 rw-- MemAttr 0xf
";

    #[test]
    fn a_line_of_the_monitor_is_read() {
        let run = parse(MAP.lines().nth(1).unwrap()).unwrap();
        let expected = Leaves {
            start: 0x0801_0000,
            end: 0x0801_1000,
            output: 0xff84_6000,
            level: 3,
            permissions: "rw--",
            mem_attr: 1,
        };
        assert_eq!(run, expected);
        assert_eq!(
            parse(&format!("[vm1] {}", MAP.lines().nth(1).unwrap())),
            Some(expected)
        );
    }

    #[test]
    fn other_lines_are_none() {
        for line in [
            "",
            "/ # ls",
            "0x1000..0x2000 -> 0x0 level 4 rw-- MemAttr 0xf",
            "0x2000..0x1000 -> 0x0 level 3 rw-- MemAttr 0xf",
            "0x1000..0x2000 -> 0x0 level 3 rw MemAttr 0xf",
            "0x1000..0x2000 -> nowhere level 3 rw-- MemAttr 0xf",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn every_run_has_a_box_and_only_holes_have_a_gap() {
        let svg = draw(MAP).unwrap();
        assert_eq!(svg.matches("<rect x=").count(), 3);
        assert_eq!(svg.matches("nothing mapped").count(), 1);
        assert!(svg.contains("rwxu, 18 MiB in leaves of 2 MiB, as the guest says"));
        assert!(svg.contains("rw--, 4 KiB in leaves of 4 KiB, device"));
        assert!(svg.contains("to 0xff846000"));
    }

    #[test]
    fn text_without_a_map_is_refused() {
        assert!(draw("hello\n").is_err());
    }
}
