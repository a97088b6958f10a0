//! The targets under libFuzzer. `RAVELIN_FUZZ` names the target; the arguments are libFuzzer's.
#![no_main]

use std::sync::OnceLock;

static TARGET: OnceLock<ravelin_fuzz::Target> = OnceLock::new();

fn chosen() -> ravelin_fuzz::Target {
    let name = std::env::var("RAVELIN_FUZZ").unwrap_or_default();
    ravelin_fuzz::target(&name).unwrap_or_else(|| {
        let names = ravelin_fuzz::TARGETS.map(|target| target.name);
        eprintln!("RAVELIN_FUZZ must be one of {names:?}");
        std::process::exit(2);
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (TARGET.get_or_init(chosen).run)(data);
});
