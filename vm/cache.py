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
from dataclasses import dataclass, replace
from pathlib import Path

from vm.packages import Apt, files_of, machine_sources, sources_of, unpack
from vm.report import RunnerError, say

KERNEL_PACKAGE = "linux-image-cloud-amd64"
KERNEL_SUITES = {"backports": ["trixie-backports"], "stable": ["bookworm", "bookworm-security"]}
_USUAL = ["virtio_pci", "virtio_console", "virtiofs", "overlay", "device_dax", "dax_hmem", "fsdev_dax"]
MODULES = {
    "modules": _USUAL,
    "cxl_modules": [*_USUAL, "cxl_acpi", "cxl_pci", "cxl_mem", "cxl_port", "dax_cxl"],
    "spare_modules": ["kmem"],  # takes every device that has no driver once it is loaded
}
"""What is unpacked of a kernel's modules: what a guest loads, the same with CXL memory, what only tests load."""
CXL_QEMU = 9
DPKG_STATUS = Path("/var/lib/dpkg/status")
TOOLS, CXL_TOOLS = "tools", "tools-cxl"
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

    @property
    def has_cxl(self) -> bool:
        """Whether this QEMU emulates CXL memory that a kernel can make a region of."""
        match = re.search(r"version (\d+)", self.qemu_version)
        return match is not None and int(match[1]) >= CXL_QEMU


@dataclass(frozen=True)
class Kernel:
    """A guest's kernel; modules in the order of loading. Spare ones are there for tests to load."""

    version: str
    image: Path
    modules: list[Path]
    spare_modules: list[Path]

    @property
    def has_fsdev(self) -> bool:
        return any(path.stem == "fsdev_dax" for path in self.modules)


def cache_folder() -> Path:
    """Where the downloaded things are, by the environment."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FAMFS_VM_CACHE") or Path(home) / "famfs-vm-test").absolute()


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
        for name in (TOOLS, CXL_TOOLS, *(f"kernel-{kernel}" for kernel in KERNEL_SUITES)):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for folder in [*self.folder.glob("toolchain-*"), *self.folder.glob("module-*")]:
            shutil.rmtree(folder, ignore_errors=True)
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

    def _find_qemu(self, name: str) -> tuple[list[str], str] | None:
        """The QEMU that is unpacked in a folder of the cache: its command and where its libraries are."""
        root = self.folder / name / "root"
        program = root / "usr/bin/qemu-system-x86_64"
        if not program.exists():
            return None
        firmware = [word for folder in FIRMWARE_FOLDERS for word in ("-L", str(root / folder))]
        return [str(program), *firmware], ":".join(str(root / folder) for folder in LIBRARY_FOLDERS)

    def _find_tools(self) -> Tools | None:
        """The tools as far as they are there: installed on this machine, else in the cache."""
        root = self.folder / TOOLS / "root"
        environment = dict(os.environ)
        installed = shutil.which("qemu-system-x86_64")
        unpacked = self._find_qemu(TOOLS)
        if not installed and not unpacked:
            return None
        places = [*VIRTIOFSD_PLACES, *(str(root / place[1:]) for place in VIRTIOFSD_PLACES)]
        virtiofsd = next((place for place in places if Path(place).exists()), None)
        busybox = self.folder / TOOLS / "busybox"
        if virtiofsd is None or not busybox.exists():
            return None
        if root.exists():
            environment["LD_LIBRARY_PATH"] = ":".join(str(root / folder) for folder in LIBRARY_FOLDERS)
        qemu = [installed] if installed else unpacked[0] if unpacked else []
        version = version_of(qemu, environment)
        return Tools(qemu, virtiofsd, busybox, environment, version) if version else None

    def tools(self) -> Tools:
        tools = self._find_tools()
        if tools:
            return tools
        say("fetching QEMU and busybox from Debian packages")
        apt = Apt(self.folder / "apt" / TOOLS, machine_sources(), seen=DPKG_STATUS)
        apt.update()
        with self.filling(TOOLS) as folder:
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

    def cxl_tools(self) -> Tools:
        """The tools with a QEMU that emulates CXL memory: the usual one if it is new enough, else that of the
        release's backports.
        """
        tools = self.tools()
        if tools.has_cxl:
            return tools
        if not self._find_qemu(CXL_TOOLS):
            say("fetching a newer QEMU from Debian's backports")
            suite = f"{machine_sources()[0].suite}-backports"
            apt = Apt(self.folder / "apt" / CXL_TOOLS, [*machine_sources(), *sources_of([suite])], seen=DPKG_STATUS)
            apt.update()
            with self.filling(CXL_TOOLS) as folder:
                for package in apt.download_missing(["qemu-system-x86"], suite):
                    unpack(package, folder / "root")
            shutil.rmtree(self.folder / "apt")
        qemu, libraries = self._find_qemu(CXL_TOOLS) or ([], "")
        # The file server remains the usual one, with libraries of its own.
        known = tools.environment.get("LD_LIBRARY_PATH")
        environment = {**tools.environment, "LD_LIBRARY_PATH": f"{libraries}:{known}" if known else libraries}
        version = version_of(qemu, environment) if qemu else ""
        tools = replace(tools, qemu=qemu, environment=environment, qemu_version=version)
        if not tools.has_cxl:
            raise RunnerError("Debian's backports have no QEMU that emulates CXL memory; install QEMU 9 or later")
        return tools

    # -- kernels

    def kernel(self, name: str, *, cxl: bool = False) -> Kernel:
        """A kernel with the modules that its guests need; `cxl`: those for CXL memory as well."""
        folder = self.folder / f"kernel-{name}"
        path = folder / "kernel.json"
        if not path.exists() or json.loads(path.read_text()).keys() != {"version", *MODULES}:
            self._fetch_kernel(name)
        description = json.loads(path.read_text())
        files = {kind: [folder / f"{module}.ko" for module in description[kind]] for kind in MODULES}
        modules = files["cxl_modules"] if cxl else files["modules"]
        return Kernel(description["version"], folder / "vmlinuz", modules, files["spare_modules"])

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
            description: dict[str, object] = {"version": version}
            for kind, wanted in MODULES.items():
                modules = modules_of(packages, wanted)
                for module, content in modules.items():
                    (folder / f"{module}.ko").write_bytes(content)
                description[kind] = list(modules)
            (folder / "kernel.json").write_text(json.dumps(description))
        shutil.rmtree(self.folder / "apt")


def version_of(qemu: Sequence[str], environment: Mapping[str, str]) -> str:
    """What this QEMU calls itself, empty if it does not run: an unpacked one leans on installed libraries, which may
    have gone since.
    """
    answer = subprocess.run([*qemu, "--version"], env=environment, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0] if answer.returncode == 0 else ""


def modules_of(packages: Sequence[Path], names: Sequence[str]) -> dict[str, bytes]:
    """The modules of these names and what they depend on, in the order of loading. One that is built in or that this
    kernel does not have is left out.
    """
    found: dict[str, bytes] = {}
    depends: dict[str, list[str]] = {}
    wanted = set(names)
    while wanted:
        alternatives = "|".join(re.sub("_", "[-_]", name) for name in sorted(wanted))
        pattern = re.compile(rf".*/({alternatives})\.ko(\.xz)?")
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

    for name in names:
        put(name)
    return order
