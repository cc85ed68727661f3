# SPDX-License-Identifier: Apache-2.0
"""The cache folder: QEMU, its file server and busybox, and the guests' kernels."""

import contextlib
import fcntl
import json
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.packages import Apt, files_of, machine_sources, sources_of, unpack
from vm.report import RunnerError, say

KERNEL_PACKAGE = "linux-image-cloud-amd64"
KERNEL_SUITES = {"backports": ["trixie-backports"], "stable": ["bookworm", "bookworm-security"]}
WANTED_MODULES = [
    "virtio_pci", "virtio_console", "virtiofs", "overlay", "device_dax", "dax_hmem", "fsdev_dax",
]  # fmt: skip
VIRTIOFSD_PLACES = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"]
LIBRARY_FOLDERS = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
FIRMWARE_FOLDERS = ["usr/share/qemu", "usr/share/seabios"]


@dataclass(frozen=True)
class Tools:
    """The programs on this machine's side."""

    qemu: list[str]
    virtiofsd: str
    busybox: Path
    environment: Mapping[str, str]
    qemu_version: str


@dataclass(frozen=True)
class Kernel:
    """A guest's kernel; modules in the order of loading."""

    version: str
    image: Path
    modules: list[Path]

    @property
    def has_fsdev(self) -> bool:
        return any(path.stem == "fsdev_dax" for path in self.modules)


