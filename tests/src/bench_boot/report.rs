//! The benchmark's table and chart.

use super::{Measurement, TARGET_EL2_BOOT, TARGET_PERCENT, TARGET_RESIDENT_KIB, percent_more};
use std::fmt::Write;

/// The whole note, table included.
pub(super) fn markdown(measurements: &[Measurement], image_kib: usize) -> String {
    let mut text = String::from(
        "# Boot: instructions from reset to Linux's user space\n\n\
         Written by `make bench-boot`. One CPU, 1 GiB, GICv3, Debian's arm64 kernel with the project's initramfs; QEMU with\n\
         `-icount shift=0,sleep=off`, so the counter that a program reads in user space counts instructions since reset.\n\
         Instructions are repeatable; they are blind to what caches and TLBs cost. Linux's own boot moves with\n\
         where things lie in memory, bare or not: each figure is the median over nine sizes of RAM from 1,024 MiB on, and the last\n\
         column is how far the nine are apart. A difference of much less than that says little.\n\n\
         ![chart](boot.svg)\n\n\
         | million instructions | bare, entered at EL1 | bare, entered at EL2 | under Ravelin | more than bare at EL1 | more than bare at EL2 | spread |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for m in measurements {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {:+.2} % | {:+.2} % | {:.1} % |",
            m.cpu,
            millions(m.bare_el1),
            millions(m.bare_el2),
            millions(m.under),
            m.overhead_percent(),
            percent_more(m.bare_el2, m.under),
            m.spread_percent
        );
    }
    text.push_str("\n| | target | measured |\n| --- | --- | --- |\n");
    for m in measurements {
        let _ = writeln!(
            text,
            "| {}: more than bare at EL1 | under {TARGET_PERCENT} % | {:+.2} % |",
            m.cpu,
            m.overhead_percent()
        );
        let _ = writeln!(
            text,
            "| {}: EL2's own boot, instructions | under {TARGET_EL2_BOOT} | {} |",
            m.cpu, m.el2_boot
        );
        let _ = writeln!(
            text,
            "| {}: memory that EL2 keeps, KiB | under {TARGET_RESIDENT_KIB} | {} |",
            m.cpu, m.resident_kib
        );
    }
    let _ = writeln!(text, "| image, KiB | – | {image_kib} |");
    text
}

fn millions(instructions: u64) -> String {
    format!(
        "{}.{:01}",
        instructions / 1_000_000,
        instructions / 100_000 % 10
    )
}

const WIDTH: u64 = 640;
const LABELS: u64 = 230;
const BAR: u64 = 18;

/// A bar for each figure, on one scale.
pub(super) fn svg(measurements: &[Measurement]) -> String {
    let bars: Vec<_> = measurements.iter().flat_map(bars).collect();
    let longest = bars.iter().map(|bar| bar.1).max().unwrap_or(1).max(1);
    let height = bars.len() as u64 * (BAR + 8) + 16;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (row, (label, value, colour)) in bars.iter().enumerate() {
        let top = 8 + row as u64 * (BAR + 8);
        let length = value * (WIDTH - LABELS - 70) / longest;
        let baseline = top + 13;
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{baseline}\" text-anchor=\"end\">{label}</text>",
            LABELS - 8
        );
        let _ = writeln!(
            text,
            "<rect x=\"{LABELS}\" y=\"{top}\" width=\"{length}\" height=\"{BAR}\" fill=\"{colour}\"/>"
        );
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{baseline}\">{} M</text>",
            LABELS + length + 6,
            millions(*value)
        );
    }
    text.push_str("</svg>\n");
    text
}

fn bars(m: &Measurement) -> [(String, u64, &'static str); 3] {
    [
        (
            format!("{}: bare, entered at EL1", m.cpu),
            m.bare_el1,
            "#9aa5b1",
        ),
        (
            format!("{}: bare, entered at EL2", m.cpu),
            m.bare_el2,
            "#7b8794",
        ),
        (format!("{}: under Ravelin", m.cpu), m.under, "#2b6cb0"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Measurement {
        Measurement {
            cpu: "max",
            bare_el1: 1_000_000_000,
            bare_el2: 1_100_000_000,
            under: 1_010_000_000,
            el2_boot: 3_000_000,
            resident_kib: 2500,
            spread_percent: 2.25,
        }
    }

    #[test]
    fn table_has_figures_and_percentages() {
        let text = markdown(&[sample()], 200);
        assert!(
            text.contains("| max | 1000.0 | 1100.0 | 1010.0 | +1.00 % | -8.18 % | 2.2 % |"),
            "{text}"
        );
        assert!(text.contains("| image, KiB | – | 200 |"));
    }

    #[test]
    fn longest_bar_fills_the_chart() {
        let text = svg(&[sample()]);
        assert!(text.contains(&format!(
            "width=\"{}\" height=\"{BAR}\"",
            WIDTH - LABELS - 70
        )));
        assert_eq!(text.matches("<rect").count(), 4);
    }
}
