//! The benchmark's table and chart.

use super::{Measurement, OPERATIONS, PEERS, TARGET_BOOT_PERCENT};
use std::fmt::Write;

/// The whole note, table included.
pub(super) fn markdown(measurements: &[Measurement]) -> String {
    let mut text = String::from(
        "# Guests: instructions per operation\n\n\
         Written by `make bench-target`. QEMU 10 `virt,gic-version=3`, 2 CPUs, 1 GiB, `-icount shift=0,sleep=off`: the guest's\n\
         counter counts instructions, of the guest, of EL2 and of the host. The payload's loops (`tests/guests/payload`), 4,096\n\
         rounds each (timer: 256), the loop's own instructions included. The peers ran kvm-unit-tests' `micro-bench` on the same\n\
         emulator, on the CPU model named: loops of the same kind, not the same code; its IPI and timer rows have a Linux-like\n\
         handler in them, its EOI row a longer loop. Instructions are repeatable; they are blind to what caches and TLBs cost.\n\n\
         * IPI: from the write of the SGI register until the other vCPU, which polls its interface, has acknowledged it.\n\
         * Timer: from the compare value until the handler has run, the vCPU awake.\n\
         * First touch on demand: the average over 4,096 pages in sequence. One fault maps 2 MiB where the host's memory allows\n\
         it, and without FEAT_S2FWB (cortex-a76) cleans those lines. One page: of memory that begins off a block's boundary.\n\
         * To the host and back: a read of a device, by a guest that makes no other; the host runs it on at once.\n\
         * Protected VM: the same payload, sealed; the target is at most 15 % more than the row without protection.\n\
         * Donation: by 512 pages, over 1 GiB; without wiping: less what the same memset and a loop over the same lines cost the\n\
         host, which is 4 instructions a page less than EL2's and so nothing in its favour; measured: by 64 pages with SHA-256.\n\
         * A Cortex-A76 overwrites its branch history at each entry of EL2, from a guest or from the host: 77 instructions, which\n\
         are in its column. A core with FEAT_CSV2_3 (max) need not.\n\
         * Lock: the host's call. 1 GiB by one block where the host's memory begins at a boundary of 1 GiB, else by 512 of 2 MiB.\n\
         * SMMU's share: what is added where an SMMU walks the same tables, on the same machine with a device attached to the VM and\n\
         without, or, for the host's own pages, on a machine with an SMMU and one without. The slots have 2 MiB. An emulator's SMMU\n\
         has done a command when it is asked: a real one takes its time.\n\n\
         ![chart](target.svg)\n\n",
    );
    let mut header = String::from("| operation | target |");
    for m in measurements {
        // Writing to a String cannot fail.
        let _ = write!(header, " **Ravelin** ({}) |", m.cpu);
    }
    for peer in PEERS {
        let _ = write!(header, " {peer} |");
    }
    let columns = header.matches('|').count() - 1;
    let _ = writeln!(text, "{header}\n|{}", " --- |".repeat(columns));
    for (place, operation) in OPERATIONS.iter().enumerate() {
        let _ = write!(
            text,
            "| {} | {} |",
            operation.title,
            figure(operation.target)
        );
        for m in measurements {
            let _ = write!(text, " {} |", figure(m.operations.get(place).copied()));
        }
        for peer in operation.peers {
            let _ = write!(text, " {} |", figure(peer));
        }
        text.push('\n');
    }
    for m in measurements {
        let percent = m.protected_percent();
        let _ = writeln!(
            text,
            "\n{}: protection adds at most {percent} % to an exit.",
            m.cpu
        );
    }
    boots(&mut text, measurements);
    text
}

fn boots(text: &mut String, measurements: &[Measurement]) {
    text.push_str(
        "\nLinux (Debian's arm64 kernel) from its entry to user space, one vCPU, locked memory; the median over nine sizes of RAM.\n\
         Most of what a guest adds is its console: some 15,000 characters, two accesses each that the host emulates.\n\n\
         | million instructions | bare, at EL1 | guest | more than bare | target |\n| --- | --- | --- | --- | --- |\n",
    );
    for m in measurements {
        let millions = |count: u64| format!("{}.{}", count / 1_000_000, count / 100_000 % 10);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:+.2} % | under {TARGET_BOOT_PERCENT} % |",
            m.cpu,
            millions(m.boot_bare),
            millions(m.boot_guest),
            m.boot_percent()
        );
    }
}

fn figure(value: Option<u64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| value.to_string())
}

const WIDTH: u64 = 760;
const LABELS: u64 = 230;
const NAMES: u64 = 150;
const BAR: u64 = 12;
/// Longest bar's figure; longer ones are cut.
const LONGEST: u64 = 11_000;

/// A group of bars for each operation, on one scale.
pub(super) fn svg(measurements: &[Measurement]) -> String {
    let groups: Vec<_> = OPERATIONS
        .iter()
        .enumerate()
        .map(|(place, operation)| (operation.title, bars(measurements, place)))
        .collect();
    let rows: usize = groups.iter().map(|(_, bars)| bars.len()).sum();
    let height = rows as u64 * (BAR + 2) + groups.len() as u64 * 10 + 16;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    let mut top = 8;
    for (title, bars) in groups {
        let _ = writeln!(
            text,
            "<text x=\"8\" y=\"{}\" font-weight=\"bold\">{title}</text>",
            top + 10
        );
        for (label, value, colour) in bars {
            let length = value.min(LONGEST) * (WIDTH - LABELS - NAMES - 60) / LONGEST;
            let (left, baseline) = (LABELS + NAMES, top + 10);
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"{baseline}\" text-anchor=\"end\">{label}</text>\
                 <rect x=\"{left}\" y=\"{top}\" width=\"{length}\" height=\"{BAR}\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"{baseline}\">{value}</text>",
                left - 6,
                left + length + 4
            );
            top += BAR + 2;
        }
        top += 10;
    }
    text.push_str("</svg>\n");
    text
}

fn bars(measurements: &[Measurement], place: usize) -> Vec<(String, u64, &'static str)> {
    let ours = measurements.iter().filter_map(|m| {
        let value = m.operations.get(place)?;
        Some((format!("Ravelin ({})", m.cpu), *value, "#2b6cb0"))
    });
    let peers = OPERATIONS.get(place).into_iter().flat_map(|operation| {
        let named = PEERS.into_iter().zip(operation.peers);
        named.filter_map(|(name, value)| Some((name.to_owned(), value?, "#9aa5b1")))
    });
    ours.chain(peers).collect()
}
