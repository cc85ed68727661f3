# SPDX-License-Identifier: Apache-2.0
"""The shadow tree: a directory of YAML files that say the same as the log (docs/format.md 7.7)."""

import os
import stat
from typing import Any

import yaml

from famfs_server.cli.target import Advance
from famfs_server.errors import FamfsError, PathError
from famfs_server.omf.layout import FILE_FLAG_ALL_HOSTS_RW
from famfs_server.volume.volume import Volume

ROOT = "root"


class ShadowError(FamfsError):
    """The shadow tree does not say what the log says, or cannot be written."""


class _Hex(int):
    """A number that is written in hexadecimal."""


class _Octal(int):
    """A number that is written in octal, as modes are."""


class _Dumper(yaml.SafeDumper):
    """YAML in the style of the reference's files."""


_Dumper.add_representer(_Hex, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:int", hex(value)))
_Dumper.add_representer(_Octal, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:int", f"0{value:o}"))


class ShadowTree:
    """A shadow tree below `directory`, which is made if its parent exists."""

    def __init__(self, directory: str, *, write: bool, compare: bool) -> None:
        """Without `write` nothing is made; `compare` checks the files that exist already."""
        self._root = os.path.join(directory, ROOT)
        self._write = write
        self._compare = compare
        if write:
            for path in (directory, self._root):
                _make_directory(path, 0o755)

    def play(self, volume: Volume, advance: Advance) -> int:
        """Make what is missing; the number of new files. `advance` is told of each file and directory.

        Raises ShadowError for a file that says something else.
        """
        created = 0
        tree = volume.namespace
        for nodeid in tree.walk():
            path = os.path.join(self._root, os.fsdecode(tree.path(nodeid)))
            if tree.is_directory(nodeid):
                if self._write:
                    _make_directory(path, tree.mode[nodeid] & 0o7777)
            else:
                created += self._play_file(path, describe(volume, nodeid))
            advance(1)
        return created

    def _play_file(self, path: str, content: dict[str, Any]) -> int:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o644) if self._write else os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileExistsError:
            if self._compare:
                _compare(path, content)
            return 0
        except FileNotFoundError:
            if self._write:
                raise
            return 1
        if not self._write:
            os.close(fd)
            return 0
        with os.fdopen(fd, "w", encoding="ascii") as file:
            yaml.dump(content, file, Dumper=_Dumper, sort_keys=False, explicit_start=True, explicit_end=True)
        return 1


def describe(volume: Volume, nodeid: int) -> dict[str, Any]:
    """What the YAML file of a file says, in its order."""
    tree = volume.namespace
    fmap = tree.fmap(nodeid)
    extents = [
        {"devindex": extent.device, "offset": _Hex(extent.offset), "length": _Hex(extent.length)}
        for extent in fmap.extents
    ]
    # A name that is no UTF-8 is written as its bytes would be in Latin-1: YAML knows characters only.
    path = tree.path(nodeid)
    try:
        text = path.decode("utf-8")
    except UnicodeDecodeError:
        text = path.decode("latin-1")
    content: dict[str, Any] = {
        "path": text,
        "size": tree.size[nodeid],
        "flags": FILE_FLAG_ALL_HOSTS_RW,
        "mode": _Octal(tree.mode[nodeid] & 0o7777),
        "uid": tree.uid[nodeid],
        "gid": tree.gid[nodeid],
        "nextents": 1 if fmap.chunk_size else len(extents),
    }
    if fmap.chunk_size:
        content["striped_ext_list"] = [
            {"nstrips": len(extents), "chunk_size": _Hex(fmap.chunk_size), "simple_ext_list": extents}
        ]
    else:
        content["simple_ext_list"] = extents
    return content


def _make_directory(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        # Never through a link: the tree may lie where others can write.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise PathError(f"{path}: is not a directory") from None


def _compare(path: str, content: dict[str, Any]) -> None:
    try:
        with open(path, "rb") as file:
            found = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ShadowError(f"{path}: cannot be read as YAML") from error
    if found != content:
        raise ShadowError(f"{path}: does not say what the log says")
