#!/usr/bin/env bash
# Builds the small programs that run inside machines (tests/guests/) and puts them into build/guests/.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
TARGET=aarch64-unknown-none-softfloat
export CARGO_TARGET_DIR=target/guests
mkdir -p "$BUILD/guests"

build() { # folder, flags
    RUSTFLAGS="$2" scripts/cargo-bare.sh build --quiet --release --target "$TARGET" --manifest-path "tests/guests/$1/Cargo.toml"
}

build ticks ""
cp "$CARGO_TARGET_DIR/$TARGET/release/ravelin-guest-ticks" "$BUILD/guests/ticks"
# A raw binary for a fixed address, without an operating system under it.
build payload "-C relocation-model=static -C link-arg=-T$PWD/tests/guests/payload/payload.ld -C link-arg=--build-id=none"
cp "$CARGO_TARGET_DIR/$TARGET/release/ravelin-guest-payload" "$BUILD/guests/payload.elf"
scripts/ravelin.sh image "$BUILD/guests/payload.elf" "$BUILD/guests/payload"
