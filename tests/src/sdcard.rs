//! The folder that goes onto a Raspberry Pi's boot partition.

use crate::{emulate, files};
use anyhow::{Result, ensure};
use clap::ValueEnum;
use std::path::PathBuf;

/// A board with an SD card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Card {
    /// Raspberry Pi 4 B.
    Rpi4,
    /// Raspberry Pi 5.
    Rpi5,
}

/// Where the firmware puts the image, in bytes. It must be a multiple of 2 MiB (kernel documentation
/// `arch/arm64/booting.rst`), and newer and older firmware have different defaults.
const LOAD_ADDRESS: u64 = 0x20_0000;

/// Writes `build/sdcard-BOARD/` and returns its path.
///
/// # Errors
/// The image has not been built, has no arm64 header or one that the firmware could not use.
pub fn write(card: Card) -> Result<PathBuf> {
    let mut image = files::read(&emulate::ravelin_image(), "run `make build`")?;
    let size = check(&image)?;
    // Firmware that puts something behind the kernel may count the file's bytes; the image clears what is
    // behind those before it reads anything.
    image.resize(size, 0);
    let (name, notes, extra) = match card {
        Card::Rpi4 => ("rpi4", RPI4_NOTES, RPI4_CONFIG),
        Card::Rpi5 => ("rpi5", RPI5_NOTES, RPI5_CONFIG),
    };
    let folder = files::build(&format!("sdcard-{name}"));
    files::write(&folder.join("ravelin.img"), &image)?;
    files::write(&folder.join("config.txt"), config(extra).as_bytes())?;
    files::write(
        &folder.join("README.txt"),
        format!("{notes}{NOTES}").as_bytes(),
    )?;
    Ok(folder)
}

/// The header's fields (little endian): text offset at 8, size in memory at 16, flags at 24, magic at 56.
/// Gives the size.
fn check(image: &[u8]) -> Result<usize> {
    ensure!(
        crate::kernel_image::is_arm64_image(image),
        "the image has no arm64 header: rebuild it"
    );
    let field = |at: usize| {
        image
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    };
    ensure!(
        field(8) == 0,
        "the image's text offset is {:#x}: kernel_address in config.txt assumes 0",
        field(8)
    );
    ensure!(
        field(16) >= image.len() as u64,
        "the header's size {:#x} is smaller than the file",
        field(16)
    );
    ensure!(field(24) & 1 == 0, "the image is big endian");
    ensure!(
        field(24) & 8 != 0,
        "the image is not position independent (flag bit 3)"
    );
    Ok(usize::try_from(field(16))?)
}

fn config(extra: &str) -> String {
    format!(
        "# Ravelin. Replaces the config.txt of the boot partition.\n\
         arm_64bit=1\n\
         kernel=ravelin.img\n\
         # Older firmware loads to 0x80000, newer to 0x200000: say it.\n\
         kernel_address={LOAD_ADDRESS:#x}\n\
         # A FIT with payloads, if you copy one: any name; the firmware finds room for it.\n\
         #initramfs payload.fit followkernel\n\
         enable_uart=1\n\
         uart_2ndstage=1\n\
         {extra}"
    )
}

const RPI4_CONFIG: &str = "\
# The first PL011 on the header pins: Bluetooth would take it.
dtoverlay=disable-bt
# The firmware must set the interrupt controller up for us.
enable_gic=1
";

const RPI5_CONFIG: &str = "\
# We are no Linux that the firmware knows.
os_check=0
# Leave RP1 alive, behind which the header's pins are.
pciex4_reset=0
";

const RPI4_NOTES: &str = "\
Ravelin on a Raspberry Pi 4 B

1. Take an SD card whose boot partition (FAT32) has the Raspberry Pi firmware: start4.elf, fixup4.dat,
   bcm2711-rpi-4-b.dtb and overlays/disable-bt.dtbo. Any Raspberry Pi OS card has them.
2. Copy ravelin.img and config.txt from this folder onto it (config.txt replaces the one there).
3. Serial line, 3.3 V (never 5 V, never RS-232): pin 6 ground, pin 8 TXD (GPIO 14) to your adapter's RXD,
   pin 10 RXD (GPIO 15) to its TXD. 115200 baud, 8 data bits, no parity, 1 stop bit, no flow control.
4. Power on.
";

const RPI5_NOTES: &str = "\
Ravelin on a Raspberry Pi 5

1. Take an SD card whose boot partition (FAT32) has the Raspberry Pi firmware's bcm2712*-rpi-5-b.dtb (which
   one depends on the stepping) and overlays/. Any Raspberry Pi OS card has them; the boot loader itself is in the board's EEPROM.
2. Copy ravelin.img and config.txt from this folder onto it (config.txt replaces the one there).
3. Serial line, 3.3 V: the three-pin debug connector between the two HDMI sockets (a JST-SH cable such as the
   Debug Probe's). 115200 baud, 8 data bits, no parity, 1 stop bit, no flow control.
4. Power on.
";

const NOTES: &str = "
What to expect on the line, after the firmware's own messages:
   lines that begin with 'ravelin: '   EL2: board, console, memory, CPUs brought up one by one
   ravelin: boot: N ticks ...           EL2 is done and enters the host
   the host's report                    CPUs, memory, interrupt controller, features; then 'N passed, 0 failed'
If something is missing, one line says what: 'ravelin: fatal: ...', then 'ravelin: halted'.
Nothing at all: check the wiring, then config.txt's kernel= and kernel_address=.

Honest words: this folder is made by rule from the firmware's documentation and the device trees of Debian's kernel.
The image runs on emulators; on this board's silicon it has not been run yet. The board has no IOMMU in front of
its devices, so a device can defeat isolation.
";

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text_offset: u64, size: u64, flags: u64) -> Vec<u8> {
        let mut image = vec![0; 64];
        image[8..16].copy_from_slice(&text_offset.to_le_bytes());
        image[16..24].copy_from_slice(&size.to_le_bytes());
        image[24..32].copy_from_slice(&flags.to_le_bytes());
        image[56..60].copy_from_slice(b"ARM\x64");
        image
    }

    #[test]
    fn header_is_checked_field_by_field() {
        assert_eq!(check(&image(0, 0x1000, 0b1010)).unwrap(), 0x1000);
        assert!(check(&image(0x80000, 64, 0b1010)).is_err());
        assert!(check(&image(0, 63, 0b1010)).is_err());
        assert!(check(&image(0, 64, 0b1011)).is_err());
        assert!(check(&image(0, 64, 0b0010)).is_err());
        assert!(check(&[0; 64]).is_err());
        assert!(check(&[]).is_err());
    }

    #[test]
    fn config_names_the_image_and_an_aligned_address() {
        assert_eq!(LOAD_ADDRESS % (2 << 20), 0);
        let text = config(RPI4_CONFIG);
        for line in [
            "arm_64bit=1",
            "kernel=ravelin.img",
            "kernel_address=0x200000",
            "enable_uart=1",
            "enable_gic=1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}");
        }
        assert!(config(RPI5_CONFIG).lines().any(|l| l == "os_check=0"));
    }

    #[test]
    fn no_line_of_config_is_longer_than_the_firmware_reads() {
        // The firmware's documented limit is 98 characters a line.
        assert!(
            [RPI4_CONFIG, RPI5_CONFIG]
                .iter()
                .all(|extra| config(extra).lines().all(|line| line.len() <= 98))
        );
    }
}
