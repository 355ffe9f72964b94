"""What the peers share: a guest for those that have none of their own, and how a process is asked for in it."""
import glob
import os
import shutil
import socket
import subprocess
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# In this order: each after what it depends on.
MODULES = ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console"]
# The shell is begun anew when the host's end of the port closed, and then says so: what the host sent before that is lost.
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in {modules}; do /bin/busybox insmod /mod/$m.ko; done
/bin/busybox --install -s /bin
export PATH=/bin
while [ ! -c /dev/vport0p1 ]; do usleep 10000; done
while :; do
  sh -c 'echo LISTENING; exec sh' <>/dev/vport0p1 >&0 2>&0
done
"""
LISTENING = b"LISTENING\n"
PROCESS = "/bin/busybox uname"
CMDLINE = "console=ttyS0 quiet reboot=t panic=-1"
PATIENCE = 180


def filling(file, mebibytes):
    """What takes memory in a guest: random, so that nobody saves it as nothing."""
    return f"dd if=/dev/urandom of={file} bs=1M count={mebibytes} 2>/dev/null"


class Missing(Exception):
    """A peer that cannot be measured here, and why."""


def run(*command, called=None, **options):
    """A whole command: its output, or an error with what it said."""
    called = called or " ".join(command)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, **options)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{called}: no end within {PATIENCE} s") from None
    if done.returncode != 0:
        said = "; ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[:6])[:600]
        raise RuntimeError(f"{called}: exit code {done.returncode}: {said or 'it said nothing'}")
    return done.stdout


def program(name, how, *folders):
    """Where a program is, or what installs it."""
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if not found:
        raise Missing(f"{name} is not installed; {how}")
    return found


def version(*command):
    return run(*command).strip().splitlines()[0]


def apart():
    """Begins a command whose process is the first of its own namespaces (processes, mounts). When it ends, or we do, the kernel
    ends all that it began."""
    if os.geteuid() != 0:
        raise Missing("only root can run it apart from the machine's own files and daemons: run peers.py as root")
    return [program("setpriv", "it is in util-linux"), "--pdeathsig", "KILL", program("unshare", "it is in util-linux"),
            "--mount", "--pid", "--fork", "--kill-child"]


def archive(root):
    """The folder as an archive that a kernel unpacks (cpio, newc), not compressed."""
    names = []
    for folder, folders, files in os.walk(root):
        names += [os.path.relpath(os.path.join(folder, name), root) for name in sorted(folders) + sorted(files)]
    packed = bytearray()

    def entry(number, name, mode, data):
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        packed.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0")
        packed.extend(b"\0" * (-len(packed) % 4) + data)
        packed.extend(b"\0" * (-len(packed) % 4))

    for number, name in enumerate(names, 1):
        path = os.path.join(root, name)
        data = b""
        if os.path.isfile(path):
            with open(path, "rb") as file:
                data = file.read()
        entry(number, name, os.stat(path).st_mode, data)
    entry(0, "TRAILER!!!", 0, b"")
    return bytes(packed)


def initramfs(path, init, modules):
    """An initramfs with busybox, these modules' files and this program as init."""
    root = path + ".root"
    for part in ("bin", "mod", "proc", "sys", "dev", "newroot"):
        os.makedirs(f"{root}/{part}")
    shutil.copy(program("busybox", "install.sh installs it (busybox-static)"), f"{root}/bin/busybox")
    for module in modules:
        shutil.copy(module, f"{root}/mod/")
    with open(f"{root}/init", "w") as file:
        file.write(init)
    os.chmod(f"{root}/init", 0o755)
    with open(path, "wb") as file:
        file.write(archive(root))
    shutil.rmtree(root)
    return path


def guest(work, state):
    """The kernel of vmkit's base image, and an initramfs of a busybox shell on a virtio-serial port."""
    kernels = sorted(glob.glob(f"{state}/images/kernels/*/vmlinuz"), key=os.path.getmtime)
    if not kernels:
        raise Missing("no kernel in vmkit's image store: the peer vmkit makes it")
    home = os.path.dirname(kernels[-1])
    there = [m for m in MODULES if os.path.exists(f"{home}/{m}.ko")]
    made = initramfs(f"{work}/initramfs", INIT.format(modules=" ".join(there)), [f"{home}/{m}.ko" for m in there])
    return shutil.copy(kernels[-1], f"{work}/vmlinuz"), made


def connect(path, patience=PATIENCE):
    """A connection to a socket that may not be there yet."""
    end = time.monotonic() + patience
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.settimeout(patience)
            line.connect(path)
            return line
        except OSError:
            line.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.0005)


def listens(line):
    """Waits for the first word of a fresh guest."""
    got = b""
    while LISTENING not in got:
        chunk = line.recv(65536)
        if not chunk:
            raise RuntimeError("the guest's line closed")
        got += chunk


def ask(line, process=PROCESS):
    """A process in the guest, and its answer. A guest that was brought back may say that it listens, when it saw that the host was
    gone: then it is asked again."""
    question = f'{process}; echo D""ONE\n'.encode()
    got, listened = b"", 0
    line.sendall(question)
    while b"DONE\n" not in got:
        chunk = line.recv(65536)
        if not chunk:
            raise RuntimeError("the guest's line closed")
        got += chunk
        if got.count(LISTENING) > listened:
            listened += 1
            line.sendall(question)
    if process == PROCESS and b"Linux" not in got:
        raise RuntimeError(f"a wrong answer: {got!r}")
