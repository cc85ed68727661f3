# SPDX-License-Identifier: Apache-2.0
"""One virtual machine: its initramfs, its memory, its devices, its life and its end."""

import contextlib
import ctypes
import json
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vm.cache import Cache, Kernel, Tools
from vm.report import RunnerError, say

KERNEL_OPTIONS = (
    "console=ttyS0 quiet loglevel=6 panic=-1 mitigations=off nokaslr tsc=reliable random.trust_cpu=on "
    "rcupdate.rcu_expedited=1"
)
# An emulated processor's time stamp counter is this machine's, and the kernel measures its rate while it boots. On a
# busy machine the rate came out up to 20 times too low: so much faster ran the guest's clock, and all time limits with
# it. The kernel also panics if timer interrupts that it waits for come late.
EMULATED_OPTIONS = "clocksource=hpet no_timer_check"
DAX_START_MIB = 4096  # the ranges begin where q35 continues memory above its 32-bit hole
LOW_MEMORY_MIB = 2048  # what q35 leaves below that hole ...
SPLIT_MEMORY_MIB = 2816  # ... once a guest has this much in all
CXL_UNIT_MIB = 256  # sizes of CXL devices and of the range of addresses for them are multiples of this
PROBE_SECONDS = 8  # a guest that KVM really runs answers within one or two


