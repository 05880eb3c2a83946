#!/bin/sh
# Run a program on an emulated Raspberry Pi whose files userland.sh built; several devices may run at once.
# A device is the folder DEVICE: what it writes is in DEVICE/disk, laid over the shared files of USERLAND, and what is
# put there beforehand it finds; its home is DEVICE/disk/home/pi. It has mounts, processes, a host name and a network
# (that leads nowhere) of its own; all these end with the program, and this machine never sees them. Root is not needed
# where users may make namespaces.
# Programs of the Pi start programs of the Pi, through a binfmt_misc of the namespace's own. Linux before 6.7 has only
# one for the whole machine: then this must be root, and registers the emulator there for as long as the program runs.
# usage: device.sh USERLAND DEVICE PROGRAM [ARGUMENT...]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/machines.sh"
binfmt=/proc/sys/fs/binfmt_misc
namespaces="unshare --user --map-root-user --mount --uts --ipc --net --pid --fork --kill-child"

[ -x "$1/qemu" ] || fail "expected a folder that userland.sh built, found $1"
$namespaces true 2>/dev/null || fail "expected a machine that lets $(id -un) make namespaces, found one that does not"
mkdir -p "$2/disk/home/pi" "$2/work" "$2/root"
userland=$(cd "$1" && pwd) device=$(cd "$2" && pwd)
shift 2
if $namespaces mount -t binfmt_misc none $binfmt 2>/dev/null; then
    exec $namespaces sh "$here/start.sh" own "$userland" "$device" "$@"
fi
[ "$(id -u)" = 0 ] || fail "expected root or Linux 6.7, found user $(id -un) and Linux $(uname -r)"
[ -e $binfmt/register ] || mount -t binfmt_misc none $binfmt
describe_machine "$(cat "$userland/architecture")"
trap 'echo -1 >$binfmt/fedpara-pi-$$' EXIT
trap 'exit 130' HUP INT TERM
registration "fedpara-pi-$$" "$userland/qemu" >$binfmt/register
$namespaces sh "$here/start.sh" shared "$userland" "$device" "$@"
