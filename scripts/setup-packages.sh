#!/usr/bin/env bash
# Debian packages: QEMU (>= 10.0, from backports on Debian 12) and a C linker driver for host tools.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
QEMU_MIN=10

qemu_version() { qemu-system-aarch64 --version 2>/dev/null | sed -n 's/.*version \([0-9.]*\).*/\1/p'; }
qemu_is_new() { local v; v="$(qemu_version)"; [ -n "$v" ] && [ "${v%%.*}" -ge "$QEMU_MIN" ]; }
install() { as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; }

# Where the release's own QEMU is too old, backports has a new one: add that suite of the same mirror.
add_backports() {
    local release mirror list=/etc/apt/sources.list.d/ravelin-backports.list
    release="$(debian_release)"
    if ! apt-get indextargets --format '$(RELEASE) $(CODENAME)' | grep -qw "$release-backports"; then
        mirror="$(debian_mirror)"
        [ -n "$mirror" ] || die "no Debian mirror for '$release' in the apt sources: add one, then repeat"
        say "adding $release-backports of this machine's mirror to $list"
        as_root sh -c "echo 'deb $mirror $release-backports main' > $list"
    fi
    say "refreshing package lists"
    as_root apt-get update -qq
}

have apt-get || die "this is no Debian: install qemu-system-aarch64 >= $QEMU_MIN.0, a C compiler and Rust >= 1.90 by hand"
missing=()
have cc || missing+=(gcc libc6-dev)
have xz || missing+=(xz-utils)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
if [ "${#missing[@]}" -gt 0 ]; then
    say "installing ${missing[*]}"
    as_root apt-get update -qq
    install "${missing[@]}"
fi
if ! qemu_is_new; then
    say "QEMU is '$(qemu_version || true)', need >= $QEMU_MIN.0"
    add_backports
    install -t "$(debian_release)-backports" qemu-system-arm
    qemu_is_new || die "qemu-system-aarch64 is still '$(qemu_version)': remove the old one from PATH"
fi
qemu_version > "$BUILD/qemu-version"
