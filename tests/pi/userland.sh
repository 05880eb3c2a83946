#!/bin/sh
# Build the files of an emulated Raspberry Pi from Debian's packages, for device.sh to run and install.sh to add to:
#   FOLDER/root           the file system
#   FOLDER/qemu           QEMU's user emulator, one static program
#   FOLDER/cpuinfo        what /proc/cpuinfo is to say
#   FOLDER/architecture   its name
# usage: userland.sh FOLDER arm64|armhf SUITE [PACKAGE...]    PACKAGE: besides Python
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/machines.sh"
. "$here/debian.sh"
folder=$1 architecture=$2 suite=$3
shift 3

# Debian 12's, whatever this machine runs. To install the package would register 33 kinds of machine on this one.
unpack_qemu() {
    open_debian amd64 bookworm
    (cd "$debs" && $apt download qemu-user-static)
    dpkg-deb --fsys-tarfile "$debs"/qemu-user-static_*.deb | tar -xO "./usr/bin/$emulator" >"$folder/qemu"
    chmod +x "$folder/qemu"
}

# What the packages' scripts would have done, as far as Python needs it.
settle() {
    mkdir -p "$root/home/pi"
    ln -sf bash "$root/usr/bin/sh"
    echo "root:x:0:0:root:/home/pi:/bin/bash" >"$root/etc/passwd"
    for chosen in blas lapack; do
        for library in "$root"/usr/lib/*/$chosen/lib*.so.3; do
            [ ! -e "$library" ] || ln -s "$chosen/$(basename "$library")" "$(dirname "$library")/.."
        done
    done
}

describe_machine "$architecture"
find_debian
echo "pi: Debian $suite for $architecture"
rm -rf "$folder"
mkdir -p "$folder"
unpack_qemu
open_debian "$architecture" "$suite"
unpack_debian "$folder/root" bash coreutils libstdc++6 python3 "$@"
settle
cpuinfo "$architecture" >"$folder/cpuinfo"
cp "$folder/cpuinfo" "$root/proc/" # for install.sh, which does without mounts
echo "$architecture" >"$folder/architecture"
