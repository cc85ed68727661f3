# SPDX-License-Identifier: Apache-2.0
"""`famfs list`: the famfs mounts of this host, and the dax devices that it has."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from famfs_server.cli import program
from famfs_server.daemon.control_client import ControlClient
from famfs_server.errors import FamfsError
from famfs_server.fuse import mountapi
from famfs_server.sizes import human_size

_SECONDS = 2.0
"""How long a daemon may take to answer before it is listed as silent."""
_MODES = {"device_dax": "devdax", "fsdev_dax": "famfs", "kmem": "system-ram", "": "no driver"}


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount; what its daemon says is empty where it does not answer or may not be asked."""

    device: str
    mount_point: str
    role: str
    data_path: str
    uuid: str
    state: str


@dataclass(frozen=True, slots=True)
class Device:
    """A dax device. `size` in bytes; `uuid` is the file system's, empty where there is none or it cannot be read."""

    path: str
    mode: str
    size: int
    content: str
    uuid: str
    mounted_on: list[str]


@program.tool("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, as_json: bool) -> None:
    """Show what is mounted, and which dax devices there are."""
    mounts = [_mount(record) for record in mountapi.find_mounts()]
    devices = list_devices(mounts)
    if as_json:
        rows = {"mounts": [asdict(row) for row in mounts], "devices": [asdict(device) for device in devices]}
        click.echo(json.dumps(rows, indent=2))
        return
    for row in mounts:
        what = f"{row.role}, {row.data_path}, {row.uuid}" if row.role else row.state
        click.echo(f"{row.device} on {row.mount_point}: {what}")
    for device in devices:
        where = f", mounted on {', '.join(device.mounted_on)}" if device.mounted_on else ""
        click.echo(f"{device.path}: {human_size(device.size)}, {device.mode}, {device.content}{where}")
    if not mounts and not devices:
        click.echo("nothing is mounted, and there is no dax device")


def _mount(record: mountapi.MountRecord) -> Mount:
    try:
        client = ControlClient.of_mount(record.mount_point)
        status = ControlClient(client.directory, seconds=_SECONDS).status()
    except FamfsError as error:
        return Mount(record.source, record.mount_point, "", "", "", str(error))
    return Mount(record.source, record.mount_point, status["role"], status["data_path"], status["uuid"], "serving")


def list_devices(mounts: list[Mount], sysfs: Path = Path("/sys")) -> list[Device]:
    """The dax devices that sysfs knows, by name."""
    found = []
    for directory in sorted((sysfs / "bus/dax/devices").glob("*")):
        path = f"/dev/{directory.name}"
        try:
            driver = os.path.basename(os.readlink(directory / "driver"))
        except OSError:
            driver = ""
        try:
            size = int((directory / "size").read_text())
        except (OSError, ValueError):
            size = 0
        mine = [mount for mount in mounts if os.path.realpath(mount.device) == path]
        points = [mount.mount_point for mount in mine]
        content, uuid = _content(path) if driver == "device_dax" else _told(driver, mine)
        found.append(Device(path, _MODES.get(driver, driver), size, content, uuid, points))
    return found


def _told(driver: str, mounts: list[Mount]) -> tuple[str, str]:
    """What is on a device that no process can read: what the daemon of its mount says, if there is one."""
    for mount in mounts:
        if mount.uuid:
            return f"famfs {mount.uuid}", mount.uuid
    if driver == "fsdev_dax":
        return "what is on it can be seen when it is mounted", ""
    return "cannot be read in this mode", ""


def _content(path: str) -> tuple[str, str]:
    """What is on a device in devdax mode, and the UUID of its file system."""
    from famfs_server.dax.device import DaxDevice
    from famfs_server.omf import layout, superblock

    try:
        with DaxDevice.open(path, writable=False) as device:
            memory = device.memory()
            try:
                found = superblock.inspect(memory.read_fresh(0, layout.SUPERBLOCK.itemsize))
            finally:
                memory.close()
    except FamfsError as error:
        return str(error), ""
    if found.superblock is None:
        return "no famfs file system", ""
    uuid = str(found.superblock.uuid)
    return found.problem or f"famfs {uuid}", uuid