def initramfs(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive (format "newc") of these paths, modes and contents."""
    archive = bytearray()

    def put(name: str, mode: int, content: bytes, number: int) -> None:
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        archive.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4) + content)
        archive.extend(bytes(-len(archive) % 4))

    folders = 0
    for folders, folder in enumerate(("bin", "dev", "modules"), 1):
        put(folder, 0o40755, b"", folders)
    for number, (name, mode, content) in enumerate(files, folders + 1):
        put(name, 0o100000 | mode, content, number)
    put("TRAILER!!!", 0, b"", 0)
    return bytes(archive)


def guest_files(
    tools: Tools, kernel: Kernel, settings: Mapping[str, str], kept: Sequence[Path], job: str, more: Sequence[Path] = ()
) -> bytes:
    """The initramfs: busybox, the init, its settings, the modules (and `more` of them) and the job."""
    config = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    config += shlex.join(["set", "--", *map(str, kept)]) + "\n"
    init = Path(__file__).resolve().with_name("init")
    files = [
        ("bin/busybox", 0o755, tools.busybox.read_bytes()),
        ("init", 0o755, init.read_bytes()),
        ("config", 0o644, config.encode()),
        ("job", 0o755, job.encode()),
    ]
    files += [
        (f"modules/{path.name}", 0o644, path.read_bytes())
        for path in sorted({*kernel.modules, *kernel.spare_modules, *more})
    ]
    return initramfs(files)


def end_with_parent() -> None:
    """Runs in a child before its program: a killed runner leaves no guest behind."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


@dataclass(frozen=True)
class Hardware:
    """What a guest consists of. Sizes in MiB."""

    accelerator: str
    cpus: int
    memory: int
    devices: Sequence[int] = ()
    cxl: bool = False

    def __post_init__(self) -> None:
        if self.devices and self.memory < LOW_MEMORY_MIB:
            raise ValueError("dax devices lie above the low part of memory, which must be whole")

    @property
    def total(self) -> int:
        """All memory, with what is left over when q35 must continue it above its hole."""
        return self.memory + (0 if self.cxl else sum(self.devices))

    def ranges(self) -> str:
        """The kernel's options that turn memory (type 1) of the devices into memory reserved for special use."""
        if self.cxl:
            return ""
        words, address = [], DAX_START_MIB + self.memory - LOW_MEMORY_MIB
        for megabytes in self.devices:
            words.append(f"memmap={megabytes}M%{address}M-1+0xefffffff")
            address += megabytes
        return " ".join(words)


@contextlib.contextmanager
def device_memory(devices: Sequence[int]) -> Iterator[list[int]]:
    """A memory file for each dax device, sizes in MiB. It takes up only what is written, and any number of guests may
    have it; it is gone with the last of them.
    """
    with contextlib.ExitStack() as files:
        descriptors = []
        for number, megabytes in enumerate(devices):
            descriptor = os.memfd_create(f"famfs-vm-dax{number}", os.MFD_CLOEXEC)
            files.callback(os.close, descriptor)
            os.ftruncate(descriptor, megabytes << 20)
            descriptors.append(descriptor)
        yield descriptors


def memory_options(hardware: Hardware, memories: Sequence[int]) -> list[str]:
    """QEMU's options for the memory of the guest and of its devices, which is in files (one each).

    As a rule each file is a NUMA node: the nodes' memory lies one behind the other, in this order. With CXL each is the
    volatile memory of a device of type 3, with a root port of its own. These come behind all other devices, which would
    be put on their bus otherwise.
    """
    own = f"memory-backend-memfd,id=memory,size={hardware.memory}M,share=on"
    options = ["-object", own, "-numa", "node,nodeid=0,memdev=memory"]
    if hardware.cxl:
        options += ["-device", "pxb-cxl,id=cxl,bus=pcie.0,bus_nr=64"]
    for number, (megabytes, descriptor) in enumerate(zip(hardware.devices, memories, strict=True), 1):
        path = f"/proc/self/fd/{descriptor}"
        options += ["-object", f"memory-backend-file,id=dax{number},size={megabytes}M,share=on,mem-path={path}"]
        if hardware.cxl:
            options += ["-device", f"cxl-rp,id=port{number},bus=cxl,port={number},chassis=0,slot={number}"]
            options += ["-device", f"cxl-type3,id=cxl{number},bus=port{number},volatile-memdev=dax{number}"]
        else:
            options += ["-numa", f"node,nodeid={number},memdev=dax{number}"]
    return options


class Guest:
    """One run of QEMU with its file servers. Ends all of them, by process id, and removes its folder.

    `number` is that of a guest among others, whose lines of output begin with it; 0 if there are none.
    """

    def __init__(self, cache: Cache, tools: Tools, kernel: Kernel, number: int = 0) -> None:
        self._tools = tools
        self._kernel = kernel
        self.number = number
        self.folder = cache.run_folder(number)
        self._servers: list[subprocess.Popen[bytes]] = []
        self._qemu: subprocess.Popen[bytes] | None = None
        self._console: threading.Thread | None = None

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self._qemu, *self._servers]:
            if process:
                end(process)
        if self._console:
            self._console.join()
        for path in Path("/run/virtiofsd").glob(f"{str(self.folder).strip('/').replace('/', '.')}.*.pid"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def share(self, tag: str, folder: Path, *, cached: bool) -> list[str]:
        """Start a file server for a folder. Returns QEMU's options for it. `cached`: nobody else changes the files."""
        socket, log = self.folder / f"{tag}.sock", self.folder / f"{tag}.log"
        command = [self._tools.virtiofsd, f"--socket-path={socket}"]
        if "/qemu/" in self._tools.virtiofsd:
            source = str(folder).replace("\\", "\\\\").replace(",", "\\,")
            cache = "always" if cached else "none"
            options = [f"source={source}", f"cache={cache}", "sandbox=chroot", "no_posix_lock"]
            command += [word for option in options for word in ("-o", option)]
        else:
            cache = "always" if cached else "never"
            command += [f"--shared-dir={folder}", f"--cache={cache}", "--sandbox=chroot"]
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, env=self._tools.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, preexec_fn=end_with_parent,
            )  # fmt: skip
        self._servers.append(server)
        deadline = time.monotonic() + 10
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                reason = log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
                raise RunnerError(f"the file server (virtiofsd) for {folder} does not start: {reason[-1]}")
            time.sleep(0.02)
        device = f"vhost-user-fs-pci,chardev={tag},tag={tag}"
        return ["-chardev", f"socket,id={tag},path={socket}", "-device", device]

    def start(
        self, hardware: Hardware, memories: Sequence[int], initrd: bytes, shares: Sequence[str], append: str = ""
    ) -> None:
        """Boot with these files as the devices' memory (one each)."""
        (self.folder / "initrd").write_bytes(initrd)
        processor = ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off"]
        options = [KERNEL_OPTIONS, hardware.ranges(), append]
        if hardware.accelerator == "kvm":
            processor = ["-accel", "kvm", "-cpu", "host"]
        else:
            options.append(EMULATED_OPTIONS)
        machine = "q35"
        if hardware.cxl:
            machine += f",cxl=on,cxl-fmw.0.targets.0=cxl,cxl-fmw.0.size={sum(hardware.devices)}M"
            # In a guest that knows that it is one, the kernel refuses to commit a region: it cannot flush caches.
            processor[-1] += ",hypervisor=off"
        folder = self.folder
        command = [
            *self._tools.qemu, "-no-user-config", "-nodefaults", "-display", "none", "-net", "none",
            "-M", machine, *processor, "-smp", str(hardware.cpus), "-m", f"{hardware.total}M", "-no-reboot",
            "-serial", f"file:{folder / 'kernel.log'}", "-serial", f"file:{folder / 'status'}",
            "-chardev", "stdio,id=console,signal=off", "-device", "virtio-serial-pci",
            "-device", "virtconsole,chardev=console", *shares, *memory_options(hardware, memories),
            "-kernel", str(self._kernel.image), "-initrd", str(folder / "initrd"),
            "-append", " ".join(options),
        ]  # fmt: skip
        with (self.folder / "qemu.log").open("wb") as errors:
            self._qemu = subprocess.Popen(
                command, env=self._tools.environment, stdin=subprocess.DEVNULL, stderr=errors, pass_fds=memories,
                stdout=subprocess.PIPE if self.number else None, preexec_fn=end_with_parent,
            )  # fmt: skip
        if self._qemu.stdout:
            self._console = threading.Thread(target=self._copy_console, args=(self._qemu.stdout,))
            self._console.start()

    def _copy_console(self, console: IO[bytes]) -> None:
        for line in console:
            sys.stdout.buffer.write(f"{self.number}| ".encode() + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()

    def processes(self) -> list[subprocess.Popen[bytes]]:
        assert self._qemu is not None
        return [self._qemu, *self._servers]

    def kill(self) -> None:
        """End the guest without a warning, as a power failure would."""
        assert self._qemu is not None
        self._qemu.kill()

    def mishap(self) -> str | None:
        """What ended the guest against its will, "" if it ended by itself, None as long as it runs."""
        assert self._qemu is not None
        if self._qemu.poll() is None:
            if all(server.poll() is None for server in self._servers):
                return None
            # At power-off a file server may be gone before QEMU is.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._qemu.wait(3)
            if self._qemu.poll() is None:
                end(self._qemu)
                return "its file server (virtiofsd) died"
        if self._console:
            self._console.join()
        code = self._qemu.returncode
        if code < 0:
            return f"QEMU was killed by {signal.Signals(-code).name}"
        if code:
            words = (self.folder / "qemu.log").read_text(errors="replace").strip().splitlines()
            return f"QEMU failed: {words[-1]}" if words else f"QEMU failed with status {code}"
        return ""

    def reports(self) -> dict[str, str]:
        """What the guest's init reported: ready, status, error."""
        path = self.folder / "status"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return {kind: rest for kind, _, rest in (line.strip().partition(" ") for line in lines)}

    def kernel_log(self) -> str:
        path = self.folder / "kernel.log"
        return path.read_text(errors="replace").replace("\r", "") if path.exists() else ""


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that may not listen: politely, then by force, and never wait for ever."""
    for stop, seconds in ((process.terminate, 2), (process.kill, 5)):
        if process.poll() is not None:
            return
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def wait_for_any(guests: Iterable[Guest], seconds: float) -> None:
    """Wait until a process of these guests ends, or the time is over."""
    poll = select.poll()
    with contextlib.ExitStack() as descriptors:
        for process in (process for guest in guests for process in guest.processes()):
            if process.poll() is not None:
                return
            descriptor = os.pidfd_open(process.pid)
            descriptors.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(seconds, 0) * 1000)


def accelerator(cache: Cache, tools: Tools, kernel: Kernel) -> str:
    """kvm if a guest really boots with it, else tcg. The presence of /dev/kvm says little in nested machines,
    so a guest is tried; the answer is kept for this machine, its kernel, this QEMU and the guest's kernel.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    parts = [platform.release(), processor[1] if processor else "", tools.qemu_version, kernel.version]
    situation = " / ".join(parts)
    path = cache.folder / "accelerator.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if situation in known:
        return str(known[situation])
    with Guest(cache, tools, kernel) as probe:
        initrd = guest_files(tools, kernel, {"PROBE": "1"}, [], "")
        probe.start(Hardware("kvm", 1, 512), [], initrd, [])
        wait_for_any([probe], PROBE_SECONDS)
        answer = "kvm" if "status" in probe.reports() else "tcg"
    if answer == "tcg":
        say("/dev/kvm is there, but no guest boots with it: emulating the processor, 10 to 30 times slower")
    path.write_text(json.dumps({**known, situation: answer}, indent=1))
    return answer
