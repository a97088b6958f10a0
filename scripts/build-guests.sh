#!/usr/bin/env bash
# Builds the small programs that run inside machines (tests/guests/) and puts them into build/guests/.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
TARGET=aarch64-unknown-none-softfloat
mkdir -p "$BUILD/guests"
for guest in ticks; do
    CARGO_TARGET_DIR=target/guests scripts/cargo-bare.sh build --quiet --release --target "$TARGET" \
        --manifest-path "tests/guests/$guest/Cargo.toml"
    cp "target/guests/$TARGET/release/ravelin-guest-$guest" "$BUILD/guests/$guest"
done
