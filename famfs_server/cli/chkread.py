# SPDX-License-Identifier: Apache-2.0
"""`famfs chkread`: do reading and mapping a metadata file give the same bytes, and are they valid?"""

import errno
import json
import mmap
import os
import stat

import click

from famfs_server.cli import program
from famfs_server.cli.progress import progress
from famfs_server.errors import FamfsError, MediaError, UsageError

_PIECE = 1 << 20


@program.tool("chkread")
@click.option("-s", "--superblock", is_flag=True, help="FILE is a superblock file.")
@click.option("-l", "--log", "is_log", is_flag=True, help="FILE is a log file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("file")
def command(*, file: str, superblock: bool, is_log: bool, as_json: bool) -> None:
    """Compare read(2) and mmap(2) of FILE, such as .meta/.superblock or .meta/.log of a mount."""
    if superblock == is_log:
        raise UsageError("say either --superblock or --log")
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise MediaError(f"{file}: {os.strerror(errno.EISDIR)}")
        head = os.pread(fd, _PIECE, 0)
        _check(file, head, size, superblock)
        try:
            mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise MediaError(f"{file}: cannot be mapped: {os.strerror(error.errno or 0)}") from error
        with mapping, progress("comparing", size) as bar:
            for offset in range(0, size, _PIECE):
                if os.pread(fd, _PIECE, offset) != mapping[offset : offset + _PIECE]:
                    raise MediaError(f"{file}: reading and mapping differ between {offset} and {offset + _PIECE}")
                bar.advance(min(_PIECE, size - offset))
    finally:
        os.close(fd)
    if as_json:
        click.echo(json.dumps({"file": file, "kind": "superblock" if superblock else "log", "size": size}, indent=2))
        return
    click.echo(f"{file}: reading and mapping agree over {size} bytes")


def _check(file: str, head: bytes, size: int, is_superblock: bool) -> None:
    from famfs_server.omf import layout, log, superblock

    needed = layout.SUPERBLOCK.itemsize if is_superblock else layout.LOG_HEADER_SIZE
    if len(head) < needed:
        raise MediaError(f"{file}: has {size} bytes, too few for a {'superblock' if is_superblock else 'log'}")
    if is_superblock:
        superblock.inspect(head[:needed]).require(file)
        return
    try:
        log.decode_header(head[:needed], size)
    except FamfsError as error:
        raise MediaError(f"{file}: {error}") from error
