#!/usr/bin/env bash
# Fetches Debian's current arm64 kernel (with the boards' device trees and the modules for virtio devices and a file
# system) and a static arm64 busybox into build/debian/. A private apt configuration is used: no root, and the machine's own apt is left as it is.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT="$BUILD/debian"
APT="$BUILD/apt"
MODULES=(drivers/virtio/virtio_mmio drivers/block/virtio_blk drivers/char/hw_random/virtio-rng
    lib/crc16 fs/mbcache fs/jbd2/jbd2 crypto/crc32c_generic fs/ext4/ext4)
has_modules() {
    local module
    for module in "${MODULES[@]}"; do [ -s "$OUT/modules/${module##*/}.ko" ] || return 1; done
}
[ -s "$OUT/version" ] && has_modules && exit 0

release="$(debian_release)"
mirror="$(debian_mirror)"
[ -n "$mirror" ] || die "no Debian mirror for '$release' in the apt sources: add one, then repeat"
mkdir -p "$APT"/{lists/partial,cache/archives/partial,sources,empty} "$OUT"
: > "$APT/status"
echo "deb [arch=arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main
deb [arch=arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release-backports main" \
    > "$APT/sources/ravelin.list"
cat > "$APT/apt.conf" <<END
Dir::State "$APT";
Dir::State::status "$APT/status";
Dir::Cache "$APT/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$APT/sources";
Dir::Etc::preferencesparts "$APT/empty";
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
END
export APT_CONFIG="$APT/apt.conf"
say "reading Debian's list of arm64 packages"
apt-get update -qq
kernel="$(apt-cache -t "$release-backports" show --no-all-versions linux-image-arm64 |
    sed -n 's/^Depends: \(linux-image-6[^ ,]*\).*/\1/p')"
[ -n "$kernel" ] || die "Debian's backports name no current arm64 kernel: check the mirror, then repeat"
say "fetching $kernel and busybox-static for arm64"
rm -rf "${OUT:?}"/*
(cd "$OUT" && apt-get download -q "$kernel" busybox-static/"$release")
for deb in "$OUT"/*.deb; do dpkg-deb -x "$deb" "$OUT/unpacked"; rm "$deb"; done
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
