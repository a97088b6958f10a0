//! Calls to EL3 firmware.

/// Makes an SMC with these registers and gives `x0..x3` of the answer.
///
/// Only for boards whose device tree says that there is firmware behind SMC: without it the
/// instruction is undefined or hangs the core. The callers forward allow-listed calls or PSCI.
pub(crate) fn call(id: u64, args: [u64; 7]) -> [u64; 4] {
    let mut wide = [0; 17];
    wide[..7].copy_from_slice(&args);
    let id = u32::try_from(id).unwrap_or(u32::MAX);
    let answer = smccc::smc64(id, wide);
    [answer[0], answer[1], answer[2], answer[3]]
}
