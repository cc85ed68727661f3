# SPDX-License-Identifier: Apache-2.0
"""The module famfs.ko: FUSE with extent maps for one of Debian's kernels, built from the kernel's own source.

A Debian of the kernel's release is unpacked into the cache, as far as a compiler and the kernel's headers need it. The
module is compiled in there, in a mount namespace of its own, so that nothing of this machine matters but its kernel.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from kernel import edits
from vm.cache import Cache
from vm.packages import Apt, sources_of, unpack
from vm.report import RunnerError, say

SUITES = ["trixie", "trixie-updates", "trixie-security", "trixie-backports"]
"""Where the kernels with fsdev_dax, their headers and their compiler come from."""

SOURCES = Path(edits.__file__).resolve().parent
# What a package's build environment takes for granted, and headers and compiler therefore do not depend on.
BASE_PACKAGES = [
    "base-files", "bash", "binutils", "coreutils", "dash", "diffutils", "findutils", "grep", "make", "mawk", "sed",
]  # fmt: skip
BUILD_SECONDS = 600
_FUSE = re.compile(r"[^/]+/fs/fuse/([^/]+\.[ch])")
_COMPILER_ERROR = re.compile(r"error[: ]|ERROR: modpost|No such file")

# The compiler's root gets what programs in it expect. Runs as root of a mount namespace that ends with it.
_BUILD = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 dev "$1/dev"
touch "$1/dev/null"
mount --bind /dev/null "$1/dev/null"
mount -t proc proc "$1/proc"
exec chroot "$1" /usr/bin/env -i PATH=/usr/bin:/usr/sbin LC_ALL=C.UTF-8 \\
    make -C "/usr/src/linux-headers-$2" M=/build -j"$3" modules
"""


class UnavailableError(RunnerError):
    """There is no module for this kernel, for a reason that lies outside this checkout."""


def famfs_module(cache: Cache, version: str) -> Path:
    """The module for the kernel of this version, such as 7.3.4+deb13-cloud-amd64; from the cache, or built now.

    Called with the cache locked. Raises UnavailableError if the kernel's packages cannot be had or its FUSE is another
    one than the edits were made for; RunnerError if our own code does not compile.
    """
    folder = cache.folder / f"module-{version}"
    stamp = _fingerprint()
    module = folder / "famfs.ko"
    if module.exists() and (folder / "stamp").read_text() == stamp:
        return module
    toolchain = _toolchain(cache, version)
    with cache.filling(folder.name) as new:
        shutil.copy2(_compile(toolchain, version), new / "famfs.ko")
        (new / "stamp").write_text(stamp)
    return module


def _fingerprint() -> str:
    """What the module is made of, beside the kernel."""
    content = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


def _toolchain(cache: Cache, version: str) -> Path:
    """The folder with the compiler's root (`root`) and the kernel's FUSE (`fuse`)."""
    folder = cache.folder / f"toolchain-{version}"
    if folder.exists():
        return folder
    try:
        _fetch_toolchain(cache, version, folder.name)
    except UnavailableError:
        raise
    except RunnerError as error:
        raise UnavailableError(str(error)) from error
    return folder


def _fetch_toolchain(cache: Cache, version: str, name: str) -> None:
    headers, source = f"linux-headers-{version}", source_package(version)
    say(f"fetching compiler, headers and source of kernel {version} from Debian packages (245 MB)")
    apt_folder = cache.folder / "apt" / name
    apt_folder.mkdir(parents=True, exist_ok=True)
    (apt_folder / "status").touch()
    apt = Apt(apt_folder, sources_of(SUITES), seen=apt_folder / "status")
    apt.update()
    if not apt.knows(headers):
        raise UnavailableError(
            f"Debian's archive ({', '.join(SUITES)}) has no package {headers}: boot a kernel that it has, or, for the "
            "guests, fetch the current one by scripts/vm-test --refresh"
        )
    release = version.partition("+")[0]
    if not apt.knows(source):
        raise UnavailableError(f"Debian's archive has no package {source}")
    if not (apt.version(source) or "").startswith(f"{release}-"):
        raise UnavailableError(
            f"Debian's archive has {source} of another release than kernel {version}; fetch the current kernel by "
            "scripts/vm-test --refresh"
        )
    with cache.filling(name) as folder:
        for package in apt.download_missing([*BASE_PACKAGES, headers]):
            unpack(package, folder / "root")
        for unneeded in ("doc", "locale", "man"):
            shutil.rmtree(folder / "root/usr/share" / unneeded, ignore_errors=True)
        awk = folder / "root/usr/bin/awk"  # a choice that the package makes when it is configured
        if not awk.exists():
            awk.symlink_to("mawk")
        (folder / "fuse").mkdir()
        extract_fuse(apt.download([source])[0], folder / "fuse")
    shutil.rmtree(cache.folder / "apt")


def source_package(version: str) -> str:
    """linux-source-7.3 for 7.3.4+deb13-cloud-amd64. Raises UnavailableError for what is no Debian kernel."""
    match = re.match(r"(\d+\.\d+)\.\d+\+deb", version)
    if not match:
        raise UnavailableError(f"kernel {version} is none of Debian's (7.3.4+deb13-amd64 is one)")
    return f"linux-source-{match[1]}"


def extract_fuse(package: Path, folder: Path) -> None:
    """Put the files of fs/fuse of a linux-source package into a folder."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as outer,
    ):
        for member in outer:
            if not member.name.endswith(".tar.xz"):
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as archive:
                for file in archive:
                    match = _FUSE.fullmatch(file.name)
                    content = archive.extractfile(file) if match and file.isfile() else None
                    if match and content:
                        (folder / match[1]).write_bytes(content.read())
    if not (folder / "inode.c").exists():
        raise UnavailableError(f"{package.name} has no fs/fuse")


def _compile(toolchain: Path, version: str) -> Path:
    """The module, in the compiler's root. Raises UnavailableError if an edit does not fit, RunnerError for the rest."""
    say(f"building famfs.ko for kernel {version}")
    build = toolchain / "root/build"
    shutil.rmtree(build, ignore_errors=True)
    shutil.copytree(toolchain / "fuse", build)
    for path in SOURCES.iterdir():
        if path.suffix in (".c", ".h") or path.name == "Kbuild":
            shutil.copy2(path, build)
    try:
        edits.apply(build)
    except edits.EditError as error:
        raise UnavailableError(f"kernel {version} is another one than kernel/edits.py knows: {error}") from error
    command = ["unshare", "--mount", "sh", "-c", _BUILD, "sh", str(toolchain / "root"), version, "2"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RunnerError(f"famfs.ko was not built within {BUILD_SECONDS} s") from None
    module = build / "famfs.ko"
    if done.returncode or not module.exists():
        lines = [line for line in done.stderr.splitlines() if _COMPILER_ERROR.search(line)] or ["make says nothing"]
        raise RunnerError(f"famfs.ko does not compile for kernel {version}: {lines[0]}")
    # Names of the trace system, which the kernel's own FUSE has given other types.
    warnings = [line for line in done.stderr.splitlines() if "resolve_btfids" not in line]
    if warnings:
        say("famfs.ko was built with warnings:\n" + "\n".join(warnings))
    return module
