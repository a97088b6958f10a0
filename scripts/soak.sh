#!/usr/bin/env bash
# What takes long: SOAK seconds (600) of fuzzing, shared by all targets, then attacks from every core on the emulator.
# Before them the reference model, with more steps than `make test` has time for.
#   scripts/soak.sh [model|fuzz|attacks] [target...]
# Fuzzing is guided by coverage where there is a C++ compiler for libFuzzer's runtime, else it is blind and says so.
# What it finds is in target/fuzz: the growing corpus, and inputs that fail as fail-TARGET-*.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
SOAK="${SOAK:-600}"
what="${1:-all}"
shift || true
targets=("$@")
[ "${#targets[@]}" -gt 0 ] || mapfile -t targets < <(ls tests/fuzz/corpus)
HOST="$("$RUSTC" -vV | sed -n 's/^host: //p')"
FOLDER="$PWD/target/fuzz"

step() { printf '\n== soak: %s\n' "$1"; }

# LLVM's coverage passes are part of every rustc; --target keeps them out of build scripts.
build_fuzzer() {
    local passes=(-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
        -Cllvm-args=-sanitizer-coverage-trace-compares)
    RUSTFLAGS="${passes[*]} --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1" \
        CARGO_TARGET_DIR="$FOLDER" "$CARGO" build --quiet --release --target "$HOST" \
        -p ravelin-fuzz --features libfuzzer --bin fuzz
}

fuzz_guided() { # target, seconds
    mkdir -p "$FOLDER/corpus/$1"
    RAVELIN_FUZZ="$1" "$FOLDER/$HOST/release/fuzz" -max_total_time="$2" -timeout=10 -rss_limit_mb=2048 -max_len=4096 \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="$FOLDER/fail-$1-" "$FOLDER/corpus/$1" "tests/fuzz/corpus/$1"
}

fuzz() {
    local seconds=$((SOAK / ${#targets[@]})) target
    if have c++; then
        build_fuzzer
        for target in "${targets[@]}"; do
            step "fuzz $target, guided by coverage, $seconds s"
            fuzz_guided "$target" "$seconds"
        done
    else
        step "fuzz, NOT guided by coverage: there is no C++ compiler"
        RAVELIN_FUZZ_SECONDS="$seconds" RAVELIN_FUZZ_SEED="$(date +%s)" "$CARGO" test --quiet -p ravelin-fuzz --test replay
    fi
}

model() {
    step "reference model"
    RAVELIN_SOAK=1 "$CARGO" test --quiet --release -p ravelin-tests --test reference_model -- --nocapture
}

attacks() {
    step "attacks from every core"
    scripts/ravelin.sh test soak
}

case "$what" in
all)
    model
    fuzz
    attacks
    ;;
model | fuzz | attacks) "$what" ;;
*) die "scripts/soak.sh [model|fuzz|attacks] [target...]" ;;
esac
