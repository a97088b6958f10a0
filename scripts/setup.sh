#!/usr/bin/env bash
# Installs and fetches what is missing, and nothing else; silent but for one line when all is there.
# RUST_ROUTE=rustup|debian forces where the bare-metal Rust comes from.
set -euo pipefail
here="$(dirname "$0")"
"$here/setup-packages.sh"
"$here/setup-rust.sh"
"$here/setup-payload.sh"
. "$here/lib.sh"
load_env
say "ready: Rust route '$RUST_ROUTE' ($RUST_VERSION), QEMU $(cat "$BUILD/qemu-version"), Linux $(cat "$BUILD/debian/version")"
