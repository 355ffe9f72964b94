"""vmkit, each step one or more whole commands, as a user gives them."""
from common import PROCESS, filling, run


class Vmkit:
    """A fork of the image's template: it shares the template's memory until it is saved the first time."""
    says = "clone and start of one machine, run --keep of another; suspend; start and exec; cleanup --grace 0. A fork of the template: its first save writes its memory"
    name = "fork"

    def __init__(self, o):
        self.o, self.n = o, 0
        self.version = self.tell("--version").strip()
        self.memory = f"{o.memory}M"

    def tell(self, *command):
        return run(self.o.vmkit, "--state-dir", self.o.state, *command)

    def execute(self, name):
        if "Linux" not in self.tell("exec", name, "--", *PROCESS.split()):
            raise RuntimeError("a wrong answer")

    def answering(self, name, *options):
        self.tell("clone", *options, "--memory", self.memory, name)
        self.tell("start", name)

    def fresh(self, name):
        if "Linux" not in self.tell("run", "--keep", "--name", name, "--memory", self.memory, "--", *PROCESS.split()):
            raise RuntimeError("a wrong answer")

    def round(self, timed):
        self.n += 1
        name = f"peer-{self.name}-{self.n}"
        with timed("answer"):
            self.answering(name + "-a")
        self.tell("cleanup", "--grace", "0", name + "-a")
        with timed("start"):
            self.fresh(name)
        if self.o.fill:
            self.tell("exec", name, "--", "sh", "-c", filling("/dev/shm/fill", self.o.fill))
        for again in ("", "2"):
            with timed("save" + again):
                self.tell("suspend", name)
            with timed("restore" + again):
                with timed("resume" + again):
                    self.tell("start", name)
                self.execute(name)
        with timed("delete"):
            self.tell("cleanup", "--grace", "0", name)

    def close(self):
        """Whatever there is in our state directory: it is nobody else's."""
        self.tell("-q", "cleanup", "--all", "--grace", "0")


class VmkitOwn(Vmkit):
    """A machine with its memory for itself from the start: no save writes it."""
    says = "clone --own-memory, start, exec; suspend; start and exec; cleanup --grace 0. No save writes the memory"
    name = "own"

    def answering(self, name):
        super().answering(name, "--own-memory")

    def fresh(self, name):
        self.answering(name)
        self.execute(name)
