# Packages of any Debian architecture and suite, from the mirror that this machine has its own from; to be sourced after
# machines.sh. Nothing is installed here: apt gets lists, status and cache of its own, and packages are only unpacked,
# without running any of their scripts. Any user may do so.

# Sets $mirror and $work, a folder for downloads that is gone when the script ends.
find_debian() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "expected Linux x86_64, found $(uname -sm)"
    for program in apt-get dpkg-deb; do
        command -v $program >/dev/null || fail "expected Debian with $program, found none"
    done
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk '$2 ~ /^(bookworm|trixie|oldstable|stable)$/ && $3 == "main" { print $1; exit }')
    [ -n "$mirror" ] || fail "expected a mirror of Debian 12 or 13 in apt's sources, found none"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' HUP INT TERM
}

# open_debian ARCHITECTURE SUITE: sets $apt to an apt-get of that machine, and $debs to the folder of its downloads.
open_debian() {
    state=$work/$1-$2 debs=$work/$1-$2/archives
    mkdir -p "$state/lists/partial" "$debs/partial"
    : >"$state/status"
    echo "deb [arch=$1 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $2 main" >"$state/sources"
    apt="apt-get --quiet=2 --assume-yes -o APT::Architecture=$1 -o APT::Architectures=$1
        -o APT::Install-Recommends=false -o APT::Sandbox::User= -o Acquire::Languages=none
        -o Dir::State=$state -o Dir::State::status=$state/status -o Dir::Cache=$state
        -o Dir::Etc::SourceList=$state/sources -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null"
    $apt update
}

# unpack_debian ROOT PACKAGE...: a new file system with these packages and all that they depend on.
unpack_debian() {
    root=$1
    shift
    $apt --download-only install base-files "$@" >"$work/log" || fail "$(cat "$work/log")"
    mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib"
    for name in bin sbin lib; do
        ln -s usr/$name "$root/$name"
    done
    for deb in "$debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$root"
    done
    for name in doc info locale man; do
        rm -rf "$root/usr/share/$name"
    done
}
