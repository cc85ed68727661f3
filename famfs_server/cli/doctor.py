# SPDX-License-Identifier: Apache-2.0
"""`famfs doctor`: what a mount would lack here, and the command that mends it. Looks only."""

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from famfs_server.cli import program
from famfs_server.errors import DeviceModeError, FamfsError, MediaError

if TYPE_CHECKING:
    from famfs_server.dax.device import DaxDevice

GOOD, NOTE, BAD = "ok", "note", "missing"
_OLDEST_KERNEL = (5, 2)
_TAKEOVER_KERNEL = (6, 9)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: its name, how it is, and for what is missing what mends it."""

    name: str
    state: str
    what: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """Where to look; tests have another root and another kernel."""

    root: Path = Path("/")
    release: str = ""

    def path(self, name: str) -> Path:
        """A path of the system."""
        return self.root / name


@program.tool("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("device", required=False)
def command(*, device: str | None, as_json: bool) -> int:
    """Look whether this host can mount famfs, and DEVICE if it is named; say what is missing and what mends it.

    Exit status 1: something is missing.
    """
    system = System(release=os.uname().release)
    findings = [*examine_host(system), *(examine_device(device, system) if device else ())]
    bad = any(finding.state == BAD for finding in findings)
    if as_json:
        click.echo(json.dumps({"ready": not bad, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(bad)
    for finding in findings:
        click.echo(f"{finding.state:>7}  {finding.name}: {finding.what}")
        if finding.mend:
            click.echo(f"         -> {finding.mend}")
    return int(bad)


def examine_host(system: System) -> Iterator[Finding]:
    """What every mount needs."""
    yield _kernel(system)
    yield _famfs_kernel(system)
    yield _fuse(system)
    yield _privileges()
    yield _caches()
    yield _host_uuid()
    yield _dax(system)


def _kernel(system: System) -> Finding:
    match = re.match(r"(\d+)\.(\d+)", system.release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _OLDEST_KERNEL:
        return Finding("kernel", BAD, f"{system.release} cannot make detached mounts", "install kernel 5.2 or later")
    if version < _TAKEOVER_KERNEL:
        return Finding("kernel", NOTE, f"{system.release} mounts; a server that dies is replaced from 6.9 on only")
    return Finding("kernel", GOOD, system.release)


def _famfs_kernel(system: System) -> Finding:
    from famfs_server.fuse import kernels
    from famfs_server.fuse.dialects import kallsyms_evidence

    if _module_loaded(system):
        parameter = system.path("sys/module/famfs/parameters/dialect")
        dialect = parameter.read_text().strip() if parameter.exists() else "unknown"
        return Finding("extent maps", GOOD, f"by the module famfs (dialect {dialect}), for devices in famfs mode")
    evidence = kallsyms_evidence(kernels.SYSTEM, system.path("proc/kallsyms"))
    if evidence:
        return Finding("extent maps", GOOD, "the kernel has the functions of famfs")
    if evidence is None:
        return Finding("extent maps", NOTE, "cannot be seen: /proc/kallsyms is not readable")
    return Finding("extent maps", NOTE, "the kernel has none: reads and writes go through the server (fmap=auto)")


def _module_loaded(system: System) -> bool:
    from famfs_server.fuse import kernels

    return kernels.is_loaded(system.path(kernels.MODULE.device.lstrip("/")))


def _fuse(system: System) -> Finding:
    path = system.path("dev/fuse")
    if not path.exists():
        return Finding("/dev/fuse", BAD, "does not exist: the module is not loaded", "modprobe fuse")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("/dev/fuse", BAD, "may not be opened", "run as root; in a container give it --device /dev/fuse")
    return Finding("/dev/fuse", GOOD, "can be opened")


def _privileges() -> Finding:
    from famfs_server import privileges

    try:
        privileges.require_mount_capabilities()
    except FamfsError as error:
        return Finding("privileges", BAD, str(error), "sudo famfs mount …")
    return Finding("privileges", GOOD, "CAP_SYS_ADMIN and CAP_SYS_RAWIO")


def _caches() -> Finding:
    from famfs_server.dax import cacheline

    if cacheline.MECHANISM == "none":
        return Finding("cache lines", BAD, "this processor has no instruction to write them back", "use another host")
    return Finding("cache lines", GOOD, f"written back by {cacheline.MECHANISM}")


def _host_uuid() -> Finding:
    from famfs_server.dax import hostid

    path = hostid.uuid_file()
    # Path.exists raises where a folder may not be searched.
    if not os.path.exists(path):
        if os.access(path.parent if os.path.exists(path.parent) else path.parent.parent, os.W_OK):
            return Finding("system UUID", NOTE, f"{path} does not exist; the first mount or mkfs makes it")
        return Finding(
            "system UUID",
            BAD,
            f"{path} is not there, or may not be looked at, and cannot be made",
            "run famfs as root once",
        )
    try:
        return Finding("system UUID", GOOD, str(hostid.system_uuid()))
    except FamfsError as error:
        return Finding("system UUID", BAD, str(error), f"uuidgen > {path}   # or the UUID that this host had before")


def _dax(system: System) -> Finding:
    bus = system.path("sys/bus/dax")
    devices = sorted(entry.name for entry in bus.glob("devices/*"))
    if devices:
        return Finding("dax devices", GOOD, ", ".join(devices))
    if not (bus / "drivers/device_dax").exists():
        return Finding("dax devices", NOTE, "none, and no driver for them", "modprobe device_dax dax_hmem dax_cxl")
    return Finding("dax devices", NOTE, "none; see daxctl list and cxl list, or use an emulated device (a file)")


def examine_device(path: str, system: System) -> Iterator[Finding]:
    """What a mount of one device needs."""
    from famfs_server.dax.device import DaxDevice, Mode

    name = os.path.basename(os.path.realpath(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        listed = system.path(f"sys/bus/dax/devices/{name}").exists()
        mend = f"daxctl enable-device {name}" if listed else "daxctl list; daxctl create-device"
        yield Finding("device", BAD, f"{path} does not exist", mend)
        return
    except OSError as error:
        yield Finding("device", BAD, f"{path}: {os.strerror(error.errno or 0)}", "run as root")
        return
    if not os.access(path, os.R_OK | os.W_OK):
        yield Finding("permission", BAD, f"{path} may not be read and written", f"run as root, or chown {path}")
        return
    try:
        device = DaxDevice.open(path)
    except DeviceModeError as error:
        mend = str(error).partition("; run: ")[2] or f"daxctl reconfigure-device -m devdax {name}"
        yield Finding("driver", BAD, str(error).partition("; run: ")[0], mend)
        return
    except FamfsError as error:
        yield Finding("device", BAD, str(error), "daxctl list")
        return
    with device:
        kind = "a file that stands for a device" if stat.S_ISREG(found.st_mode) else f"in {device.mode.value} mode"
        if device.mode is Mode.FSDEV:
            yield famfs_mode(path, system)
            return
        yield Finding("device", GOOD, f"{path}, {kind}, {device.size} bytes")
        yield from _content(device, path)


def famfs_mode(path: str, system: System) -> Finding:
    """What can be said of a device in famfs mode: its bytes are seen through a mount alone."""
    from famfs_server.fuse import kernels
    from famfs_server.fuse.dialects import kallsyms_evidence

    evidence = kallsyms_evidence(kernels.SYSTEM, system.path("proc/kallsyms"))
    if evidence is False and not _module_loaded(system):
        return Finding(
            "driver",
            BAD,
            f"{path} is in famfs mode, which only a kernel with famfs can use, and this one is none",
            f"famfs mount -o daxmode=devdax {path} …, or daxctl reconfigure-device -m devdax {os.path.basename(path)}",
        )
    return Finding("device", GOOD, f"{path}, in famfs mode; what is on it is seen when it is mounted")


def _content(device: "DaxDevice", path: str) -> Iterator[Finding]:
    """What is on the device, whose it is, and who uses it."""
    from famfs_server.dax.device import Lock
    from famfs_server.omf import layout, log, superblock
    from famfs_server.omf.superblock import SuperblockState

    try:
        memory = device.memory()
    except FamfsError as error:
        yield Finding("driver", BAD, str(error), f"daxctl reconfigure-device -m devdax {os.path.basename(path)}")
        return
    try:
        inspection = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
        found = inspection.superblock
        if inspection.state is not SuperblockState.VALID or found is None:
            mends = {
                SuperblockState.ABSENT: f"mkfs.famfs {path}",
                SuperblockState.OTHER_VERSION: f"use the tools that made it, or mkfs.famfs -f {path}, which erases it",
            }
            mend = mends.get(inspection.state, f"restore it, or mkfs.famfs -f {path}, which erases it")
            yield Finding("file system", BAD, inspection.problem.partition(";")[0], mend)
            return
        try:
            if layout.LOG_OFFSET + found.log_length > memory.size:
                raise MediaError(f"the log ends beyond the device of {memory.size} bytes")
            log.decode_header(memory.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), found.log_length)
        except MediaError as error:
            yield Finding("log", BAD, str(error).partition(";")[0], f"fsck.famfs {path}; mkfs.famfs -f erases it")
            return
    finally:
        memory.close()
    yield Finding("file system", GOOD, f"{found.uuid}, version {found.version}")
    yield _owner(found.system_uuid)
    if device.lock(Lock.MOUNTED, exclusive=True):
        yield Finding("use", GOOD, "nobody on this host has it open")
    else:
        yield Finding("use", NOTE, "it is mounted or in use on this host (famfs list)")


def _owner(owner: UUID) -> Finding:
    from famfs_server.cli.target import this_host
    from famfs_server.dax import hostid

    host = this_host() if os.path.exists(hostid.uuid_file()) else None
    if host == owner:
        return Finding("owner", GOOD, "this host: it can create files")
    return Finding(
        "owner",
        NOTE,
        f"host {owner}, not this one: it can be mounted, and files can be read and written, not created",
        "create files on the owner; mkfs.famfs -f takes the device over and erases it",
    )
