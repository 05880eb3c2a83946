# The machines that QEMU is to be, by Debian's name of their architecture; to be sourced.

# Ends a script with one line that says why.
fail() {
    echo "pi: $*" >&2
    exit 1
}

# Sets what QEMU is told: $emulator and $cpu, and how Linux knows programs of this kind: $magic.
# The CPU is always named: under QEMU's default, `max`, int8 models gave wrong results without any error.
describe_machine() {
    case $1 in
    arm64) emulator=qemu-aarch64-static cpu=cortex-a72 class=02 machine=b7 ;;
    armhf) emulator=qemu-arm-static cpu=cortex-a7 class=01 machine=28 ;;
    *) fail "expected architecture arm64 or armhf, found $1" ;;
    esac
    # ELF of that class and byte order, any ABI; padding; executable or shared; machine
    magic="\\x7fELF\\x$class\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\x$machine\\x00"
    mask="\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff"
}

# Prints the line for binfmt_misc that hands such programs to $2, under the name $1. F: it is looked up now, not where
# they run.
registration() {
    printf '%s\n' ":$1:M::$magic:$mask:$2:F"
}

# Prints /proc/cpuinfo of a Raspberry Pi 4 or, for 32 bits, 2. onnxruntime 1.28 and later read it, and crash at import
# on what this machine says there.
cpuinfo() {
    case $1 in
    arm64)
        lines='BogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41
CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n'
        board='Revision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4'
        ;;
    armhf)
        lines='model name\t: ARMv7 Processor rev 5 (v7l)\nBogoMIPS\t: 38.40
Features\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm
CPU implementer\t: 0x41\nCPU architecture: 7\nCPU variant\t: 0x0\nCPU part\t: 0xc07\nCPU revision\t: 5\n'
        board='Hardware\t: BCM2835\nRevision\t: a01041\nModel\t\t: Raspberry Pi 2 Model B Rev 1.1'
        ;;
    esac
    for core in 0 1 2 3; do
        printf "processor\t: $core\n$lines\n"
    done
    printf "$board\n"
}
