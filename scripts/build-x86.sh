#!/usr/bin/env bash
# Builds the flat disk image for x86 PCs and for Bochs: build/ravelin-x86.img (symbols: build/ravelin-x86.elf).
set -euo pipefail
. "$(dirname "$0")/lib.sh"
TARGET=x86_64-unknown-none
export CARGO_TARGET_DIR="$PWD/target/image"
export RUSTFLAGS="-C force-frame-pointers=yes -C relocation-model=static --remap-path-prefix=$PWD=. ${RUSTFLAGS:-}"
scripts/cargo-bare.sh rustc --quiet --profile image --target "$TARGET" -p ravelin-vmx --bin ravelin-x86 -- \
    -C link-arg="-T$PWD/vmx/vmx.ld" -C link-arg=--build-id=none -C link-arg=-no-pie
cp "$CARGO_TARGET_DIR/$TARGET/image/ravelin-x86" "$BUILD/ravelin-x86.elf"
scripts/ravelin.sh x86-disk "$BUILD/ravelin-x86.elf" "$BUILD/ravelin-x86.img"
