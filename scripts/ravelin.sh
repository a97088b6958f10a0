#!/usr/bin/env bash
# Runs the project's tool (tests/src/bin/ravelin/main.rs) with the Rust that set-up chose: scripts/ravelin.sh --help
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
# A caller that builds for a board has flags and a folder of its own, which are not meant for this.
unset CARGO_TARGET_DIR RUSTFLAGS
exec "$CARGO" run --quiet -p ravelin-tests --bin ravelin -- "$@"
