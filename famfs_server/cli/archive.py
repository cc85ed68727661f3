# SPDX-License-Identifier: Apache-2.0
"""`famfs export` and `famfs import`: a file system to a tar archive and back.

famfs has no delete, and space comes back only by a new mkfs. So what is to be kept goes into an archive before, and
out of it afterwards; so do file systems that move to other devices. Owners, modes and striping are kept; famfs has no
times.
"""

import errno
import io
import os
import stat
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.cli.target import Advance, OpenFile, Place, Targets, Unmounted, daxdev_option
from famfs_server.daemon.control_client import FileRequest, Striping
from famfs_server.errors import FamfsError, NoSuchPathError, NotADirectoryPathError, PathError, UsageError

if TYPE_CHECKING:
    from famfs_server.volume.namespace import Namespace

_PIECE = 4 << 20
_BATCH_FILES, _BATCH_BYTES = 1000, 32 << 20
_STRIPS, _CHUNK = "FAMFS.strips", "FAMFS.chunk_size"
"""Extended headers of a striped file."""


class ArchiveError(FamfsError):
    """An archive that cannot be read."""


class _Reader:
    """A file of the file system as tarfile reads it."""

    def __init__(self, file: OpenFile, advance: Advance) -> None:
        self._file = file
        self._advance = advance
        self._at = 0

    def read(self, length: int = _PIECE, /) -> bytes:
        """The next bytes."""
        data = self._file.read(self._at, length)
        self._at += len(data)
        self._advance(len(data))
        return data


@program.tool("export")
@click.option("-o", "--output", metavar="FILE", default="-", help="The archive; default: standard output.")
@click.option("-v", "--verbose", count=True, help="Name each file.")
@daxdev_option
@click.argument("path")
def export_command(*, path: str, output: str, verbose: int, daxdev: Unmounted | None) -> None:
    """Write PATH of a famfs file system, and what is below it, as a tar archive.

    Compress it by a pipe: famfs export /mnt/famfs | zstd > famfs.tar.zst
    """
    if output == "-" and sys.stdout.isatty():
        raise UsageError("an archive is nothing for a terminal; use --output or a pipe")
    with Targets(daxdev, write=False) as targets:
        place = targets.find(path)
        if place.status() is None:
            raise NoSuchPathError(f"{path}: no such file or directory")
        tree = place.target.volume().namespace
        nodes = [node for node in tree.walk() if _inside(tree.path(node), place.path)]
        total = sum(tree.size[node] for node in nodes if not tree.is_directory(node))
        with (
            progress("exporting", total) as bar,
            _sink(output) as sink,
            tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE) as tar,
        ):
            # Pieces of the size that tarfile takes by itself would be a guarded copy each.
            tar.copybufsize = _PIECE  # type: ignore[attr-defined]  # missing in the description of the module
            for node in nodes:
                info = _describe(tree, node, place.path)
                if verbose:
                    click.echo(info.name, err=True)
                if tree.is_directory(node):
                    tar.addfile(info)
                    continue
                opened = place.target.open(tree.path(node))
                try:
                    tar.addfile(info, _Reader(opened, bar.advance))
                finally:
                    opened.close()


def _inside(path: bytes, top: bytes) -> bool:
    return not top or path == top or path.startswith(top + b"/")


@contextmanager
def _sink(output: str) -> Iterator[IO[bytes]]:
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with open(output, "wb") as file:
            yield file
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, os.strerror(error.errno), output) from error
        raise


def _describe(tree: "Namespace", node: int, top: bytes) -> tarfile.TarInfo:
    """The head of a node's record; its name is relative to the exported directory."""
    path = tree.path(node)
    name = path[len(top) :].lstrip(b"/") or path.rpartition(b"/")[2]
    info = tarfile.TarInfo(os.fsdecode(name))
    info.mode, info.uid, info.gid = tree.mode[node] & 0o7777, tree.uid[node], tree.gid[node]
    info.mtime = int(time.time())
    if tree.is_directory(node):
        info.type = tarfile.DIRTYPE
        return info
    info.size = tree.size[node]
    fmap = tree.fmap(node)
    if fmap.chunk_size:
        info.pax_headers = {_STRIPS: str(len(fmap.extents)), _CHUNK: str(fmap.chunk_size)}
    return info


@program.tool("import")
@click.option("--contiguous", is_flag=True, help="Put striped files into one piece each.")
@click.option("-v", "--verbose", count=True, help="Name each file.")
@daxdev_option
@click.argument("archive")
@click.argument("directory")
def import_command(*, archive: str, directory: str, contiguous: bool, verbose: int, daxdev: Unmounted | None) -> int:
    """Put what is in ARCHIVE (-: standard input) into DIRECTORY of a famfs file system.

    A file that exists with the same size is left alone, so that an import that was interrupted can be repeated: files
    appear whole. Empty files, links and special files cannot be stored. The exit status counts what failed.
    """
    with Targets(daxdev, write=True) as targets:
        place = targets.find(directory)
        found = place.status()
        if found is None or not found.is_directory:
            raise NotADirectoryPathError(f"{directory}: is not a directory")
        size = os.stat(archive).st_size if archive != "-" and os.path.isfile(archive) else None
        loader = _Loader(place, contiguous=contiguous, verbose=verbose)
        try:
            with _source(archive) as source, progress("importing", size) as bar:
                with tarfile.open(fileobj=_Archive(source, bar.advance), mode="r|*", bufsize=_PIECE) as tar:
                    for info in tar:
                        loader.take(tar, info)
                loader.flush()
        except tarfile.TarError as error:
            loader.flush()
            raise ArchiveError(f"{archive}: is no tar archive, or a damaged one: {error}") from error
    click.echo(f"{loader.made} files and directories made, {loader.there} there already, {loader.failed} failed")
    return loader.failed


