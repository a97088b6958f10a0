#!/usr/bin/env bash
# Debian's Bochs, for the x86 hypervisor: an x86 emulator with VMX and EPT, its BIOS, and its SDL display (never shown).
set -euo pipefail
. "$(dirname "$0")/lib.sh"
missing=()
have bochs || missing+=(bochs bochs-sdl)
[ -e /usr/share/bochs/BIOS-bochs-latest ] || missing+=(bochsbios)
[ -e /usr/share/bochs/VGABIOS-lgpl-latest ] || missing+=(vgabios)
[ "${#missing[@]}" = 0 ] && exit 0
have apt-get || die "this is no Debian: install Bochs 2.7 with VMX, its BIOS and its SDL display by hand"
say "installing ${missing[*]}"
as_root apt-get update -qq
as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
