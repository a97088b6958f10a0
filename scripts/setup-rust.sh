#!/usr/bin/env bash
# Chooses where bare-metal Rust comes from and writes the choice to build/env.mk (read by make and by shell).
#   rustup   the toolchain's precompiled core and alloc for each bare target
#   debian   Debian's rustc, with core and alloc built from Debian's copy of their source
set -euo pipefail
. "$(dirname "$0")/lib.sh"
PACKAGES=(rustc-web cargo-web rust-web-src lld); TARGETS=(aarch64-unknown-none-softfloat x86_64-unknown-none)

rustup_route() {
    local installed target
    have rustup || { say "no rustup here"; return 1; }
    is_new_enough "$(rustup which rustc)" || { say "rustup's Rust is older than $RUST_MIN"; return 1; }
    installed="$(rustup target list --installed)" || return 1
    for target in "${TARGETS[@]}"; do
        grep -qx "$target" <<<"$installed" && continue
        say "rustup: adding $target"
        rustup target add "$target" || { say "rustup could not fetch $target"; return 1; }
    done
    write_env rustup "$(rustup which cargo)" "$(rustup which rustc)" ""
}

debian_route() {
    if ! [ -d /usr/lib/rustlib/src/rust/library/core ] || ! have ld.lld || ! [ -x /usr/bin/cargo ] ||
        ! is_new_enough /usr/bin/rustc; then
        say "installing Debian's Rust: ${PACKAGES[*]}"
        as_root apt-get update -qq
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${PACKAGES[@]}"
    fi
    is_new_enough /usr/bin/rustc ||
        die "Debian's rustc-web is $(/usr/bin/rustc --version): need $RUST_MIN; do the apt sources have $(debian_release)-security?"
    {   printf '[unstable]\nbuild-std = ["core", "alloc"]\nbuild-std-features = ["compiler-builtins-mem"]\n'
        printf '[target.%s]\nlinker = "ld.lld"\n' "${TARGETS[@]}"
    } > "$BUILD/rust-debian.toml"
    write_env debian /usr/bin/cargo /usr/bin/rustc "--config=$BUILD/rust-debian.toml"
}

write_env() { # route cargo rustc bare-flags
    {   printf 'RUST_ROUTE=%s\nCARGO=%s\nRUSTC=%s\nCARGO_BARE_FLAGS=%s\n' "$@"
        printf 'RUST_VERSION=%s\n%s\n' "$("$3" --version | cut -d' ' -f2)" "${4:+RUSTC_BOOTSTRAP=1}"
    } > "$BUILD/env.mk.new"
    cmp -s "$BUILD/env.mk.new" "$BUILD/env.mk" || say "Rust route: $1 ($2)"
    mv "$BUILD/env.mk.new" "$BUILD/env.mk"
}

case "${RUST_ROUTE:-auto}" in
    rustup) rustup_route || die "RUST_ROUTE=rustup, but rustup cannot provide: ${TARGETS[*]}" ;;
    auto) rustup_route || debian_route ;;
    debian) debian_route ;;
    *) die "RUST_ROUTE is '$RUST_ROUTE': use rustup or debian" ;;
esac
