# shellcheck shell=bash
# Sourced by the scripts that fetch payloads: packages of Debian for another architecture, without root. A private apt
# configuration is used, so the machine's own apt is left as it is.

# private_apt ARCH FOLDER [SUITE]: apt reads the lists of ARCH, those of SUITE ("backports") too, and keeps them in
# FOLDER. Sets RELEASE.
private_apt() {
    local arch="$1" apt="$2" suite mirror
    RELEASE="$(debian_release)"
    mirror="$(debian_mirror)"
    [ -n "$mirror" ] || die "no Debian mirror for '$RELEASE' in the apt sources: add one, then repeat"
    mkdir -p "$apt"/{lists/partial,cache/archives/partial,sources,empty}
    : > "$apt/status"
    for suite in "$RELEASE" ${3:+"$RELEASE-$3"}; do
        echo "deb [arch=$arch signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done > "$apt/sources/ravelin.list"
    cat > "$apt/apt.conf" <<END
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$apt/sources";
Dir::Etc::preferencesparts "$apt/empty";
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
END
    export APT_CONFIG="$apt/apt.conf"
    say "reading Debian's list of $arch packages"
    apt-get update -qq
}

# current_kernel META [SUITE]: the package that the kernel's meta package META, of SUITE, depends on.
current_kernel() {
    local kernel
    kernel="$(apt-cache ${2:+-t "$RELEASE-$2"} show --no-all-versions "$1" |
        sed -n 's/^Depends: \(linux-image-6[^ ,]*\).*/\1/p')"
    [ -n "$kernel" ] || die "Debian names no current $1: check the mirror, then repeat"
    echo "$kernel"
}

# unpack_packages FOLDER PACKAGE...: their files in FOLDER/unpacked, and nothing else in FOLDER.
unpack_packages() {
    local out="$1" deb
    shift
    say "fetching $*"
    rm -rf "${out:?}"
    mkdir -p "$out"
    (cd "$out" && apt-get download -q "$@")
    for deb in "$out"/*.deb; do dpkg-deb -x "$deb" "$out/unpacked"; rm "$deb"; done
}
