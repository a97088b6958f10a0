#!/usr/bin/env bash
# Fetches Debian's current cloud kernel and a static busybox, both for amd64, into build/debian-x86/. No root is
# needed.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/debian.sh"
OUT="$BUILD/debian-x86"
[ -s "$OUT/version" ] && exit 0

private_apt amd64 "$BUILD/apt-x86"
kernel="$(current_kernel linux-image-cloud-amd64)"
unpack_packages "$OUT" "$kernel" busybox-static
load_env
scripts/ravelin.sh x86-kernel "$OUT"/unpacked/boot/vmlinuz-* "$OUT/vmlinux"
mv "$OUT/unpacked/bin/busybox" "$OUT/busybox"
rm -rf "$OUT/unpacked"
echo "${kernel#linux-image-}" > "$OUT/version"
