#!/usr/bin/env bash
# Formatting, clippy and documentation with warnings denied, on the host and on each bare-metal target.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
BARE_TARGET=aarch64-unknown-none-softfloat
export RAVELIN_SHIM="$BUILD/host-shim.img" # EL2 links the shim in
export RAVELIN_DEMO="$BUILD/guests/payload" # and the shim a guest

step() { printf '\n== lint: %s\n' "$1"; }
have cargo-clippy && have cargo-fmt || die "clippy and rustfmt come with rustup, or as Debian's rust-clippy and rustfmt"
step "fmt"
"$CARGO" fmt --all --check
step "clippy (host)"
"$CARGO" clippy --workspace --all-targets --features ravelin-tests/debian-trees --quiet -- -D warnings
for crate in el2 host-shim; do
    [ -d "$crate" ] || continue
    step "clippy ($crate, $BARE_TARGET)"
    scripts/cargo-bare.sh clippy --quiet -p "ravelin-$crate" --target "$BARE_TARGET" -- -D warnings
done
step "clippy (vmx, x86_64-unknown-none)"
scripts/cargo-bare.sh clippy --quiet -p ravelin-vmx --target x86_64-unknown-none -- -D warnings
step "doc"
RUSTDOCFLAGS="-D warnings" "$CARGO" doc --workspace --no-deps --quiet
step "unsafe (a reason for each, and docs/unsafe.md up to date)"
scripts/ravelin.sh tcb --check
