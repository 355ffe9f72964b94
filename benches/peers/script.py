"""What a script around QEMU does: no shared memory, no templates; the whole memory goes to a file and comes from it."""
import json
import os
import shutil
import subprocess
import time

from common import CMDLINE, ask, connect, filling, listens, program, version


class Script:
    says = "a cold boot with QEMU's own command line; stop, the whole memory to a file, kill; a new QEMU that loads it; kill"

    def __init__(self, o):
        self.o, self.n, self.process = o, 0, None
        self.qemu = program("qemu-system-x86_64", "scripts/setup.sh installs it")
        self.version = version(self.qemu, "--version")

    def start(self, extra):
        folder = f"{self.o.work}/script-{self.n}"
        os.makedirs(folder, exist_ok=True)
        for path in ("qmp", "port"):
            if os.path.exists(f"{folder}/{path}"):
                os.remove(f"{folder}/{path}")
        args = [self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35", "-accel",
                "tcg,thread=multi", "-cpu", "max", "-m", str(self.o.memory), "-kernel", self.o.kernel, "-initrd", self.o.initrd,
                "-append", CMDLINE, "-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-serial", f"file:{folder}/serial",
                "-device", "virtio-serial-pci", "-chardev", f"socket,id=c0,path={folder}/port,server=on,wait=off",
                "-device", "virtserialport,chardev=c0,name=peer.0", *extra]
        with open(f"{folder}/err", "w") as err:
            self.process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)
        qmp = connect(f"{folder}/qmp").makefile("rw")
        qmp.readline()
        self.tell(qmp, "qmp_capabilities")
        return folder, qmp, connect(f"{folder}/port")

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
        while (status := self.tell(qmp, "query-migrate").get("status")) != "completed":
            if status == "failed":
                raise RuntimeError("migration failed")
            time.sleep(0.001)

    def end(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def round(self, timed):
        self.n += 1
        with timed("start"):
            with timed("answer"):
                folder, qmp, line = self.start([])
                listens(line)
            ask(line)
        if self.o.fill:
            ask(line, filling("/fill", self.o.fill))
        for again in ("", "2"):
            with timed("save" + again):
                self.tell(qmp, "stop")
                self.tell(qmp, "migrate-set-parameters", **{"max-bandwidth": 1 << 40})
                self.tell(qmp, "migrate", uri=f"file:{folder}/saved")
                self.migrated(qmp)
                self.end()
            with timed("restore" + again):
                with timed("resume" + again):
                    folder, qmp, line = self.start(["-incoming", "defer", "-S"])
                    self.tell(qmp, "migrate-incoming", uri=f"file:{folder}/saved")
                    self.migrated(qmp)
                    self.tell(qmp, "cont")
                ask(line)
        with timed("delete"):
            self.end()
            shutil.rmtree(folder)

    def close(self):
        self.end()
