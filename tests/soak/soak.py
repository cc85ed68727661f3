# SPDX-License-Identifier: Apache-2.0
"""A master and two clients under mixed load, while processes of theirs are killed, stopped and replaced.

Each host has a system UUID and a mount namespace of its own; the device is a sparse file. Which process is hit, when
and how comes from a seed. Calls may fail only while a mount is really down: its supervisor was killed, or it was
unmounted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from famfs_server.volume import check
from harness import (
    BIN,
    CLIENT_UUID,
    MASTER_UUID,
    MIB,
    THIRD_UUID,
    File,
    Site,
    format_device,
    opened,
    populate,
    run,
    wait_for,
)

HERE = Path(__file__).parent
ROLES = {"0": ("make", "make", "look", "write", "copy"), "1": ("look", "write", "refuse"), "2": ("look", "write")}
"""What runs on each host; host 0 is the master."""
UUIDS = {"0": MASTER_UUID, "1": CLIENT_UUID, "2": THIRD_UUID}
PAUSE = (0.1, 0.8)
"""Seconds between two blows."""
LONG = 10.0
"""Seconds that no call may take: a worker that was stopped is replaced after five."""
LEAST = 6
"""Blows without which nothing is proven, however slow the machine is."""
LOST = 2.0
"""A file whose close came so many seconds before a kill of the supervisor may be lost unless it was synchronised."""
BLOWS = {"kill worker": 70, "kill supervisor": 7, "unmount": 7, "stop worker": 2, "upgrade": 4, "kill notifier": 10}
"""What is done, and how often beside the others."""


@dataclass
class Summary:
    """What a soak came to."""

    seed: int
    seconds: float = 0.0
    blows: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    reports: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: int = 0
    compared: int = 0
    """Bytes that were read and compared."""


class Host:
    """One host: a mount namespace, a mount in it, and programs that use it."""

    def __init__(self, site: Site, number: str, device: Path, seed: int, rng: random.Random) -> None:
        self.site, self.number, self.device, self._seed, self._rng = site, number, device, seed, rng
        self.host = site.host(UUIDS[number])
        self.place = site.place(f"mnt{number}")
        self._state = site.directory / f"state{number}"
        self._epoch = self._looks = 0
        self.deaths: list[tuple[float, float]] = []
        """When its supervisor was killed, and when nothing was left of the mount."""
        self.blows: list[tuple[str, float]] = []
        """What was done to it, and when."""
        self._holder = subprocess.Popen(["unshare", "-m", "--propagation", "slave", "sleep", "infinity"])
        self._loads: list[tuple[subprocess.Popen[bytes], Path]] = []
        assert wait_for(lambda: Path(f"/proc/{self._holder.pid}/comm").read_text() == "sleep\n")

    def inside(self, *words: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program in the host's namespace."""
        enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        return run(*enter, *map(str, words), env=self.host.environment, timeout=timeout)

    def tell(self, word: str) -> None:
        """Tell the programs of this host `up`, `down` or `stop`."""
        self._epoch += word == "down"
        new = self._state.with_suffix(".new")
        new.write_text(f"{self._epoch} {word}")
        new.rename(self._state)

    def mount(self) -> None:
        """Mount, and let the programs go on."""
        fast = self._rng.choice(("on", "off"))
        done = self.inside(*self.host.mount_command(self.device, self.place, f"fastpath={fast}"))
        if done.returncode:
            raise AssertionError(f"host {self.number} cannot mount: {done.stderr}")
        self.tell("up")

    def start(self) -> None:
        """Start the programs."""
        for index, role in enumerate(ROLES[self.number]):
            output = self.site.directory / f"report{self.number}.{index}"
            words = [sys.executable, "-I", "-S", HERE / "load.py", self.place, role, self.number, index, self._seed]
            enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
            with output.open("wb") as file:
                process = subprocess.Popen([*enter, *map(str, words), str(self._state)], stdout=file)
            self._loads.append((process, output))

    def processes(self, name: str) -> list[int]:
        """The daemon's processes called famfs-NAME."""
        return [pid for pid, comm in self.site.processes(self.host).items() if comm == f"famfs-{name}"[:15]]

    def hit(self, blow: str) -> bool:
        """Do one blow; whether there was somebody to hit.

        Not before the last one is over: a request that is in hand at two deaths in a row is answered with EIO by the
        third worker (decisions 16).
        """
        self._looks += 1
        if self.inside("test", "-e", f"{self.place}/look{self._looks}", timeout=30).returncode != 1:
            raise AssertionError(f"host {self.number} has a file that nobody has made")
        victim = self.processes(blow.rpartition(" ")[2]) if " " in blow else [0]
        if len(victim) != 1:
            return False
        self.blows.append((blow, time.monotonic()))
        if blow in ("kill worker", "kill notifier"):
            os.kill(victim[0], signal.SIGKILL)
        elif blow == "stop worker":
            os.kill(victim[0], signal.SIGSTOP)
        elif blow == "upgrade":
            done = self.inside(BIN / "famfs", "upgrade", self.place)
            if done.returncode:
                raise AssertionError(f"upgrade: {done.stderr}")
        else:
            self.outage(victim[0] if blow == "kill supervisor" else 0)
        return True

    def outage(self, supervisor: int) -> None:
        """Kill the supervisor, or unmount; then mount again."""
        self.tell("down")
        if supervisor:
            killed = time.monotonic()
            os.kill(supervisor, signal.SIGKILL)
            self.require_gone()
            self.deaths.append((killed, time.monotonic()))
        else:
            self.unmount()
            self.require_gone()
        self.mount()

    def unmount(self) -> None:
        """Unmount as a user does; programs leave within a moment."""
        if not wait_for(lambda: self.inside("umount", self.place).returncode == 0, 20):
            raise AssertionError(f"host {self.number} cannot unmount: a program does not leave")

    def require_gone(self) -> None:
        """Wait for the end of the mount and of all of its processes."""

        def gone() -> bool:
            table = Path(f"/proc/{self._holder.pid}/mountinfo").read_text()
            return f" {self.place} " not in table and not self.site.processes(self.host)

        if not wait_for(gone, 20):
            raise AssertionError(f"host {self.number}: left behind: {self.site.processes(self.host)}")

    def waiting_in_kernel(self) -> list[int]:
        """Programs in state D."""
        found = []
        for process, _ in self._loads:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "D":
                found.append(process.pid)
        return found

    def reports(self) -> Iterator[dict[str, Any]]:
        """Stop the programs; what each has to say."""
        self.tell("stop")
        for process, output in self._loads:
            process.wait(60)
            if process.returncode:
                raise AssertionError(f"a program ended with {process.returncode}: {output.read_text()}")
            yield json.loads(output.read_text())

    def close(self) -> None:
        """End everything, whatever state it is in."""
        for process, _ in self._loads:
            process.kill()
        for pid in self.site.processes(self.host):
            os.kill(pid, signal.SIGKILL)
        # The namespace's mounts go with its last process.
        self._holder.kill()
        self._holder.wait()
        for process, _ in self._loads:
            process.wait(20)


