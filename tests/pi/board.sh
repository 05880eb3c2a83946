#!/bin/sh
# Build what boots an emulated Raspberry Pi 3 that has a userland as its SD card, for boot.sh:
#   FOLDER/root        a file system of this machine's own kind, with QEMU's system emulator
#   FOLDER/kernel      Debian's for arm64
#   FOLDER/board.dtb   its description of the board
#   FOLDER/initramfs   init, busybox, and the modules for the card
# usage: board.sh FOLDER USERLAND
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/machines.sh"
. "$here/debian.sh"
folder=$1 emulator=$(cd "$2" && pwd)/qemu

# In the order in which they are to be loaded: random numbers, restart, the file system of the card, the card.
modules="bcm2835-rng bcm2835_wdt crc16 crc32c_generic mbcache jbd2 ext4 bcm2835"

unpack_kernel() {
    open_debian arm64 bookworm
    kernel=$($apt --simulate install linux-image-arm64 | awk '$2 ~ /^linux-image-[0-9]/ { print $2; exit }')
    (cd "$debs" && $apt download "$kernel" busybox-static)
    for deb in "$debs"/*.deb; do
        dpkg-deb --extract "$deb" "$work/unpacked"
    done
    mv "$work"/unpacked/boot/vmlinuz-* "$folder/kernel"
    mv "$work"/unpacked/usr/lib/linux-image-*/broadcom/bcm2837-rpi-3-b.dtb "$folder/board.dtb"
}

pack_initramfs() {
    mkdir -p "$work/initramfs/bin" "$work/initramfs/modules"
    install -m 755 "$here/init" "$work/initramfs/init"
    mv "$work/unpacked/bin/busybox" "$work/initramfs/bin/"
    number=10
    for module in $modules; do
        find "$work/unpacked/lib/modules" -name "$module.ko" -exec mv {} "$work/initramfs/modules/$number" \;
        number=$((number + 1))
    done
    (cd "$work/initramfs" && find . | "$emulator" bin/busybox cpio -o -H newc) >"$folder/initramfs"
}

find_debian
echo "pi: QEMU and a kernel for the board"
rm -rf "$folder"
mkdir -p "$folder"
open_debian amd64 bookworm
unpack_debian "$folder/root" qemu-system-arm
unpack_kernel
pack_initramfs
