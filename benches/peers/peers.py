#!/usr/bin/env python3
"""What people would use instead of vmkit, doing the same work on the same machine, in the same run.

    peers.py [--runs N] [--memory MIB] [--fill MIB] [--json] [PEER...]

The work: a fresh machine until it has executed a process; saving it to disk with its memory; bringing it back until it has
executed a process; saving and bringing it back once more; throwing it away. Peers take turns in each round; figures are medians, in
milliseconds. Everything is emulated (TCG), everywhere.

install.sh gets what it needs. What is left when it ends, however it ends: images and templates in the tools' folder.
"""
import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time

sys.dont_write_bytecode = True
import boots  # noqa: E402
import libvirt  # noqa: E402
import script  # noqa: E402
import vmkit  # noqa: E402
from common import HERE, Missing, guest, run  # noqa: E402

PEERS = {"vmkit": vmkit.Vmkit, "vmkit-own": vmkit.VmkitOwn, "script": script.Script, "libvirt": libvirt.Libvirt,
         "vmtest": boots.Vmtest, "virtme-ng": boots.VirtmeNg}
STEPS = {
    "answer": "a fresh machine, until its guest has answered",
    "start": "a fresh machine, until it has executed a process",
    "save": "to disk with its memory, the first time", "save2": "the second time",
    "resume": "the command alone that brings it back", "resume2": "the second time",
    "restore": "that, until it has executed a process", "restore2": "the second time",
    "delete": "thrown away",
}
# What is promised, and the steps that are compared: libvirt's and vmkit's, of one machine, the default kind.
TARGETS = [("a fresh machine that answers, beside virsh start until the guest answers", "answer", 15),
           ("vmkit start of a saved machine, beside virsh restore", "resume2", 4),
           ("vmkit suspend, beside virsh save", "save2", 100)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all when none is named")
    parser.add_argument("--vmkit", help="the program; as built in this repository, or in PATH, when not named")
    parser.add_argument("--tools", default=os.environ.get("PEERS_TOOLS") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vmkit-peers"), help="install.sh's folder [env: PEERS_TOOLS]")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", type=int, default=256, help="of the guest, in MiB")
    parser.add_argument("--fill", type=int, default=0, help="MiB of random data in the guest's memory before it is saved")
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    if unknown := [name for name in o.peers if name not in PEERS]:
        parser.error(f"unknown peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    built = os.path.join(HERE, "..", "..", "target", "release", "vmkit")
    o.vmkit = o.vmkit or (os.path.realpath(built) if os.path.exists(built) else shutil.which("vmkit"))
    if not o.vmkit:
        sys.exit("peers: no vmkit; `make build` makes it, install.sh too")
    o.peers = o.peers or list(PEERS)
    o.tools = os.path.abspath(o.tools)
    o.state = f"{o.tools}/state"
    os.environ["VMKIT_ACCEL"] = "tcg"
    os.environ["LC_ALL"] = "C"
    return o


def measure(o, figures, versions, missing):
    """Every peer, in turns. One that fails is named, and the others go on."""
    peers = {}
    with contextlib.ExitStack() as ends:
        # vmkit makes the kernel that all have in common, so it comes first.
        forks = vmkit.Vmkit(o)
        ends.callback(forks.close)
        print(f"{forks.version}: its image and template, in {o.state}", file=sys.stderr)
        forks.tell("template", "build", "--memory", f"{o.memory}M")
        o.kernel, o.initrd = guest(o.work, o.state)
        for name in o.peers:
            try:
                peers[name] = PEERS[name](o)
                ends.callback(peers[name].close)
                versions[name] = peers[name].version
            except (Missing, RuntimeError, OSError) as why:
                missing[name] = str(why)
                print(f"{name} is not measured: {why}", file=sys.stderr)
        for number in range(o.runs):
            for name in [name for name in peers if name not in missing]:
                print(f"round {number + 1} of {o.runs}: {name}", file=sys.stderr)
                taken = figures.setdefault(name, {})

                @contextlib.contextmanager
                def timed(step):
                    start = time.perf_counter()
                    yield
                    taken.setdefault(step, []).append((time.perf_counter() - start) * 1000)

                try:
                    peers[name].round(timed)
                except (RuntimeError, OSError, ValueError, TimeoutError) as why:
                    missing[name] = f"failed in round {number + 1}: {why}"
                    print(f"{name} {missing[name]}", file=sys.stderr)


def table(medians, versions, missing):
    steps = [step for step in STEPS if any(step in taken for taken in medians.values())]
    base = medians.get("vmkit", {})
    print(f"\n{'ms, medians':12}" + "".join(f"{step:>10}" for step in steps))
    for name, taken in medians.items():
        print(f"{name:12}" + "".join(f"{taken[step]:>10.1f}" if step in taken else f"{'-':>10}" for step in steps))
    if base:
        print(f"\n{'times vmkit':12}" + "".join(f"{step:>10}" for step in steps))
        for name in [name for name in medians if name != "vmkit"]:
            ratios = [f"{medians[name][step] / base[step]:.1f}" if step in medians[name] and step in base else "-" for step in steps]
            print(f"{name:12}" + "".join(f"{ratio:>10}" for ratio in ratios))
    print()
    for step in steps:
        print(f"  {step:10} {STEPS[step]}")
    print()
    for name in [*medians, *(name for name in missing if name not in medians)]:
        print(f"  {name:10} {versions.get(name, '')}: {PEERS[name].says}" if name in versions else f"  {name:10}")
        if name in missing:
            print(f"  {'':10} not measured in full: {missing[name]}")


def main():
    o = arguments()
    # So that what was started is ended then too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("peers: asked to end"))
    os.makedirs(o.tools, exist_ok=True)
    figures, versions, missing = {}, {}, {}
    with open(f"{o.tools}/lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"peers: another run uses {o.tools}; name another with --tools")
        o.work = tempfile.mkdtemp(prefix="peers-")
        try:
            measure(o, figures, versions, missing)
        except KeyboardInterrupt:
            sys.exit("peers: interrupted")
        except (Missing, RuntimeError) as why:
            sys.exit(f"peers: {why}")
        finally:
            shutil.rmtree(o.work, ignore_errors=True)
    medians = {name: {f: round(statistics.median(v), 1) for f, v in taken.items()} for name, taken in figures.items()}
    targets = []
    for what, step, wanted in TARGETS:
        theirs, ours = medians.get("libvirt", {}).get(step), medians.get("vmkit", {}).get(step)
        times = round(theirs / ours, 1) if theirs and ours else None
        targets.append({"what": what, "step": step, "wanted": wanted, "times": times,
                        "verdict": "not measured" if times is None else "pass" if times >= wanted else "FAIL"})
    if o.json:
        print(json.dumps({"ms": medians, "samples": {n: {f: [round(x, 1) for x in v] for f, v in t.items()} for n, t in figures.items()},
                          "versions": versions, "missing": missing, "targets": targets, "qemu": run("qemu-system-x86_64", "--version").split("\n")[0],
                          "memory_mib": o.memory, "fill_mib": o.fill, "runs": o.runs}, indent=2))
    else:
        table(medians, versions, missing)
        print()
        for target in targets:
            print(f"  {target['verdict']:12} {target['times'] or '-':>6} times, {target['wanted']} wanted: {target['what']} ({target['step']})")
    # A peer that was asked for and failed is an error; a target that is missed is a result.
    sys.exit(1 if any(why.startswith("failed") for why in missing.values()) else 0)


if __name__ == "__main__":
    main()
