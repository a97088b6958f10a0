//! The guest programs of guests.S as bytes.

macro_rules! program {
    ($name:ident, $start:ident, $end:ident, $what:literal) => {
        #[doc = $what]
        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both symbols bound one program of the read-only data.
            unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

program!(
    driven,
    guest_driven,
    guest_driven_end,
    "Does what its owner says; at 0x8000."
);
program!(
    rom,
    guest_rom,
    guest_rom_end,
    "Jumps from the reset vector to 0x1000; at 0xfffff000."
);
program!(
    real,
    guest_real,
    guest_real_end,
    "One exit of each kind in real mode; at 0x1000."
);
program!(
    other,
    guest_other,
    guest_other_end,
    "An application processor; at 0x9000."
);
