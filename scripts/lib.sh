# shellcheck shell=bash
# Common to all scripts: where the tree is, how to speak, how to become root. Sourced, never run.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
BUILD="$PWD/build"
mkdir -p "$BUILD/logs"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Whether this rustc is one that the workspace can be built with.
RUST_MIN="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)"
is_new_enough() { printf '%s\n%s\n' "$RUST_MIN" "$("$1" --version | cut -d' ' -f2)" | sort -V -C; }

# Runs its arguments as root, or stops and prints what a person with the right must run.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        printf 'setup: this needs root, and neither root nor password-less sudo is at hand. Please run\n' >&2
        printf '    sudo %s\nand repeat the make command.\n' "$(printf '%q ' "$@")" >&2
        exit 1
    fi
}

# The URI, suite-independent, of the Debian mirror that this machine already uses, and the release's name.
debian_mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CODENAME)' 'Created-By: Packages' |
        awk -v suite="$(debian_release)" '$2 == suite || $3 == suite { print $1; exit }'
}
debian_release() { . /etc/os-release && printf '%s' "${VERSION_CODENAME:?not a Debian release}"; }

# Exports what setup-rust.sh has chosen: CARGO, RUSTC, CARGO_BARE_FLAGS (and RUSTC_BOOTSTRAP).
load_env() {
    [ -s "$BUILD/env.mk" ] || die "not set up yet: run 'make setup' first"
    set -a
    . "$BUILD/env.mk"
    set +a
}
