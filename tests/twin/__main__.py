# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.twin IMAGE`: serve an image to a fake kernel and print what the two say to each other."""

import argparse
import code
import errno
import stat
import tempfile
from pathlib import Path
from uuid import UUID

from famfs_server.omf import layout, superblock
from tests.twin import maps
from tests.twin.connection import ATTR, ATTR_HEAD, ENTRY_HEAD, Exchange, Op
from tests.twin.kernel import Attr, FakeKernel
from tests.twin.maps import Dialect
from tests.twin.server import Refused, Twin

SHOWN_EXTENTS = 4


def show(exchange: Exchange) -> None:
    """One line for a request and one for what came of it."""
    name = Op(exchange.opcode).name if exchange.opcode in {*Op} else f"opcode {exchange.opcode}"
    print(f"> {name}({exchange.nodeid:#x}) {_request(exchange)}".rstrip())
    if exchange.payload is None:
        print("< nothing, as it should be")
    elif exchange.error:
        print(f"< {errno.errorcode.get(exchange.error, exchange.error)}")
    else:
        print(f"< {_reply(exchange)}")


def _request(exchange: Exchange) -> str:
    if exchange.opcode == Op.LOOKUP:
        return repr(exchange.body[:-1])
    return f"{len(exchange.body)} bytes {exchange.body[:24].hex(' ', 4)}" if exchange.body else ""


def _reply(exchange: Exchange) -> str:
    payload = exchange.payload or b""
    match exchange.opcode:
        case Op.LOOKUP | Op.MKDIR:
            nodeid, generation, valid, attr_valid, *_ = ENTRY_HEAD.unpack_from(payload)
            return f"nodeid {nodeid} generation {generation} valid {valid} s, {attr_valid} s; {_attr(payload, 40)}"
        case Op.GETATTR | Op.SETATTR:
            return _attr(payload, ATTR_HEAD.size)
        case Op.GET_FMAP:
            return _map(payload)
        case Op.GET_DAXDEV:
            return repr(payload[24:].split(b"\0", 1)[0])
    return f"{len(payload)} bytes {payload[:24].hex(' ', 4)}" if payload else "done"


def _attr(payload: bytes, offset: int) -> str:
    attr = Attr(*ATTR.unpack_from(payload, offset))
    return f"{stat.filemode(attr.mode)} {attr.uid}:{attr.gid} {attr.size} bytes"


def _map(payload: bytes) -> str:
    _, _, version, kind, count, need, size, _ = maps.HEADER.unpack_from(payload)
    head = f"{len(payload)} bytes: version {version}, {count} extents, fmap_size {need}, file of {size} bytes"
    if len(payload) < need:
        return f"{head}; ask again"
    found = maps.parse(Dialect.PUSH_INTERLEAVE if kind == maps.SIMPLE else Dialect.PULL, payload)
    for group in found.striped:
        head += f"; chunks of {group.chunk:#x} on {len(group.strips)} strips"
    extents = list(found.ranges())
    lines = [f"    device {e.device} {e.offset:#x} + {e.length:#x}" for e in extents[:SHOWN_EXTENTS]]
    if len(extents) > SHOWN_EXTENTS:
        lines.append(f"    and {len(extents) - SHOWN_EXTENTS} more")
    return "\n".join([head, *lines])


def use(kernel: FakeKernel) -> None:
    """List everything, open every file, read its first bytes, and forget it again."""
    for inode in list(kernel.walk()):
        if inode.is_directory:
            continue
        try:
            file = kernel.open(inode)
            try:
                print(f"= {inode.path!r} begins with {kernel.read(file, 0, 16).hex(' ', 4)}")
            finally:
                kernel.close_file(file)
        except OSError as error:
            print(f"= {inode.path!r}: {error}")
        kernel.forget(inode)
    kernel.require_silence(0.2)


def main() -> int:
    """Serve, use, report; 1 where the server refuses the image."""
    parser = argparse.ArgumentParser(prog="python -m tests.twin", description=__doc__)
    parser.add_argument("image", type=Path, help="a file that stands for a dax device")
    parser.add_argument("--dialect", type=Dialect, default=Dialect.PULL, help="pull, push or push-interleave")
    parser.add_argument("--minor", type=int, default=45)
    parser.add_argument("--no-rawio", action="store_true", help="the mounting process lacks CAP_SYS_RAWIO")
    parser.add_argument("--host", type=UUID, help="this host's UUID; without it this host is a client")
    parser.add_argument("-o", dest="words", action="append", help="a mount option, such as fastpath=off")
    parser.add_argument("-i", "--interactive", action="store_true", help="go on with a prompt: `kernel` is the kernel")
    arguments = parser.parse_args()
    with arguments.image.open("rb") as image:
        found = superblock.inspect(image.read(layout.SUPERBLOCK.itemsize)).superblock
    with tempfile.TemporaryDirectory(prefix="famfs-twin-") as directory:
        twin = Twin(
            arguments.image,
            arguments.dialect,
            words=arguments.words or [f"dialect={arguments.dialect.value}"],
            host=arguments.host,
            log=Path(directory) / "log",
            rawio=not arguments.no_rawio,
            minor=arguments.minor,
            metadata_end=layout.LOG_OFFSET + found.log_length if found else 0,
            watch=show,
        )
        try:
            kernel = twin.mount()
            print(f"= data path {twin.data_path}: {twin.reason}")
            use(kernel)
            if arguments.interactive:
                code.interact("kernel, twin and maps are here", local={"kernel": kernel, "twin": twin, "maps": maps})
        except Refused as refusal:
            print(f"= refused: {refusal}")
        status = twin.end()
        print(twin.log(), end="")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
