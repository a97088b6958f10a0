#!/usr/bin/env bash
# Fetches Debian's current cloud kernel and a static busybox, both for amd64, into build/debian-x86/. A private apt
# configuration is used: no root, and the machine's own apt is left as it is.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT="$BUILD/debian-x86"
APT="$BUILD/apt-x86"
[ -s "$OUT/version" ] && exit 0

release="$(debian_release)"
mirror="$(debian_mirror)"
[ -n "$mirror" ] || die "no Debian mirror for '$release' in the apt sources: add one, then repeat"
mkdir -p "$APT"/{lists/partial,cache/archives/partial,sources,empty} "$OUT"
: > "$APT/status"
echo "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" \
    > "$APT/sources/ravelin.list"
cat > "$APT/apt.conf" <<END
Dir::State "$APT";
Dir::State::status "$APT/status";
Dir::Cache "$APT/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$APT/sources";
Dir::Etc::preferencesparts "$APT/empty";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
END
export APT_CONFIG="$APT/apt.conf"
say "reading Debian's list of amd64 packages"
apt-get update -qq
kernel="$(apt-cache show --no-all-versions linux-image-cloud-amd64 |
    sed -n 's/^Depends: \(linux-image-6[^ ,]*\).*/\1/p')"
[ -n "$kernel" ] || die "Debian names no current amd64 cloud kernel: check the mirror, then repeat"
say "fetching $kernel and busybox-static for amd64"
rm -rf "${OUT:?}"/*
(cd "$OUT" && apt-get download -q "$kernel" busybox-static)
for deb in "$OUT"/*.deb; do dpkg-deb -x "$deb" "$OUT/unpacked"; rm "$deb"; done
load_env
scripts/ravelin.sh x86-kernel "$OUT"/unpacked/boot/vmlinuz-* "$OUT/vmlinux"
mv "$OUT/unpacked/bin/busybox" "$OUT/busybox"
rm -rf "$OUT/unpacked"
echo "${kernel#linux-image-}" > "$OUT/version"
