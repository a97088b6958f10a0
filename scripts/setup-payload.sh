#!/usr/bin/env bash
# Fetches Debian's current arm64 kernel (with the boards' device trees and the modules for virtio devices and a file
# system) and a static arm64 busybox into build/debian/. No root is needed.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/debian.sh"
OUT="$BUILD/debian"
MODULES=(drivers/virtio/virtio_mmio drivers/block/virtio_blk drivers/char/hw_random/virtio-rng
    lib/crc16 fs/mbcache fs/jbd2/jbd2 crypto/crc32c_generic fs/ext4/ext4)
has_modules() {
    local module
    for module in "${MODULES[@]}"; do [ -s "$OUT/modules/${module##*/}.ko" ] || return 1; done
}
[ -s "$OUT/version" ] && has_modules && exit 0

private_apt arm64 "$BUILD/apt" backports
kernel="$(current_kernel linux-image-arm64 backports)"
unpack_packages "$OUT" "$kernel" busybox-static/"$RELEASE"
load_env
say "unpacking the kernel (builds the project's tool first, about a minute)"
scripts/ravelin.sh kernel-image "$OUT"/unpacked/boot/vmlinuz-* "$OUT/Image"
mkdir -p "$OUT/dtb"
mv "$OUT"/unpacked/usr/lib/linux-image-*/broadcom "$OUT/dtb/"
mv "$OUT/unpacked/bin/busybox" "$OUT/busybox"
mkdir -p "$OUT/modules"
for module in "${MODULES[@]}"; do
    file="$(echo "$OUT"/unpacked/lib/modules/*/kernel/$module.ko*)"
    cp "$file" "$OUT/modules/"
    case "$file" in *.xz) xz -d "$OUT/modules/$(basename "$file")" ;; esac
done
rm -rf "$OUT/unpacked"
echo "${kernel#linux-image-}" > "$OUT/version"