class Cache:
    """The folder of downloaded things. One runner at a time fills it; a half-filled part is never seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            words = f"cannot make the cache folder {folder}: {error.strerror}; FAMFS_VM_CACHE names another"
            raise RunnerError(words) from error
        if "," in str(folder):
            raise RunnerError(
                "the cache folder's path has a comma, which QEMU cannot take; FAMFS_VM_CACHE names another"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another vm-test that fills the cache")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def filling(self, name: str) -> Iterator[Path]:
        """A new folder that takes the place of cache/name when the block ends without an error."""
        new = self.folder / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            shutil.rmtree(self.folder / name, ignore_errors=True)
            new.rename(self.folder / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def forget(self) -> None:
        for name in ("tools", *(f"kernel-{kernel}" for kernel in KERNEL_SUITES)):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "accelerator.json").unlink(missing_ok=True)

    def run_folder(self, number: int) -> Path:
        """A new folder for a guest of this run; those of runners that were killed are removed."""
        for old in self.folder.glob("run*.*"):
            if not Path("/proc", old.suffix[1:]).exists():
                shutil.rmtree(old, ignore_errors=True)
        folder = self.folder / f"run{number}.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    # -- tools

    def _find_tools(self) -> Tools | None:
        """The tools as far as they are there: installed on this machine, else in the cache."""
        root = self.folder / "tools" / "root"
        environment = dict(os.environ)
        unpacked_qemu = root / "usr/bin/qemu-system-x86_64"
        installed = shutil.which("qemu-system-x86_64")
        if installed:
            qemu = [installed]
        elif unpacked_qemu.exists():
            qemu = [str(unpacked_qemu)]
            for folder in FIRMWARE_FOLDERS:
                qemu += ["-L", str(root / folder)]
        else:
            return None
        places = [*VIRTIOFSD_PLACES, *(str(root / place[1:]) for place in VIRTIOFSD_PLACES)]
        virtiofsd = next((place for place in places if Path(place).exists()), None)
        busybox = self.folder / "tools" / "busybox"
        if virtiofsd is None or not busybox.exists():
            return None
        if root.exists():
            environment["LD_LIBRARY_PATH"] = ":".join(str(root / folder) for folder in LIBRARY_FOLDERS)
        # The unpacked QEMU leans on installed libraries, which may have gone since.
        command = [*qemu, "--version"]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if answer.returncode:
            return None
        return Tools(qemu, virtiofsd, busybox, environment, answer.stdout.splitlines()[0])

    def tools(self) -> Tools:
        tools = self._find_tools()
        if tools:
            return tools
        say("fetching QEMU and busybox from Debian packages")
        apt = Apt(self.folder / "apt" / "tools", machine_sources(), seen=Path("/var/lib/dpkg/status"))
        apt.update()
        with self.filling("tools") as folder:
            for package in apt.download(["busybox-static"]):
                unpack(package, folder / "busybox-static")
            places = [folder / "busybox-static" / place for place in ("bin/busybox", "usr/bin/busybox")]
            shutil.copy2(next(place for place in places if place.exists()), folder / "busybox")
            shutil.rmtree(folder / "busybox-static")
            wanted = [] if shutil.which("qemu-system-x86_64") else ["qemu-system-x86"]
            # Debian 12 has the file server among QEMU's own packages, later releases have one of its own.
            if not any(Path(place).exists() for place in VIRTIOFSD_PLACES) and apt.knows("virtiofsd"):
                wanted.append("virtiofsd")
            for package in apt.download_missing(wanted) if wanted else []:
                unpack(package, folder / "root")
        shutil.rmtree(self.folder / "apt")
        tools = self._find_tools()
        if tools is None:
            raise RunnerError("QEMU or its file server does not run; install qemu-system-x86 and virtiofsd")
        return tools

    # -- kernels

    def kernel(self, name: str) -> Kernel:
        folder = self.folder / f"kernel-{name}"
        if not folder.exists():
            self._fetch_kernel(name)
        description = json.loads((folder / "kernel.json").read_text())
        modules = [folder / f"{module}.ko" for module in description["modules"]]
        return Kernel(description["version"], folder / "vmlinuz", modules)

    def _fetch_kernel(self, name: str) -> None:
        say(f"fetching the guest's kernel ({', '.join(KERNEL_SUITES[name])}) from Debian packages")
        apt_folder = self.folder / "apt" / name
        apt_folder.mkdir(parents=True, exist_ok=True)
        (apt_folder / "status").touch()
        apt = Apt(apt_folder, sources_of(KERNEL_SUITES[name]), seen=apt_folder / "status")
        apt.update()
        version = apt.dependency(KERNEL_PACKAGE, r"linux-image-\d\S*").removeprefix("linux-image-")
        # Newer kernels are split in two packages; the older have one.
        kinds = ["binary", "modules"] if apt.knows(f"linux-binary-{version}") else ["image"]
        packages = apt.download([f"linux-{kind}-{version}" for kind in kinds])
        with self.filling(f"kernel-{name}") as folder:
            image = re.compile(rf".*/vmlinuz(-{re.escape(version)})?")
            for content in (content for package in packages for content in files_of(package, image).values()):
                (folder / "vmlinuz").write_bytes(content)
            if not (folder / "vmlinuz").exists():
                raise RunnerError(f"no kernel image in Debian's packages of {version}")
            modules = modules_of(packages)
            for module, content in modules.items():
                (folder / f"{module}.ko").write_bytes(content)
            (folder / "kernel.json").write_text(json.dumps({"version": version, "modules": list(modules)}))
        shutil.rmtree(self.folder / "apt")


def modules_of(packages: Sequence[Path]) -> dict[str, bytes]:
    """The wanted modules and what they depend on, in the order of loading. One that is built in or that this
    kernel does not have is left out.
    """
    found: dict[str, bytes] = {}
    depends: dict[str, list[str]] = {}
    wanted = set(WANTED_MODULES)
    while wanted:
        names = "|".join(re.sub("_", "[-_]", name) for name in sorted(wanted))
        pattern = re.compile(rf".*/({names})\.ko(\.xz)?")
        wanted = set()
        for path, content in (item for package in packages for item in files_of(package, pattern).items()):
            name = path.rpartition("/")[2].partition(".")[0].replace("-", "_")
            found[name] = lzma.decompress(content) if path.endswith(".xz") else content
            listed = re.search(rb"\0depends=([^\0]*)\0", found[name])
            depends[name] = listed[1].decode().replace("-", "_").split(",") if listed and listed[1] else []
            wanted.update(depends[name])
        wanted -= found.keys()
    order: dict[str, bytes] = {}

    def put(name: str) -> None:
        if name in found and name not in order:
            for needed in depends[name]:
                put(needed)
            order[name] = found[name]

    for name in WANTED_MODULES:
        put(name)
    return order
