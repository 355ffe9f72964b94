"""libvirt: whole virsh commands, to a libvirtd of our own.

The daemon runs in namespaces of its own (mounts and processes): its configuration, state and sockets are in our folder, and
when its first process ends, the kernel ends all others. The machine's own libvirt, if it has one, is not touched.
"""
import os
import shlex
import subprocess
import time

from common import CMDLINE, Missing, apart, ask, connect, filling, listens, program, run, version

DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{qemu}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{folder}/serial'/><target port='0'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{folder}/port'/>
      <target type='virtio' name='peer.0'/>
    </channel>
    <memballoon model='none'/>
  </devices>
</domain>
"""
DAEMON_CONF = """unix_sock_dir = "{sockets}"
auth_unix_rw = "none"
auth_unix_ro = "none"
"""
# Root needs no other user here, and no security driver: the guest is ours.
QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
"""
# Run as the first process of the namespaces. What the daemons write goes to our folder instead of the machine's. It stays, for it
# has to take note of every QEMU's end: where nobody does, libvirt waits 40 s for a process that is gone, and calls it a hang.
BEGIN = """set -e
for there in run var/lib var/cache var/log; do mount --bind {home}/$there /$there; done
mount --bind {home}/etc /etc/libvirt
for there in passwd group; do
  cat /etc/$there {home}/$there > {home}/$there.all
  mount --bind {home}/$there.all /etc/$there
done
mount -t proc proc /proc
{virtlogd} &
{libvirtd} -f {home}/etc/libvirtd.conf &
wait
"""


class Libvirt:
    says = "virsh start, save, restore, destroy and undefine; libvirtd and virtlogd already run"

    def __init__(self, o):
        self.o, self.n, self.daemon = o, 0, None
        how = "install.sh installs libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients"
        self.virsh, libvirtd = program("virsh", how), program("libvirtd", how)
        self.qemu = program("qemu-system-x86_64", "scripts/setup.sh installs it")
        if not os.path.isdir("/etc/libvirt"):
            raise Missing(f"/etc/libvirt is not there; {how}")
        self.version = f"libvirt {version(libvirtd, '--version').split()[-1]}"
        self.home = f"{o.work}/libvirt"
        sockets = f"{o.work}/sockets"
        for part in ("run", "var/lib", "var/cache", "var/log/libvirt", "etc"):
            os.makedirs(f"{self.home}/{part}")
        os.makedirs(sockets)
        # A user whom Debian's libvirt looks up as it starts, and no longer needs when it has read its configuration.
        user, group = "libvirt-qemu:x:64055:64055::/:/bin/false\n", "libvirt-qemu:x:64055:\n"
        for name, text in (("etc/libvirtd.conf", DAEMON_CONF.format(sockets=sockets)), ("etc/qemu.conf", QEMU_CONF),
                           ("passwd", user), ("group", group)):
            with open(f"{self.home}/{name}", "w") as conf:
                conf.write(text)
        begin = BEGIN.format(home=shlex.quote(self.home), virtlogd=program("virtlogd", how), libvirtd=libvirtd)
        self.said = f"{self.home}/said"
        with open(self.said, "w") as said:
            self.daemon = subprocess.Popen([*apart(), "sh", "-c", begin], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                           start_new_session=True)
        self.uri = f"qemu+unix:///system?socket={sockets}/libvirt-sock"
        try:
            self.ready()
        except BaseException:
            self.close()
            raise

    def ready(self):
        end = time.monotonic() + 30
        while True:
            try:
                self.tell("list")
                return
            except RuntimeError as why:
                if self.daemon.poll() is not None or time.monotonic() > end:
                    with open(self.said) as said:
                        raise Missing(f"libvirtd does not run here: {said.read().strip()[-400:] or why}") from None
                time.sleep(0.05)

    def tell(self, *command):
        return run(self.virsh, "-q", "-c", self.uri, *command)

    def round(self, timed):
        self.n += 1
        name = f"peer-{self.n}"
        folder = f"{self.o.work}/{name}"
        os.makedirs(folder)
        with open(f"{folder}/domain.xml", "w") as xml:
            xml.write(DOMAIN.format(name=name, memory=self.o.memory, kernel=self.o.kernel, initrd=self.o.initrd, cmdline=CMDLINE,
                                    qemu=self.qemu, folder=folder))
        self.tell("define", f"{folder}/domain.xml")
        with timed("start"):
            with timed("answer"):
                self.tell("start", name)
                line = connect(f"{folder}/port")
                listens(line)
            ask(line)
        if self.o.fill:
            ask(line, filling("/fill", self.o.fill))
        for again in ("", "2"):
            line.close()
            with timed("save" + again):
                self.tell("save", name, f"{folder}/saved")
            with timed("restore" + again):
                with timed("resume" + again):
                    self.tell("restore", f"{folder}/saved")
                line = connect(f"{folder}/port")
                ask(line)
        line.close()
        with timed("delete"):
            self.tell("destroy", name)
            self.tell("undefine", name)
            os.remove(f"{folder}/saved")

    def close(self):
        if self.daemon and self.daemon.poll() is None:
            # --kill-child: with unshare goes the first process in there, and with that all others.
            self.daemon.kill()
            self.daemon.wait()
