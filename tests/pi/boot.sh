#!/bin/sh
# Boot an emulated Raspberry Pi 3 with a new SD card: the files of USERLAND, and HOME as /home/pi. It runs
# HOME/session.sh there; when it restarts, HOME is replaced by what /home/pi then holds. The exit code is that of the
# session.
# usage: boot.sh BOARD USERLAND HOME
set -eu
. "$(dirname "$0")/machines.sh"
board=$(cd "$1" && pwd) userland=$(cd "$2" && pwd) home=$(cd "$3" && pwd)
libraries=$board/root/usr/lib/x86_64-linux-gnu

for program in mkfs.ext4 debugfs; do
    command -v $program >/dev/null || fail "expected $program of Debian's e2fsprogs, found none"
done
work=$(mktemp -d "$board/card.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
cp -al "$userland/root" "$work/files"
cp -a "$home/." "$work/files/home/pi/"
truncate --size 512M "$work/card" # QEMU takes powers of 2
mkfs.ext4 -q -d "$work/files" "$work/card"
timeout 900 "$board/root/lib64/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/pulseaudio" \
    "$board/root/usr/bin/qemu-system-aarch64" -L "$board/root/usr/share/qemu" -machine raspi3b -no-reboot \
    -kernel "$board/kernel" -dtb "$board/board.dtb" -initrd "$board/initramfs" \
    -append "console=ttyAMA0,115200 quiet loglevel=3 panic=-1" -drive "if=sd,format=raw,file=$work/card" \
    -display none -serial stdio -monitor none </dev/null
debugfs -R "rdump /home/pi $work" "$work/card" 2>"$work/log" || fail "$(cat "$work/log")"
[ -e "$work/pi/exit-code" ] || fail "expected the session to end, found that the board did not come so far"
rm -rf "$home"
mv "$work/pi" "$home"
exit "$(cat "$home/exit-code")"
