#!/usr/bin/env bash
# Runs the project's tool (tests/src/bin/ravelin/main.rs) with the Rust that set-up chose: scripts/ravelin.sh --help
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
exec "$CARGO" run --quiet -p ravelin-tests --bin ravelin -- "$@"
