#!/usr/bin/env python3
"""What people would use instead of vmkit, doing the same work on the same machine, in the same run.

    peers.py [--vmkit PROGRAM] [--runs N] [--memory MIB] [--json] [PEER...]

Peers: vmkit, script (a program around bare QEMU: cold boot, whole memory saved and restored).
The work: a fresh machine until it has executed a process; saving it to disk with its memory; bringing it back until it
has executed a process; throwing it away. Medians, in milliseconds. Peers take turns in each round.

The script's guest is a busybox shell on a virtio-serial port, with vmkit's kernel for base: less than vmkit's own guest, which
mounts a disk and has an agent. Everything is emulated (TCG), everywhere.

Needs: vmkit with its base image (`vmkit run -- true` makes it), busybox (static), cpio, gzip.
"""
import argparse
import glob
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

MODULES = ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console"]
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in {modules}; do /bin/busybox insmod /mod/$m.ko; done
/bin/busybox --install -s /bin
export PATH=/bin
while [ ! -e /dev/vport0p1 ]; do usleep 10000; done
exec 3<>/dev/vport0p1
exec sh <&3 >&3 2>&3
"""
PROCESS = "/bin/busybox uname"
CMDLINE = "console=ttyS0 quiet reboot=t panic=-1"


class Missing(Exception):
    """A peer that cannot be measured here, and why."""


def guest(work, state):
    """Kernel and initramfs for those that have no guest of their own."""
    kernels = sorted(glob.glob(f"{state}/images/kernels/*/vmlinuz"))
    busybox = shutil.which("busybox")
    if not kernels or not busybox:
        raise Missing("no kernel in vmkit's image store, or no busybox: `vmkit run -- true` and busybox-static")
    root = f"{work}/root"
    for part in ("bin", "mod", "proc", "sys", "dev"):
        os.makedirs(f"{root}/{part}")
    shutil.copy(busybox, f"{root}/bin/busybox")
    there = [m for m in MODULES if os.path.exists(f"{os.path.dirname(kernels[-1])}/{m}.ko")]
    # Each after what it depends on.
    order = [m for m in MODULES if m in there]
    for module in order:
        shutil.copy(f"{os.path.dirname(kernels[-1])}/{module}.ko", f"{root}/mod/")
    with open(f"{root}/init", "w") as init:
        init.write(INIT.format(modules=" ".join(order)))
    os.chmod(f"{root}/init", 0o755)
    pack = f"cd {root} && find . | cpio -o -H newc 2>/dev/null | gzip -1 > {work}/initrd.gz"
    subprocess.run(pack, shell=True, check=True)
    kernel = f"{work}/vmlinuz"
    shutil.copy(kernels[-1], kernel)
    for path in (work, kernel, f"{work}/initrd.gz"):
        os.chmod(path, 0o755)
    return kernel, f"{work}/initrd.gz"


def connect(path, deadline=120):
    end = time.monotonic() + deadline
    while True:
        try:
            line = socket.socket(socket.AF_UNIX)
            line.settimeout(deadline)
            line.connect(path)
            return line
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.0005)


def ask(line):
    """A process in the guest, and its answer."""
    # Asked again until somebody listens: what is said before the shell is there is lost.
    line.settimeout(120)
    line.sendall(f'{PROCESS}; echo D""ONE\n'.encode())
    got = b""
    while b"DONE\n" not in got:
        chunk = line.recv(65536)
        if not chunk:
            raise RuntimeError("the guest's line closed")
        got += chunk
    if b"Linux" not in got:
        raise RuntimeError(f"a wrong answer: {got!r}")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Vmkit:
    def __init__(self, o):
        self.program, self.n = o.vmkit, 0
        run(self.program, "template", "build", "--memory", f"{o.memory}M")
        self.memory = f"{o.memory}M"

    def round(self, add):
        self.n += 1
        name = f"peer-{os.getpid()}-{self.n}"
        start = time.perf_counter()
        run(self.program, "run", "--keep", "--name", name, "--memory", self.memory, "--", *PROCESS.split())
        add("start", start)
        # The first suspend of a fork writes its memory, later ones do not: both are what it is used for.
        for figure in ("save_first", "save"):
            start = time.perf_counter()
            run(self.program, "suspend", name)
            add(figure, start)
            start = time.perf_counter()
            run(self.program, "start", name)
            if "Linux" not in run(self.program, "exec", name, "--", *PROCESS.split()):
                raise RuntimeError("a wrong answer")
            add("restore" if figure == "save" else "restore_first", start)
        start = time.perf_counter()
        run(self.program, "cleanup", "--grace", "0", name)
        add("delete", start)

    def close(self):
        pass


class Script:
    """What a script around QEMU does: no shared memory, no templates; the whole memory goes to a file and comes from it."""

    def __init__(self, o):
        self.o, self.n = o, 0
        self.qemu = shutil.which("qemu-system-x86_64")
        if not self.qemu:
            raise Missing("qemu-system-x86_64 is not installed")

    def start(self, extra):
        dir = f"{self.o.work}/script-{self.n}"
        os.makedirs(dir, exist_ok=True)
        for path in ("qmp", "port"):
            if os.path.exists(f"{dir}/{path}"):
                os.remove(f"{dir}/{path}")
        args = [self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35", "-accel",
                "tcg,thread=multi", "-cpu", "max", "-m", str(self.o.memory), "-kernel", self.o.kernel, "-initrd", self.o.initrd,
                "-append", CMDLINE, "-qmp", f"unix:{dir}/qmp,server=on,wait=off", "-serial", f"file:{dir}/serial",
                "-device", "virtio-serial-pci", "-chardev", f"socket,id=c0,path={dir}/port,server=on,wait=off",
                "-device", "virtserialport,chardev=c0,name=peer.0", *extra]
        process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=open(f"{dir}/err", "w"))
        self.o.started.append(process)
        qmp = connect(f"{dir}/qmp").makefile("rw")
        qmp.readline()
        self.tell(qmp, "qmp_capabilities")
        return dir, process, qmp, connect(f"{dir}/port")

    @staticmethod
    def tell(qmp, command, **arguments):
        qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        qmp.flush()
        while True:
            answer = json.loads(qmp.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def migrated(self, qmp):
        while True:
            status = self.tell(qmp, "query-migrate").get("status")
            if status == "completed":
                return
            if status == "failed":
                raise RuntimeError("migration failed")
            time.sleep(0.001)

    def round(self, add):
        self.n += 1
        start = time.perf_counter()
        dir, process, qmp, line = self.start([])
        ask(line)
        add("start", start)
        start = time.perf_counter()
        self.tell(qmp, "stop")
        self.tell(qmp, "migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.tell(qmp, "migrate", uri=f"file:{dir}/saved")
        self.migrated(qmp)
        process.kill()
        process.wait()
        add("save", start)
        start = time.perf_counter()
        dir, process, qmp, line = self.start(["-incoming", "defer", "-S"])
        self.tell(qmp, "migrate-incoming", uri=f"file:{dir}/saved")
        self.migrated(qmp)
        self.tell(qmp, "cont")
        ask(line)
        add("restore", start)
        start = time.perf_counter()
        process.kill()
        process.wait()
        shutil.rmtree(dir)
        add("delete", start)

    def close(self):
        pass


PEERS = {"vmkit": Vmkit, "script": Script}
FIGURES = ["start", "save_first", "save", "restore_first", "restore", "delete"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", default=list(PEERS))
    parser.add_argument("--vmkit", default="vmkit")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    if unknown := [name for name in o.peers if name not in PEERS]:
        parser.error(f"unknown peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    state = os.environ.get("VMKIT_STATE_DIR") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "vmkit")
    # So that what was started is ended then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("peers: asked to end"))
    o.started, o.work = [], tempfile.mkdtemp(prefix="peers-")
    figures, missing, peers = {}, {}, {}
    try:
        o.kernel, o.initrd = guest(o.work, state)
        for name in o.peers:
            try:
                peers[name] = PEERS[name](o)
            except Missing as why:
                missing[name] = str(why)
        for number in range(o.runs):
            for name, peer in peers.items():
                print(f"round {number + 1} of {o.runs}: {name}", file=sys.stderr)
                taken = figures.setdefault(name, {})
                peer.round(lambda figure, start: taken.setdefault(figure, []).append((time.perf_counter() - start) * 1000))
    except Missing as why:
        sys.exit(f"peers: {why}")
    finally:
        for process in o.started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for peer in peers.values():
            peer.close()
        shutil.rmtree(o.work, ignore_errors=True)
    medians = {name: {f: round(statistics.median(v), 1) for f, v in taken.items()} for name, taken in figures.items()}
    if o.json:
        print(json.dumps({"ms": medians, "missing": missing}, indent=2))
        return
    print(f"{'':10}" + "".join(f"{figure:>15}" for figure in FIGURES))
    for name, taken in medians.items():
        print(f"{name:10}" + "".join(f"{taken.get(figure, ''):>15}" for figure in FIGURES))
    for name, why in missing.items():
        print(f"{name:10} not measured: {why}")


if __name__ == "__main__":
    main()
