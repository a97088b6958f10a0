#!/usr/bin/env bash
# cargo for a bare-metal target, with the Rust that set-up chose:
#   scripts/cargo-bare.sh build --release -p ravelin-el2 --target aarch64-unknown-none-softfloat
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
# One word or none; the file it names holds what differs between the two Rust routes.
exec "$CARGO" ${CARGO_BARE_FLAGS:+"$CARGO_BARE_FLAGS"} "$@"