def soak(directory: Path, image: Path, seconds: float, seed: int) -> Summary:
    """Run for so many seconds; everything lies in `directory`, but for the device."""
    summary = Summary(seed)
    rng = random.Random(seed)
    start = time.monotonic()
    directory.mkdir(exist_ok=True)
    format_device(image, size=512 << 30, log_length=64 * MIB)
    populate(image, ["made0.0"], [File(f"scratch{number}", size=1 << 20) for number in UUIDS])
    site = Site(directory, directory)
    with hosts_of(site, image, seed, rng) as hosts:
        try:
            strike(hosts, summary, rng, seconds)
            finish(hosts, summary)
        except AssertionError as error:
            summary.problems.append(str(error))
    with opened(image) as volume:
        report = check.examine(volume.memories[0], str(image), None)
        if not report.clean:
            summary.problems += list(check.render(report))
        summary.files = report.shown_files
    summary.problems += site.leftovers()
    summary.seconds = time.monotonic() - start
    return summary


@contextmanager
def hosts_of(site: Site, image: Path, seed: int, rng: random.Random) -> Iterator[list[Host]]:
    """The hosts, mounted and at work."""
    hosts: list[Host] = []
    try:
        for number in UUIDS:
            hosts.append(Host(site, number, image, seed, rng))
            hosts[-1].mount()
        for host in hosts:
            host.start()
        yield hosts
    finally:
        for host in hosts:
            host.close()


def strike(hosts: list[Host], summary: Summary, rng: random.Random, seconds: float) -> None:
    """Hit one host after the other until the time is up, and `LEAST` times in any case."""
    deadline = time.monotonic() + seconds
    stuck: Counter[int] = Counter()
    while time.monotonic() < deadline or sum(summary.blows.values()) < LEAST:
        time.sleep(rng.uniform(*PAUSE))
        host = rng.choice(hosts)
        (blow,) = rng.choices(list(BLOWS), list(BLOWS.values()))
        if host.hit(blow):
            summary.blows[blow] += 1
        waiting = {pid for host in hosts for pid in host.waiting_in_kernel()}
        for pid in set(stuck) - waiting:
            del stuck[pid]
        stuck.update(waiting)
        if hung := [pid for pid, looks in stuck.items() if looks > 60]:
            raise AssertionError(f"programs {hung} hang in the kernel")


def finish(hosts: list[Host], summary: Summary) -> None:
    """Stop the programs, compare what they say with what every host shows now, and unmount."""
    for host in hosts:
        for report in host.reports():
            summary.reports.append(report)
            summary.calls.update(report["calls"])
            summary.compared += report["read"]
            summary.problems += [f"host {host.number}: {line}" for line in report["differences"] + report["failures"]]
            took, name, start = report["longest"]
            if took > LONG:
                near = [f"{blow} at {at - start:.1f} s" for blow, at in host.blows if start - LONG < at < start + took]
                summary.problems.append(f"host {host.number}: {name} took {took:.1f} s; {', '.join(near) or 'no blow'}")
    shown = []
    for host in hosts:
        done = host.inside(sys.executable, "-I", "-S", HERE / "verify.py", host.place, timeout=600)
        if done.returncode:
            raise AssertionError(f"host {host.number} cannot be read: {done.stderr}")
        found = json.loads(done.stdout)
        shown.append(found)
        summary.compared += found["bytes"]
        summary.problems += [f"host {host.number}: wrong bytes in {name}" for name in found["wrong"]]
    digests = [found["digests"] for found in shown]
    for number, other in enumerate(digests):
        different = sorted(name for name in other.keys() | digests[0].keys() if other.get(name) != digests[0].get(name))
        if different:
            summary.problems.append(f"hosts 0 and {number} differ in {len(different)} files: {different[:5]}")
    deaths = hosts[0].deaths
    for report in summary.reports:
        for name, (synchronised, closed) in report["made"].items():
            lost = not synchronised and any(killed - LOST <= closed <= gone for killed, gone in deaths)
            if name not in digests[0] and not lost:
                summary.problems.append(f"{name} is gone")
        if report["role"] == "write" and report["scratch"] not in ("", digests[0][f"scratch{report['host']}"]):
            summary.problems.append(f"scratch{report['host']} is not what was written")
    for host in hosts:
        host.unmount()
        host.require_gone()
