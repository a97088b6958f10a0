#!/usr/bin/env bash
# Builds the image for every Arm board: host-shim first, then EL2 with the shim inside; the shim has
# the guest inside that scripts/build-guests.sh has built.
#   build/ravelin.img  what a boot loader loads      build/ravelin.elf, build/host-shim.elf  symbols
set -euo pipefail
. "$(dirname "$0")/lib.sh"
TARGET=aarch64-unknown-none-softfloat
export CARGO_TARGET_DIR="$PWD/target/image"
# Static PIE without a loader: entry.S applies the relocations before the MMU is on, hence notext.
LINK=(-C relocation-model=pie -C link-arg=-pie -C link-arg=--no-dynamic-linker -C link-arg=-znotext
    -C link-arg=-znorelro -C link-arg=--build-id=none)
export RUSTFLAGS="-C force-frame-pointers=yes --remap-path-prefix=$PWD=. ${RUSTFLAGS:-}"

# What is not small or said to be hot (#[inline]) is in EL2 once, not at every place that calls it: a fifth
# fewer bytes, for a few instructions an exit (docs/tcb.md, docs/benchmarks/target.md).
SMALL=(-C llvm-args=-inline-threshold=40)

link() { # package, binary, linker script, output name, profile, more flags
    scripts/cargo-bare.sh rustc --quiet --profile "$5" --target "$TARGET" -p "$1" --bin "$2" -- \
        "${LINK[@]}" -C link-arg="-T$PWD/$3" "${@:6}"
    cp "$CARGO_TARGET_DIR/$TARGET/$5/$2" "$BUILD/$4.elf"
    scripts/ravelin.sh image "$BUILD/$4.elf" "$BUILD/$4.img"
}

export RAVELIN_DEMO="$BUILD/guests/payload"
link ravelin-host-shim host-shim host-shim/shim.ld host-shim image
export RAVELIN_SHIM="$BUILD/host-shim.img"
# scripts/link-el2.sh divides EL2 into what stays and what only boot needs; cargo sees a change of that only here.
DIVISION="$(cat scripts/link-el2.sh el2/el2.ld tests/src/boot_only/*.rs | cksum | cut -d' ' -f1)"
link ravelin-el2 ravelin el2/el2.ld ravelin el2 "${SMALL[@]}" -C metadata="$DIVISION" \
    -C linker="$PWD/scripts/link-el2.sh" -C linker-flavor=ld.lld
scripts/ravelin.sh boot-only check "$BUILD/ravelin.elf"
