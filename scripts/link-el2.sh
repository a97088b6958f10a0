#!/usr/bin/env bash
# The linker of EL2's image, called by rustc: finds what only boot reaches in the one object file that link-time
# optimisation leaves, for el2/el2.ld to put apart, and links.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
load_env
[ "${1:-}" != -flavor ] || shift 2 # for a linker that is several
objects=()
for argument; do [[ $argument != *.o ]] || objects+=("$argument"); done
scripts/ravelin.sh boot-only divide "${objects[@]}" "$BUILD"
LLD="$("$RUSTC" --print target-libdir)/../bin/rust-lld" # beside rustup's libraries; Debian has LLVM's own
if [ -x "$LLD" ]; then exec "$LLD" -flavor gnu -L "$BUILD" "$@"; fi
exec ld.lld -L "$BUILD" "$@"
