//! The tables of the disk's benchmark.

use super::{ACCESSES, CPU, Row};
use std::fmt::Write as _;

pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text = format!(
        "# A disk with and without an SMMU\n\n\
         `make bench-disk` writes this file. QEMU's `virt` with GICv3, one CPU ({CPU}), a virtio block device on the PCI bus\n\
         whose bytes are a file; Debian's kernel, `dd` past its cache, one request at a time; the best of five rounds.\n\n\
         ## Million bytes a second\n\n\
         An emulator's figures, in real time: they depend on the machine that it runs on and on what else that does, and they hold QEMU's\n\
         cost of an SMMU, whose walks hardware makes beside.\n\n"
    );
    header(&mut text);
    for row in rows {
        let _ = write!(text, "| {} |", row.setup.title);
        for speed in &row.speed {
            let _ = write!(text, " {speed:.1} |");
        }
        text.push('\n');
    }
    text.push_str(
        "\n## Thousand instructions for each MiB\n\n\
Of all exception levels, under `-icount shift=0`. Linux idles while the disk works and looks after its timers then, which makes\n\
         small requests vary by some 3 %. Bare, Linux maps and unmaps each buffer and waits for the SMMU (its default, strict). With the\n\
         SMMU EL2's it maps nothing: a bus address is the physical one, in tables that are there already. A guest can't count.\n\n",
    );
    header(&mut text);
    for row in rows {
        let Some(counts) = &row.instructions else {
            continue;
        };
        let _ = write!(text, "| {} |", row.setup.title);
        for count in counts {
            let _ = write!(text, " {} |", (count + 500) / 1000);
        }
        text.push('\n');
    }
    text
}

fn header(text: &mut String) {
    text.push_str("| who drives the disk |");
    for (what, block) in ACCESSES {
        let (number, unit) = if block < 1 << 20 {
            (block >> 10, "KiB")
        } else {
            (block >> 20, "MiB")
        };
        // Writing to a String cannot fail.
        let _ = write!(text, " {what} by {number} {unit} |");
    }
    let _ = writeln!(text, "\n| --- |{}", " --- |".repeat(ACCESSES.len()));
}
