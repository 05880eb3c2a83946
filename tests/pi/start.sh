#!/bin/sh
# The inside of device.sh: put the file system of a device together, in namespaces of its own, and become the program.
# usage: start.sh own|shared USERLAND DEVICE PROGRAM [ARGUMENT...]
#   own, shared  whether these namespaces can have a binfmt_misc of their own
set -eu
. "$(dirname "$0")/machines.sh"
binfmt=$1 userland=$2 device=$3 root=$3/root
shift 3
describe_machine "$(cat "$userland/architecture")"

if [ "$binfmt" = own ]; then
    mount -t binfmt_misc binfmt /proc/sys/fs/binfmt_misc
    registration pi "$userland/qemu" >/proc/sys/fs/binfmt_misc/register
fi
mount -t overlay -o "lowerdir=$userland/root,upperdir=$device/disk,workdir=$device/work,userxattr" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind "$userland/cpuinfo" "$root/proc/cpuinfo"
mount -t sysfs -o ro sys "$root/sys"
mount -t tmpfs tmp "$root/tmp"
mount -t tmpfs dev "$root/dev"
for node in null zero full random urandom; do
    : >"$root/dev/$node"
    mount --bind /dev/$node "$root/dev/$node"
done
mkdir "$root/dev/shm"
hostname "$(basename "$device")"
exec env -i HOME=/home/pi PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 QEMU_CPU=$cpu \
    unshare --root="$root" --wd=/home/pi "$@"
