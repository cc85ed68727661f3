# SPDX-License-Identifier: Apache-2.0
"""Emulated devices with many files, made as columns: a million log entries in a few seconds."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from bench.trees import WARM_DIRECTORY, Tree
from famfs_server.dax.device import EMULATED_ALIGN, DaxDevice
from famfs_server.omf import layout
from famfs_server.omf.layout import EntryType
from famfs_server.volume.format import make_filesystem

MASTER = UUID("f00dcafe-0102-4304-8506-0708090a0b0c")
"""The host that owns every image."""
FILE_SIZE = layout.ALLOC_UNIT
"""Bytes of every file of a tree."""
_BLOCK = 1 << 16


def log_length_for(entries: int) -> int:
    """The least log that has room for `entries`."""
    length = layout.MIN_LOG_LENGTH
    while layout.natural_last_index(length) + 1 < entries:
        length *= 2
    return length


def tree_paths(tree: Tree) -> list[tuple[bytes, bool]]:
    """A tree's log in order: each path, and whether it is a directory."""
    files = tree.file_names
    paths: list[tuple[bytes, bool]] = []
    for number, directory in enumerate(tree.directory_names):
        paths.append((directory.encode(), True))
        start = number * tree.files_each
        paths += [(name.encode(), False) for name in files[start : start + tree.files_each]]
    paths.append((WARM_DIRECTORY.encode(), True))
    paths += [(name.encode(), False) for name in tree.warm_names]
    return paths


def make_image(
    path: Path,
    paths: Sequence[tuple[bytes, bool]],
    *,
    room: int = 0,
    log_length: int | None = None,
    visible: int | None = None,
) -> Path:
    """Make a device whose log holds `paths`, with space and log entries for `room` more files.

    `visible` entries count as written (all by default); `append` shows the others later. All of it lies in a sparse
    file: what is never written takes no space.
    """
    log_length = log_length or log_length_for(len(paths) + room)
    data_start = layout.LOG_OFFSET + log_length
    size = max(data_start + (len(paths) + room + 1) * FILE_SIZE, layout.MIN_DEVICE_SIZE)
    format_image(path, -(-size // EMULATED_ALIGN) * EMULATED_ALIGN, log_length)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for first in range(0, len(paths), _BLOCK):
            entries = build_entries(paths[first : first + _BLOCK], first, data_start)
            _write(descriptor, layout.entry_offset(first), entries.tobytes())
    finally:
        os.close(descriptor)
    append(path, len(paths) if visible is None else visible)
    return path


def format_image(path: Path, size: int, log_length: int) -> None:
    """Make a device of `size` bytes with an empty file system."""
    with path.open("wb") as image:
        image.truncate(size)
    with DaxDevice.open(str(path)) as device:
        memory = device.memory()
        try:
            make_filesystem(memory, str(path), MASTER, log_length=log_length)
        finally:
            memory.close()


def append(path: Path, count: int) -> None:
    """Say that the log of an image holds `count` entries, as another host's append does."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        _write(descriptor, layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET, count.to_bytes(8, "little") * 2)
    finally:
        os.close(descriptor)


def build_entries(paths: Sequence[tuple[bytes, bool]], first: int, data_start: int) -> NDArray[np.void]:
    """Log entries from index `first` on; the file of entry i lies in the i-th allocation unit behind the log."""
    count = len(paths)
    entries = np.zeros(count, layout.LOG_ENTRY)
    index = np.arange(first, first + count, dtype=np.uint64)
    is_directory = np.fromiter((flag for _, flag in paths), np.bool_, count)
    stored = np.array([path for path, _ in paths], f"S{layout.PATH_FIELD}").view(f"V{layout.PATH_FIELD}")
    entries["seqnum"] = index
    entries["type"] = np.where(is_directory, EntryType.MKDIR, EntryType.FILE)
    directory, file = entries["mkdir"], entries["file"]
    directory["md_mode"][is_directory] = 0o755
    directory["md_relpath"][is_directory] = stored[is_directory]
    is_file = ~is_directory
    file["fm_size"][is_file] = FILE_SIZE
    file["fm_flags"][is_file] = layout.FILE_FLAG_ALL_HOSTS_RW
    file["fm_mode"][is_file] = 0o644
    file["fm_relpath"][is_file] = stored[is_file]
    fmap = file["fm_fmap"]
    fmap["fmap_nextents"][is_file] = 1
    extent = fmap["se"][:, 0]
    extent["se_offset"][is_file] = (data_start + index * FILE_SIZE)[is_file]
    extent["se_len"][is_file] = FILE_SIZE
    raw, span = memoryview(entries.tobytes()), layout.LOG_ENTRY_CRC_SPAN
    starts = range(0, count * layout.LOG_ENTRY_SIZE, layout.LOG_ENTRY_SIZE)
    entries["crc"] = np.fromiter((zlib.crc32(raw[at : at + span]) for at in starts), np.uint64, count)
    return entries


def _write(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
