#!/usr/bin/env bash
# What EL2 reads in the real device trees of the Raspberry Pi 4 and 5 (fetched by set-up with Debian's kernel).
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
"$CARGO" test --quiet -p ravelin-tests --features debian-trees --test boards
