"""Those that boot a machine, run a command in it and end it: vmtest and virtme-ng. They save nothing.

Both show the guest the machine's own files over 9p, which Debian's kernel for clouds does not have: they get Debian's generic
kernel, which install.sh unpacks beside them. What they begin is in namespaces of its own, with a /tmp of its own.
"""
import glob
import os
import shlex

from common import Missing, apart, initramfs, program, run, version

ORDER = ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console", "netfs", "fscache",
         "9pnet", "9pnet_virtio", "9p"]
# Debian's kernel has 9p as modules and so needs an initramfs, which vmtest does not make. Read only: the files are the machine's.
INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
for m in {modules}; do /bin/busybox insmod /mod/$m.ko; done
for word in $(/bin/busybox cat /proc/cmdline); do
  case $word in init=*) init=${{word#init=}} ;; rootflags=*) flags=${{word#rootflags=}} ;; esac
done
/bin/busybox mount -t 9p -o "ro,$flags" /dev/root /newroot
/bin/busybox mount -t devtmpfs dev /newroot/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /newroot "$init"
"""
# vmtest takes KVM when there is a /dev/kvm, which proves nothing.
EMULATED = """#!/bin/sh
for word in "$@"; do
  shift
  case $word in -enable-kvm) ;; host) set -- "$@" max ;; *) set -- "$@" "$word" ;; esac
done
exec {qemu} "$@"
"""
CONFIG = """[[target]]
name = "peer"
kernel = "{kernel}"
command = "/bin/uname"
qemu_command = "{folder}/qemu"
[target.vm]
num_cpus = 1
memory = "{memory}M"
extra_args = ["-initrd", "{folder}/initramfs"]
"""
# vmtest puts sockets into /tmp, and leaves them when it is ended. What it needs may be in there too.
BEGIN = """set -e
for there in {folder} {tools}; do
  case $there in /tmp/*) mkdir -p {folder}"$there"; mount --bind "$there" {folder}"$there" ;; esac
done
mount --rbind {folder}/tmp /tmp
mount -t proc proc /proc
exec {command}
"""


class Boots:
    """The rounds of both."""

    def __init__(self, o):
        self.o, self.tools = o, o.tools
        self.qemu = program("qemu-system-x86_64", "scripts/setup.sh installs it")
        kernels = glob.glob(f"{self.tools}/kernel/boot/vmlinuz-*")
        if not kernels:
            raise Missing("no kernel with 9p; install.sh unpacks Debian's generic one")
        self.kernel = kernels[-1]
        self.modules = f"{self.tools}/kernel/lib/modules/{os.path.basename(self.kernel).removeprefix('vmlinuz-')}"
        self.prefix = apart()
        self.folder = f"{o.work}/{type(self).__name__}"
        os.makedirs(f"{self.folder}/tmp")
        self.prepare()

    def round(self, timed):
        command = BEGIN.format(folder=shlex.quote(self.folder), tools=shlex.quote(self.tools), command=shlex.join(self.command))
        env = {**os.environ, "VMTEST_NO_UI": "1", "PATH": f"{self.tools}/venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin"}
        env.pop("TMPDIR", None)
        # Their memory of earlier runs, if they keep one, is not the user's.
        env["HOME"] = f"{self.folder}/tmp"
        with timed("start"):
            said = run(*self.prefix, "sh", "-c", command, called=shlex.join(self.command), cwd="/", env=env)
        if "Linux" not in said.split():
            raise RuntimeError(f"a wrong answer: {said[-300:]}")

    def close(self):
        pass


class Vmtest(Boots):
    says = "vmtest with a configuration file; the command's end and the machine's are included. Its agent is qemu-ga"

    def prepare(self):
        program("qemu-ga", "install.sh installs qemu-guest-agent")
        vmtest = program("vmtest", "install.sh builds it", f"{self.tools}/cargo/bin")
        self.version = version(vmtest, "--version")
        found = {os.path.basename(path).removesuffix(".ko"): path for path in glob.glob(f"{self.modules}/kernel/**/*.ko", recursive=True)}
        there = [name for name in ORDER if name in found]
        initramfs(f"{self.folder}/initramfs", INIT.format(modules=" ".join(there)), [found[name] for name in there])
        with open(f"{self.folder}/qemu", "w") as file:
            file.write(EMULATED.format(qemu=self.qemu))
        os.chmod(f"{self.folder}/qemu", 0o755)
        with open(f"{self.folder}/vmtest.toml", "w") as file:
            file.write(CONFIG.format(kernel=self.kernel, memory=self.o.memory, folder=self.folder))
        self.command = [vmtest, "-c", f"{self.folder}/vmtest.toml"]


class VirtmeNg(Boots):
    says = "vng --run KERNEL --exec uname; the command's end and the machine's are included"

    def prepare(self):
        vng = program("vng", "install.sh installs it", f"{self.tools}/venv/bin")
        program("modprobe", "install.sh installs kmod")
        self.version = version(vng, "--version")
        # Its microvm boots unreliably without KVM.
        self.command = [vng, "--run", self.kernel, "--disable-kvm", "--disable-microvm", "--memory", f"{self.o.memory}M",
                        "--cpus", "1", "--exec", "/bin/uname"]
