//! Calls to EL2: our own hypercalls and PSCI, by HVC; firmware calls by SMC.

use abi::{Call, Counter, ErrorCode, Features, SMCCC_SUCCESS};
use smccc::psci;
use smccc::{Hvc, Smc};

use crate::console::line;

/// How a raw call is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Conduit {
    /// HVC #0.
    Hvc,
    /// SMC #0, which EL2 traps.
    Smc,
}

/// Makes a call with any id and up to three arguments; gives `x0..x3`.
pub(crate) fn raw(conduit: Conduit, id: u32, args: [u64; 3]) -> [u64; 4] {
    let mut wide = [0; 17];
    wide[..3].copy_from_slice(&args);
    let answer = match conduit {
        Conduit::Hvc => smccc::hvc64(id, wide),
        Conduit::Smc => smccc::smc64(id, wide),
    };
    [answer[0], answer[1], answer[2], answer[3]]
}

/// One of our own hypercalls.
pub(crate) fn hypercall(call: Call, argument: u64) -> Result<u64, ErrorCode> {
    let [status, value, ..] = raw(Conduit::Hvc, call as u32, [argument, 0, 0]);
    if status != SMCCC_SUCCESS {
        return Err(ErrorCode::NotFound);
    }
    abi::from_register(value)
}

/// What EL2 says it can do; nothing if it does not say.
pub(crate) fn features() -> Features {
    Features::from_bits(hypercall(Call::Features, 0).unwrap_or(0))
}

/// A counter of EL2's.
pub(crate) fn counter(counter: Counter) -> Result<u64, ErrorCode> {
    hypercall(Call::HostCounter, counter as u64)
}

/// The PSCI version by both conduits.
pub(crate) fn psci_versions() -> [Option<(u16, u16)>; 2] {
    [psci::version::<Hvc>(), psci::version::<Smc>()].map(|v| v.ok().map(|v| (v.major, v.minor)))
}

/// Ends the machine.
pub(crate) fn system_off() -> ! {
    let result = psci::system_off::<Hvc>();
    line(format_args!("host: SYSTEM_OFF came back: {result:?}"));
    crate::arch::halt()
}

/// An SMC with all 64 bits of `x0` given; gives `x0`.
pub(crate) fn smc_with_x0(id: u64) -> u64 {
    crate::arch::smc(id)
}