class _Archive(io.BufferedIOBase):
    """The archive as tarfile reads it, whatever it is compressed with."""

    def __init__(self, source: IO[bytes], advance: Advance) -> None:
        super().__init__()
        self._source = source
        self._advance = advance

    def read(self, length: int | None = _PIECE, /) -> bytes:
        """The next bytes."""
        data = self._source.read(-1 if length is None else length)
        self._advance(len(data))
        return data


@contextmanager
def _source(archive: str) -> Iterator[IO[bytes]]:
    if archive == "-":
        yield sys.stdin.buffer
        return
    with open(archive, "rb") as file:
        yield file


class _Loader:
    """Makes what an archive's records say, small files together."""

    def __init__(self, place: Place, *, contiguous: bool, verbose: int) -> None:
        self._place = place
        self._contiguous = contiguous
        self._verbose = verbose
        self._batch: list[tuple[FileRequest, bytes]] = []
        self.made = self.there = self.failed = 0

    def take(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Make one file or directory, or put it off until there are more."""
        try:
            place = self._place_of(info.name)
            if info.isdir():
                self.flush()
                self._directory(place, info)
            elif not info.isreg():
                raise PathError("links and special files cannot be stored")
            elif info.size == 0:
                raise PathError("empty files cannot be stored")
            else:
                self._file(tar, info, place)
        except (FamfsError, OSError) as error:
            self._fail(info.name, error)

    def flush(self) -> None:
        """Make the files that were put off; where they cannot be made together, one by one."""
        batch, self._batch = self._batch, []
        if not batch:
            return
        target = self._place.target
        try:
            target.put([request for request, _ in batch], (memoryview(data) for _, data in batch))
            self.made += len(batch)
            return
        except (FamfsError, OSError) as error:
            if len(batch) == 1:
                self._fail(os.fsdecode(batch[0][0].path), error)
                return
        for request, data in batch:
            self._batch = [(request, data)]
            self.flush()

    def _place_of(self, name: str) -> Place:
        from famfs_server.volume.faults import Fault
        from famfs_server.volume.replay import normalise

        path, fault = normalise(os.fsencode(name).lstrip(b"/"))
        if fault is Fault.EMPTY_PATH:
            return self._place
        if fault:
            raise PathError(fault.meaning)
        return self._place.below(path)

    def _directory(self, place: Place, info: tarfile.TarInfo) -> None:
        found = place.status()
        if found is None:
            place.target.mkdir(place.path, stat.S_IMODE(info.mode), info.uid, info.gid)
            self.made += 1
        elif not found.is_directory:
            raise NotADirectoryPathError("a file of that name exists")
        else:
            self.there += 1

    def _file(self, tar: tarfile.TarFile, info: tarfile.TarInfo, place: Place) -> None:
        found = place.status()
        if found is not None:
            if not found.is_file or found.size != info.size:
                raise PathError(f"exists, and not with {info.size} bytes")
            self.there += 1
            return
        self._parents(place)
        request = FileRequest(
            place.path, info.size, stat.S_IMODE(info.mode), info.uid, info.gid, self._striping(info.pax_headers)
        )
        if self._verbose:
            click.echo(info.name)
        source = tar.extractfile(info)
        assert source is not None
        if info.size < _BATCH_BYTES:
            self._batch.append((request, source.read()))
            if len(self._batch) >= _BATCH_FILES or sum(len(data) for _, data in self._batch) >= _BATCH_BYTES:
                self.flush()
            return
        place.target.put([request], _pieces(source, info.size))
        self.made += 1

    def _parents(self, place: Place) -> None:
        """Directories that the archive has no record of."""
        head = place.path.rpartition(b"/")[0]
        if not head or place.target.status(head) is not None:
            return
        above = Place(place.target, head, os.fsdecode(head))
        self._parents(above)
        place.target.mkdir(head, 0o755, os.geteuid(), os.getegid())

    def _striping(self, headers: Mapping[str, str]) -> Striping | None:
        if self._contiguous or _STRIPS not in headers:
            return None
        try:
            strips, chunk = int(headers[_STRIPS]), int(headers[_CHUNK])
        except (KeyError, ValueError):
            raise ArchiveError("its striping makes no sense") from None
        return Striping(strips, strips, chunk)

    def _fail(self, name: str, error: FamfsError | OSError) -> None:
        self.failed += 1
        program.warn(f"{name}: {program.describe(error) if isinstance(error, OSError) else error}")


def _pieces(source: IO[bytes], size: int) -> Iterator[memoryview]:
    left = size
    while left:
        data = source.read(min(_PIECE, left))
        if not data:
            raise ArchiveError("the archive ends within the file")
        left -= len(data)
        yield memoryview(data)
