# What `make demo` shows, run inside the lab: a container behind hardware virtualization, and the one beside it.
image=docker.io/library/husk-demo:latest
now() { cut -d' ' -f1 /proc/uptime; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f s", b - a }'; }

echo
ctr run --rm "$image" warm-up true # what follows reads no disk
echo "host        containerd $(containerd --version | cut -d' ' -f3), kernel $(uname -r)"
begin=$(now)
release=$(ctr run --rm --runtime io.containerd.runc.v2 "$image" with-runc uname -r) || exit 1
echo "runc        the container's kernel: $release   ($(since "$begin"))"
begin=$(now)
release=$(ctr run --rm --runtime io.containerd.husk.v2 "$image" with-husk uname -r)
status=$?
if [ $status != 0 ]; then
    echo "husk        failed with status $status; containerd's log ends with:"
    tail -20 /results/containerd.log
    exit $status
fi
echo "husk        the container's kernel: $release   ($(since "$begin"))"
echo
grep -q hypervisor /proc/cpuinfo && [ ! -e /sys/module/kvm_intel ] && ! grep -qw nrip_save /proc/cpuinfo &&
    echo "(The host is a software CPU here: see \`make bench\` for times that mean something.)"
echo "That ran, with an unmodified containerd:"
echo "    ctr run --rm --runtime io.containerd.husk.v2 $image ID uname -r"
echo "Next: \`make lab\` gives you a shell in this machine; try"
echo "    ctr run --rm -t --runtime io.containerd.husk.v2 $image try sh"
