#!/usr/bin/env bash
# All tests that need no machine. Each step has a name, the same here and in CI; a step that this machine cannot
# do is skipped loudly, never silently.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env

step() { printf '\n== test-host: %s\n' "$1"; }
skip() { printf '\n== test-host: SKIPPED %s: %s\n' "$1" "$2"; }

step "workspace"
"$CARGO" test --workspace --exclude ravelin-fuzz --quiet

step "fuzz (the corpus and bounded random inputs)"
"$CARGO" test -p ravelin-fuzz --quiet

step "boards"
scripts/test-boards.sh

# Crates with a lock-free step have a test named `loom` that runs under cfg(loom).
for crate in stage2 memslot; do
    step "loom $crate"
    RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom \
        "$CARGO" test --quiet --release -p "ravelin-$crate" --test loom
done

# Optimised: a million steps.
step "reference model"
"$CARGO" test --quiet --release -p ravelin-tests --test reference_model

step "loom el2"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom "$CARGO" test --quiet --release -p ravelin-el2 --lib models::

step "loom vmx"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom "$CARGO" test --quiet --release -p ravelin-vmx --lib models::

# The rustup proxy for `+nightly`, not the cargo that set-up chose.
if [ "$RUST_ROUTE" = rustup ] && rustup run nightly cargo miri --version >/dev/null 2>&1; then
    step "miri"
    miri() {
        env -u RUSTC -u CARGO CARGO_TARGET_DIR=target/miri MIRIFLAGS="-Zmiri-disable-isolation" \
            rustup run nightly cargo miri test --quiet "$@"
    }
    miri -p ravelin-stage2 -p ravelin-abi --lib
    miri -p ravelin-memslot --lib --test suite
else
    skip "miri" "no nightly toolchain with miri here"
fi
