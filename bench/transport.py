# SPDX-License-Identifier: Apache-2.0
"""A server on a socket in place of /dev/fuse: `python -m bench.transport DESCRIPTOR IMAGE DIALECT`.

The channel is the real one, with its threads and with libfuse behind it; only the kernel is played by whoever holds the
other end. The socket is a stream, since 12 MiB of extents are more than a message of a socket pair can be; so the other
end waits for each answer before it sends the next request. Without image and dialect it answers every request with
as many bytes as the request asks for, made beforehand: the time that the transport alone takes.
"""

import os
import struct
import sys

import pyfuse3
import trio

from bench.images import MASTER
from famfs_server.dax.device import DaxDevice
from famfs_server.fuse import abi
from famfs_server.fuse.channel import Channel
from famfs_server.fuse.dialects import Decision, Evidence, decide
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.operations import FamfsOperations
from famfs_server.fuse.session import Session
from famfs_server.volume.volume import Volume

ECHO_SIZE = struct.Struct("<I")


def serve(fuse: int, image: str, dialect: str) -> None:
    """Serve until the other end closes."""
    volume = Volume(DaxDevice.open(image).memory(), MASTER, image)
    filesystem = FileSystem(volume, Settings(shadow=b"/"))
    channel = Channel(Session.create(fuse))
    evidence = Evidence(kallsyms=True, rawio=True)
    decision = decide(channel.read_init(), policy="require", forced=dialect, evidence=evidence)
    pyfuse3.init(FamfsOperations(filesystem), f"/dev/fd/{channel.libfuse_end.fileno()}", {"fsname=famfs"})
    trio.run(_main, filesystem, channel, decision, image)


async def _main(filesystem: FileSystem, channel: Channel, decision: Decision, image: str) -> None:
    token = trio.lowlevel.current_trio_token()
    async with trio.open_nursery() as nursery:

        def finished() -> None:
            token.run_sync_soon(nursery.cancel_scope.cancel)

        channel.start(
            filesystem,
            decision,
            fast=True,
            no_open=True,
            serve_unmapped=True,
            devices=(image,),
            finished=finished,
            failed=finished,
        )
        nursery.start_soon(pyfuse3.main)


def echo(fuse: int) -> None:
    """Answer requests whose body is a size with so many bytes, until the other end closes."""
    buffer = bytearray(1 << 16)
    made: dict[int, bytes] = {}
    while length := os.readv(fuse, [buffer]):
        _, _, unique, *_ = abi.IN_HEADER.unpack_from(buffer)
        (size,) = ECHO_SIZE.unpack_from(buffer, abi.IN_HEADER.size) if length > abi.IN_HEADER.size else (0,)
        body = made.setdefault(size, bytes(size))
        os.writev(fuse, [abi.OUT_HEADER.pack(abi.OUT_HEADER.size + size, 0, unique), body])


def main() -> None:
    """Serve on the descriptor in the first argument."""
    fuse = int(sys.argv[1])
    if len(sys.argv) > 2:
        serve(fuse, *sys.argv[2:])
    else:
        echo(fuse)
    # Without the interpreter's clean-up, which waits for threads that block in system calls.
    os._exit(0)


if __name__ == "__main__":
    main()
