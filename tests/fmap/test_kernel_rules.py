# SPDX-License-Identifier: Apache-2.0
"""The kernel's rules for extent maps, against a server that keeps and breaks them (tests/fmap/raw_server.py).

Each page of the devices begins with its own number, so that it is seen which page a file shows. Most tables have a row
for each file of one mount. docs/protocol.md tells of the rules (2, Findings 2 to 4).
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import re
import resource
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from famfs_server.fuse import abi, kernels
from famfs_server.fuse.abi import InitFlag, Notify, Opcode, OpenFlag
from guest_devices import SetMode
from kernel_log import ALARM, KernelLog
from tests.fmap.raw_server import (
    DAXDEV_OPEN,
    GET_DAXDEV,
    GET_FMAP,
    MAPPING,
    PAGE,
    PARAMETERS,
    UNIT,
    Answer,
    Client,
    File,
    Mapped,
    RawMount,
    Request,
    Script,
    Stripe,
    apart,
    called,
    device_name,
    failure,
    header,
    parameters,
    simple,
    striped,
)

MIB = 1 << 20
MARKED = 384 * MIB
MARK = 0xFA57_0000
MAX_LFS = (1 << 63) - 1
PULL, PUSH, STRIPES = "pull", "push", "push-interleave"
NOBODY = 1000

EIO, EINVAL, ERANGE, ENOENT, EFAULT, EBUSY = (
    errno.EIO, errno.EINVAL, errno.ERANGE, errno.ENOENT, errno.EFAULT, errno.EBUSY,
)  # fmt: skip
EHWPOISON = 133
ENXIO, ESTALE, EOPNOTSUPP, ENOSYS, EPERM = errno.ENXIO, errno.ESTALE, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM


@pytest.fixture(scope="module")
def devices(dax_names: list[str], set_mode: SetMode) -> list[Path]:
    """Two devices in famfs mode, with marked pages."""
    nodes = []
    for number, name in enumerate(dax_names[:2]):
        fd = os.open(set_mode(name, "devdax"), os.O_RDWR)
        marks = array.array("Q", (mark(page * PAGE, number) for page in range(MARKED // PAGE)))
        with mmap.mmap(fd, MARKED) as mapping, memoryview(mapping).cast("Q") as words:
            words[:: PAGE // 8] = memoryview(marks)
        os.close(fd)
        nodes.append(set_mode(name, "fsdev"))
    return nodes


@pytest.fixture
def device(devices: list[Path]) -> Path:
    """The first of them."""
    return devices[0]


def mark(offset: int, device: int = 0) -> int:
    """The first 8 bytes of the page at an offset of a device."""
    return MARK + device << 32 | offset // PAGE


def word(data: bytes) -> int:
    """Such 8 bytes as a number."""
    return int.from_bytes(data, "little")


class Space:
    """Gives out places on a device, each once: two files that show the same page are a mistake of their own."""

    def __init__(self, first: int = 0) -> None:
        self._next = first

    def run(self, units: int = 1) -> tuple[int, int]:
        """So many units of 2 MiB, as a run of a map."""
        offset, self._next = self._next, self._next + units * UNIT
        return offset, units * UNIT

    def runs(self, count: int, units: int = 1) -> list[tuple[int, int]]:
        """Several, which lie in the file in another order than on the device."""
        return [self.run(units) for _ in range(count)][::-1]


def whole(space: Space, units: int = 1, **about: Any) -> File:
    """A file with a map as it should be."""
    return File(simple(space.run(units)), units * UNIT, **about)


def opcodes(requests: Sequence[Request]) -> list[int]:
    """What was asked, without what comes at times of the kernel's choice."""
    unsure = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.GETATTR, Opcode.INIT, Opcode.ACCESS)
    return [request.opcode for request in requests if request.opcode not in unsure]


def read_at(path: Path, offset: int = 0, size: int = 8) -> bytes:
    """Open, read, close."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def shows_dax(fd: int) -> bool:
    """Whether statx(2) says STATX_ATTR_DAX of an open file: it has a map."""
    buffer = ctypes.create_string_buffer(256)
    called("statx", fd, b"", 0x1000, 0x7FF, buffer)
    return bool(int.from_bytes(buffer.raw[8:16], "little") & 0x200000)


def open_close(path: Path, flags: int = os.O_RDWR) -> int:
    """The errno of open(2), or 0."""
    return failure(lambda: os.close(os.open(path, flags)))


# -- the capability bit (2.a)


@pytest.mark.parametrize("dialect", [PULL, PUSH, STRIPES, "none"])
@pytest.mark.parametrize("minor", [45, 46])
def test_offer(tmp_path: Path, dialect: str, minor: int) -> None:
    with RawMount(tmp_path, {}, dialect=dialect, minor=minor) as mount:
        assert mount.call("greeting")[0] == minor
        assert bool(mount.call("greeting")[1] & InitFlag.DAX_FMAP) == (dialect != "none")


@dataclass
class Offer:
    """How a mount is made, and whether maps are asked for then."""

    mapped: bool
    mount: dict[str, Any] = field(default_factory=dict)
    script: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("dialect", [PULL, PUSH])
@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(Offer(False, {"rawio": "never"}), id="mounted without CAP_SYS_RAWIO"),
        pytest.param(Offer(True, {"rawio": "mounting"}), id="served without CAP_SYS_RAWIO"),
        pytest.param(Offer(False, {"offer": "N"}), id="not offered"),
        pytest.param(Offer(True, script={"sync_init": True}), id="SYNC_INIT"),
        pytest.param(Offer(False, script={"bits": InitFlag.INIT_EXT}), id="not replied"),
        pytest.param(Offer(False, script={"bits": InitFlag.DAX_FMAP}), id="replied without INIT_EXT"),
        *(
            pytest.param(Offer(True, script={"reply_minor": minor}), id=f"replied with minor {minor}")
            for minor in (46, 45, 40, 36, 31, 23)
        ),
    ],
)
def test_negotiation(tmp_path: Path, device: Path, dialect: str, offer: Offer) -> None:
    """A bit that was not offered, or not replied, leaves an ordinary FUSE file system."""
    script = Script({"file": whole(Space())}, daxdevs=[device_name(device)], **offer.script)
    with RawMount(tmp_path, script, dialect=dialect, **offer.mount) as mount:
        offered = offer.mapped or not offer.mount
        assert bool(mount.call("greeting")[1] & InitFlag.DAX_FMAP) == offered
        if dialect == PUSH:
            assert mount.call("push", str(device)) == (0 if offer.mapped else EOPNOTSUPP)
        data = apart(read_at, mount.path("file"))
        assert word(data) == (mark(0) if offer.mapped else 0)
        requests = opcodes(mount.call("seen"))
        assert (GET_FMAP in requests) == offer.mapped
        assert (Opcode.READ in requests) == (not offer.mapped)


def test_resend_without_negotiation(tmp_path: Path) -> None:
    with RawMount(tmp_path, {}) as mount:
        assert mount.call("notify", Notify.RESEND, b"") == 0


def test_parameters() -> None:
    """What the module does not know is refused."""
    for name, value in (("dialect", "shove"), ("minor", "44"), ("minor", "47"), ("offer", "2")):
        assert (name, failure((PARAMETERS / name).write_text, value)) == (name, EINVAL)


# -- messages at open (2.b, 3)


@pytest.mark.parametrize("dialect", [PULL, PUSH, STRIPES])
def test_messages(tmp_path: Path, device: Path, dialect: str) -> None:
    space = Space()
    pulls = dialect == PULL
    files = {"first": whole(space), "second": whole(space), "bad": File(-EIO, UNIT)}
    with RawMount(tmp_path, files, dialect=dialect, device=device) as mount:
        assert apart(open_close, mount.path("first")) == 0
        lookup, opened, fmap, *daxdev, flush, release = [
            request for request in mount.call("seen") if request.opcode not in (Opcode.INIT, Opcode.GETATTR)
        ]
        nodeid = mount.call("nodeid", "first")
        flags = os.O_RDWR | 0x8000
        assert (lookup.opcode, lookup.body) == (Opcode.LOOKUP, b"first\0")
        assert (opened.opcode, opened.nodeid, opened.body) == (Opcode.OPEN, nodeid, struct.pack("<II", flags, 0))
        body = b"" if pulls else bytes.fromhex("0010000000000000")
        assert (fmap.opcode, fmap.nodeid, fmap.body) == (GET_FMAP, nodeid, body)
        assert [(one.opcode, one.nodeid, one.body) for one in daxdev] == ([(GET_DAXDEV, 0, b"")] if pulls else [])
        assert (flush.opcode, len(flush.body)) == (Opcode.FLUSH, 24)
        assert (release.opcode, release.body) == (Opcode.RELEASE, struct.pack("<QIIQ", nodeid, flags, 0, 0))
        assert {(one.uid, one.gid, one.pid) for one in (opened, fmap, *daxdev)} == {(0, 0, opened.pid)}

        # The device is known now, FLUSH was ENOSYS; the second open of an inode sends no GET_FMAP; failures end it.
        assert apart(open_close, mount.path("second")) == 0
        assert apart(open_close, mount.path("second")) == 0
        usual = [Opcode.LOOKUP, Opcode.OPEN, GET_FMAP, Opcode.RELEASE]
        assert opcodes(mount.call("seen")) == [*usual, Opcode.OPEN, Opcode.RELEASE]
        assert apart(open_close, mount.path("bad")) == EIO
        assert opcodes(mount.call("seen")) == usual


def test_opener_is_told(tmp_path: Path, device: Path) -> None:
    """GET_FMAP and GET_DAXDEV bear the opener's ids; the node's permissions do not matter to him."""

    def client() -> int:
        root = os.open(mount.point, os.O_PATH)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return word(os.pread(os.open("file", os.O_RDONLY, dir_fd=root), 8, 0))

    assert stat.S_IMODE(device.stat().st_mode) == 0o600
    with RawMount(tmp_path, {"file": whole(Space())}, dialect=PULL, device=device) as mount:
        assert apart(client) == mark(0)
        asked = [request for request in mount.call("seen") if request.opcode in (Opcode.OPEN, GET_FMAP, GET_DAXDEV)]
        assert [(one.uid, one.gid) for one in asked] == [(NOBODY, NOBODY)] * 3


@pytest.mark.parametrize("dialect", [PULL, PUSH])
def test_open_not_implemented(tmp_path: Path, device: Path, dialect: str) -> None:
    """GET_FMAP comes though OPEN is ENOSYS, and later opens send nothing."""
    space = Space()
    script = Script({"one": whole(space), "two": whole(space)}, errors={Opcode.OPEN: -ENOSYS})
    with RawMount(tmp_path, script, dialect=dialect, device=device) as mount:
        assert word(apart(read_at, mount.path("one"))) == mark(0)
        extra = [GET_DAXDEV] if dialect == PULL else []
        assert opcodes(mount.call("seen")) == [Opcode.LOOKUP, Opcode.OPEN, GET_FMAP, *extra, Opcode.FLUSH]
        assert word(apart(read_at, mount.path("one"))) == mark(0)
        assert opcodes(mount.call("seen")) == []
        assert word(apart(read_at, mount.path("two"))) == mark(UNIT)
        assert opcodes(mount.call("seen")) == [Opcode.LOOKUP, GET_FMAP]


@pytest.mark.parametrize("dialect", [PULL, PUSH])
def test_two_first_opens(tmp_path: Path, device: Path, dialect: str) -> None:
    """Both may ask for the map; both files work, by one map."""
    right = whole(Space()).fmap
    with RawMount(tmp_path, {"file": File(None, UNIT)}, dialect=dialect, device=device) as mount:
        clients = [Client(read_at, mount.path("file")) for _ in range(2)]
        asked: list[Request] = []
        until = time.monotonic() + 20
        while len(asked) < 2 and time.monotonic() < until:
            asked += [request for request in mount.call("seen") if request.opcode == GET_FMAP]
        for request in asked:
            assert mount.call("reply", request.unique, right) == 0
        assert [word(client.result()) for client in clients] == [mark(0)] * 2


# -- maps (2.b, 2.c, 3)


@dataclass
class Row:
    """A map, and what becomes of its file."""

    fmap: Answer | list[Answer]
    size: int = UNIT
    """In the attributes."""
    opened: int = 0
    pages: list[int] | None = None
    """The pages of the device that the file shows; None where it is not read."""
    failing: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Errors of read(2) and of a mapping at places of the file."""


def pages_of_runs(runs: Sequence[tuple[int, int]], size: int) -> list[int]:
    """The pages that a simple map must show."""
    found = [offset + at for offset, length in runs for at in range(0, length, PAGE)]
    return found[: -(-size // PAGE)]


def pages_of_stripe(stripe: Stripe, size: int) -> list[int]:
    """The pages that an interleaved extent must show."""
    found = []
    for at in range(0, size, PAGE):
        number, within = divmod(at, stripe.chunk)
        turn, strip = divmod(number, len(stripe.strips))
        found.append(stripe.strips[strip][0] + turn * stripe.chunk + within)
    return found


def good(*runs: tuple[int, int], size: int | None = None, **about: Any) -> Row:
    """A simple map that is taken."""
    size = sum(length for _, length in runs) if size is None else size
    return Row(simple(*runs, size=size, **about), size, pages=pages_of_runs(runs, size))


def simple_rows(dialect: str, device_size: int) -> dict[str, Row]:
    """Maps without strips."""
    space = Space()
    pulls, fine = dialect == PULL, dialect == STRIPES
    usual = [space.run() for _ in range(3)]
    poisoned = {0: (EIO, EIO)}
    outside = {0: (EFAULT, EFAULT)}
    thirty_three = space.runs(33)
    partly = (device_size - UNIT, 2 * UNIT)
    return {
        "plain": good(space.run()),
        "three uneven": good(space.run(3), space.run(1), space.run(2)),
        "version 0": good(space.run(), version=0),
        "version 99": good(space.run(), version=99),
        "file type 2": good(space.run(), file_type=2),
        "size inside the last page": good(space.run(), size=UNIT - 1000),
        "longer than the file": good(space.run(2), size=5000),
        "size 0": good(space.run(), size=0),
        "length 0 first": Row(simple((0, 0), run := space.run()), pages=pages_of_runs([run], UNIT)),
        "length 0 in the middle": good(space.run(), (0, 0), space.run()),
        "trailing bytes": Row(simple(run := space.run()) + bytes(100), pages=pages_of_runs([run], UNIT)),
        "a whole page": Row(simple(run := space.run()).ljust(PAGE, b"\xff"), pages=pages_of_runs([run], UNIT)),
        "32 runs": good(*space.runs(32)),
        "33 runs": Row(simple(*thirty_three), 33 * UNIT, ERANGE)
        if pulls
        else Row(simple(*thirty_three), 33 * UNIT, pages=pages_of_runs(thirty_three, 33 * UNIT)),
        "no run": Row(header(0, 0, 0), 0, ERANGE),
        "no run, size": Row(header(0, 0, UNIT), UNIT, ERANGE),
        "offset not 2 MiB": good((usual[0][0] + PAGE, UNIT)) if fine else Row(simple((PAGE, UNIT)), opened=EINVAL),
        "length not 2 MiB": good((usual[2][0], PAGE)) if fine else Row(simple((0, PAGE)), PAGE, EINVAL),
        "offset not a page": Row(simple((512, UNIT)), UNIT, EINVAL),
        "length not a page": Row(simple((0, UNIT + 512)), UNIT, EINVAL),
        "slot 1": Row(simple((0, UNIT, 1)), failing=poisoned) if fine else Row(simple((0, UNIT, 1)), opened=EINVAL),
        "slot 24": Row(simple((0, UNIT, 24)), failing=poisoned) if fine else Row(simple((0, UNIT, 24)), opened=EINVAL),
        "slot 1 later": Row(simple(space.run(), (UNIT, UNIT, 1)), 2 * UNIT, failing=poisoned)
        if fine
        else Row(simple(usual[0], (UNIT, UNIT, 1)), 2 * UNIT, EINVAL),
        "slot 64": Row(simple((0, UNIT, 64)), opened=EINVAL),
        "nothing": Row(b"", opened=EINVAL if pulls else EIO),
        "31 bytes": Row(simple(usual[0])[:31], opened=EINVAL if pulls else EIO),
        "header alone": Row(simple(usual[0])[:32], opened=EINVAL),
        "one byte short": Row(simple(usual[0])[:-1], opened=EINVAL),
        "sum too short": Row(simple(usual[0], size=UNIT + 1), UNIT + 1, EINVAL),
        "type 7": Row(simple(usual[0], kind=7), opened=EINVAL),
        # In two of the dialects this is the module's own check.
        "offset + length overflows": Row(simple((2**64 - UNIT, UNIT)), opened=EINVAL),
        "sum overflows": Row(simple((0, 1 << 63), (0, 1 << 63), size=UNIT), opened=EINVAL),
        "outside": Row(simple((1 << 40, UNIT)), failing=outside),
        "partly outside": Row(simple(partly), 2 * UNIT, failing={0: (0, 0), UNIT: (EFAULT, EFAULT)}),
        "file larger than files are": Row(simple((0, 1 << 62), (0, 1 << 62)), UNIT, EINVAL),
    }


def striped_rows(dialect: str, _: int) -> dict[str, Row]:
    """Maps with strips, in the dialects that have them."""
    space = Space()
    pulls = dialect == PULL

    def both(stripes: Sequence[Stripe], size: int, taken: bool = True) -> Row:
        if not taken:
            return Row(striped(*stripes, size=size), size, EINVAL)
        pages: list[int] = []
        for stripe in stripes:
            pages += pages_of_stripe(stripe, min(stripe.nbytes, size - len(pages) * PAGE))
        return Row(striped(*stripes, size=size), size, pages=pages)

    four = Stripe(space.runs(4, 3), UNIT, 12 * UNIT)
    three = Stripe(space.runs(3, 4), 2 * UNIT, 12 * UNIT)
    other = Stripe(space.runs(4, 3), UNIT, 12 * UNIT)
    unrolled = [(other.strips[at % 4][0] + at // 4 * UNIT, UNIT) for at in range(12)]
    two = [Stripe(space.runs(2, 2), UNIT, 3 * UNIT), Stripe(space.runs(3), UNIT, 3 * UNIT)]
    greedy = [Stripe(space.runs(2, 2), UNIT, 4 * UNIT), Stripe(space.runs(2, 2), UNIT, 4 * UNIT)]
    shy = Stripe(space.runs(2, 2), UNIT, 3 * UNIT)
    overrun = Stripe([space.run(), space.run(3)], UNIT, 4 * UNIT)
    small = Stripe(space.runs(2), PAGE, 2 * UNIT)
    torn = [Stripe(space.runs(2), UNIT, UNIT + 1), Stripe(space.runs(1), UNIT, UNIT)]
    short, page = space.run(), (space.run()[0], PAGE)
    many = [Stripe(space.runs(1), UNIT, UNIT) for _ in range(33)]
    strips = space.runs(2)
    no_chunk = Stripe(space.runs(2), 0, 2 * UNIT)

    def one(*changed: tuple[int, ...], chunk: int = UNIT, nbytes: int = 2 * UNIT) -> Stripe:
        return Stripe(changed or strips, chunk, nbytes)

    refused = {
        "chunk 1 MiB": one(chunk=MIB),
        "nbytes 0": one(nbytes=0),
        "33 strips": one(*space.runs(33), nbytes=33 * UNIT),
        "no strip": Stripe([], UNIT, UNIT),
        "strips too short": one((0, UNIT)),
        "strip not 2 MiB": one((0, UNIT), (1000, UNIT)),
        "strip in slot 64": one((0, UNIT), (0, UNIT, 64)),
        "nbytes of more than a file": one(nbytes=MAX_LFS + 1),
    }
    rows = {
        "four ways": both([four], 12 * UNIT - 5),
        "two extents": both(two, 6 * UNIT),
        "32 strips": both([Stripe(space.runs(32), UNIT, 32 * UNIT)], 32 * UNIT),
        # Where the second part begins inside a page, kernels with the patches show wrong bytes.
        "part inside a page": Row(
            striped(*torn, size=2 * UNIT),
            2 * UNIT,
            pages=pages_of_stripe(torn[0], UNIT),
            failing={UNIT: (0, 0), UNIT + PAGE: (EIO, EFAULT)},
        ),
        # The first one serves the whole file, since its bytes are enough for it.
        "nbytes of each is the size": both(greedy[:1], 4 * UNIT),
        "chunk 4 MiB": both([three], 12 * UNIT, pulls),
        "chunk of a page": both([small], 2 * UNIT, not pulls),
        "no extent": Row(striped(size=UNIT), UNIT, ERANGE),
        **{name: Row(striped(stripe, size=2 * UNIT), 2 * UNIT, EINVAL) for name, stripe in refused.items()},
        "33 extents": Row(striped(*many, size=33 * UNIT), 33 * UNIT, ERANGE) if pulls else both(many, 33 * UNIT),
        "strips missing": Row(striped(one(), size=2 * UNIT)[:-1], 2 * UNIT, EINVAL),
        "extent missing": Row(striped(one(), size=2 * UNIT, count=2), 2 * UNIT, EINVAL),
    }
    rows["nbytes of each is the size"].fmap = striped(*greedy, size=4 * UNIT)
    if pulls:
        rows |= {
            "strip in slot 1": Row(striped(one((0, UNIT), (0, UNIT, 1)), size=2 * UNIT), 2 * UNIT, EINVAL),
            "strip of 1 MiB": Row(striped(one((0, 2 * UNIT), (0, MIB)), size=2 * UNIT), 2 * UNIT, EINVAL),
            "nbytes below the size": Row(
                striped(shy, size=4 * UNIT),
                4 * UNIT,
                pages=pages_of_stripe(shy, 3 * UNIT),
                failing={3 * UNIT: (EIO, EFAULT)},
            ),
            # Kernels with the patches do not look at a strip's length, and show what follows it on the device.
            "strip shorter than its part": Row(
                striped(overrun, size=4 * UNIT),
                4 * UNIT,
                pages=pages_of_stripe(overrun, 2 * UNIT),
                failing={2 * UNIT: (EIO, EFAULT)},
            ),
            "chunk 0": Row(striped(no_chunk, size=2 * UNIT), 2 * UNIT, failing={0: (EIO, EFAULT)}),
        }
    else:
        rows |= {
            "nbytes below the size": Row(striped(shy, size=4 * UNIT), 4 * UNIT, EINVAL),
            "strip shorter than its part": Row(striped(overrun, size=4 * UNIT), 4 * UNIT, EINVAL),
            "chunk 0": Row(striped(no_chunk, size=2 * UNIT), 2 * UNIT, EINVAL),
            "last bytes inside": both([Stripe([short, page], UNIT, UNIT + PAGE)], UNIT + PAGE),
            "last byte outside": both([Stripe([short, page], UNIT, UNIT + PAGE + 1)], UNIT + PAGE, taken=False),
            "strip in slot 1": Row(
                striped(one(space.run(), (0, UNIT, 1)), size=2 * UNIT), 2 * UNIT, failing={0: (EIO, EIO)}
            ),
            "file larger than files are": Row(striped(one(), size=MAX_LFS + 1), UNIT, EINVAL),
        }
    size = 12 * UNIT - 5
    rows["unrolled"] = Row(simple(*unrolled, size=size), size, pages=pages_of_stripe(other, size))
    return rows


TABLES = [
    pytest.param(PULL, simple_rows, id="pull"),
    pytest.param(PUSH, simple_rows, id="push"),
    pytest.param(STRIPES, simple_rows, id="push-interleave"),
    pytest.param(PULL, striped_rows, id="pull, strips"),
    pytest.param(STRIPES, striped_rows, id="push-interleave, strips"),
]


def examine(path: Path, row: Row) -> tuple[int, list[int] | None, list[int] | None, dict[int, tuple[int, int]]]:
    """What becomes of a row's file: the errno of open, pages by read(2) and by a mapping, and errors at places."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        return error.errno or -1, None, None, {}
    read = mapped = None
    if row.pages is not None:
        length = len(row.pages) * PAGE
        data = os.pread(fd, length, 0).ljust(length, b"\0")
        read = memoryview(data).cast("Q")[:: PAGE // 8].tolist()
        mapped = []
        if row.size:
            with mmap.mmap(fd, min(length, row.size)) as mapping:
                data = mapping[:].ljust(length, b"\0")
            mapped = memoryview(data).cast("Q")[:: PAGE // 8].tolist()
    failing = {}
    for at in row.failing:
        failing[at] = failure(os.pread, fd, 8, at), failure(lambda at=at: Mapped(fd, row.size).load(at))
    os.close(fd)
    return 0, read, mapped, failing


@pytest.mark.parametrize(("dialect", "table"), TABLES)
def test_maps(tmp_path: Path, device: Path, dialect: str, table: Callable[[str, int], dict[str, Row]]) -> None:
    rows = table(dialect, int(Path("/sys/bus/dax/devices", device.name, "size").read_text()))
    files = {name: File(row.fmap, row.size) for name, row in rows.items()}
    with RawMount(tmp_path, files, dialect=dialect, device=device) as mount:
        found = apart(lambda: {name: examine(mount.path(name), row) for name, row in rows.items()}, seconds=60)
    for name, row in rows.items():
        marks = None if row.pages is None else [mark(offset) for offset in row.pages]
        opened, read, mapped, failing = found[name]
        assert (name, errno.errorcode.get(opened)) == (name, errno.errorcode.get(row.opened))
        assert (name, failing) == (name, row.failing)
        assert read == marks, name
        assert mapped == marks, name


def test_no_strips_in_push(tmp_path: Path, device: Path) -> None:
    stripe = Stripe(Space().runs(2), UNIT, 2 * UNIT)
    with RawMount(tmp_path, {"file": File(striped(stripe, size=2 * UNIT), 2 * UNIT)}, device=device) as mount:
        assert apart(open_close, mount.path("file")) == EINVAL


# -- errors of the server (2.b)


@pytest.mark.parametrize("dialect", [PULL, PUSH, STRIPES])
def test_errors(tmp_path: Path, device: Path, dialect: str) -> None:
    """An error of GET_FMAP is that of open(2), and is not remembered."""
    numbers = (EIO, ENOENT, ENOSYS, EOPNOTSUPP, errno.EAGAIN, errno.ENOMEM, 511)
    files = {str(number): File(-number, UNIT) for number in numbers}
    with RawMount(tmp_path, files | {"good": whole(Space())}, dialect=dialect, device=device) as mount:
        found = apart(lambda: [(open_close(mount.path(name)), open_close(mount.path(name))) for name in files])
        assert found == [(number, number) for number in numbers]
        each = [Opcode.OPEN, GET_FMAP, Opcode.RELEASE]
        assert opcodes(mount.call("seen")) == [Opcode.LOOKUP, *each, *each] * len(numbers)
        assert word(apart(read_at, mount.path("good"))) == mark(0)


@pytest.mark.parametrize("dialect", [PULL, PUSH])
def test_stale_and_interrupted(tmp_path: Path, device: Path, dialect: str) -> None:
    files = {"stale": File(-ESTALE, UNIT), "interrupted": File(-errno.EINTR, UNIT)}
    with RawMount(tmp_path, files, dialect=dialect, device=device) as mount:
        # open(2) without the wrapper of Python, which would repeat it for ever.
        assert apart(failure, called, "open", bytes(mount.path("interrupted")), os.O_RDWR) == errno.EINTR
        each = [Opcode.LOOKUP, Opcode.OPEN, GET_FMAP, Opcode.RELEASE]
        assert opcodes(mount.call("seen")) == each
        assert apart(open_close, mount.path("stale")) == ESTALE
        assert opcodes(mount.call("seen")) == [*each, *each]


@pytest.mark.parametrize("dialect", [PULL, PUSH, STRIPES])
def test_replies_that_the_kernel_refuses(tmp_path: Path, device: Path, dialect: str) -> None:
    """An error out of range leaves the request to be answered again; a payload that is too long ends it with EIO."""
    space = Space()
    right = simple(space.run())
    refused = {
        "above 0": File([5, right], UNIT),
        "below -511": File([-512, -ENOENT], UNIT),
        "far below": File([-(1 << 31), -ENOENT], UNIT),
        "long": File([bytes(PAGE + 1), simple(space.run())], UNIT),
    }
    with RawMount(tmp_path, refused, dialect=dialect, device=device) as mount:
        found = apart(lambda: [open_close(mount.path(name)) for name in refused])
        assert found == [0, ENOENT, ENOENT, EIO]
        asked = [request.refused for request in mount.call("seen") if request.opcode == GET_FMAP]
        assert asked == [(EINVAL,), (EINVAL,), (EINVAL,), (EINVAL, ENOENT)]
        assert word(apart(read_at, mount.path("above 0"))) == mark(0)


# -- larger maps (3)


@dataclass
class Sized:
    """Answers to GET_FMAP one after the other, what open(2) says, and which sizes the kernel asked for."""

    answers: list[Answer]
    asked: list[int]
    opened: int = 0
    marks: dict[int, int] = field(default_factory=dict)
    refused: tuple[int, ...] = ()


def with_length(fmap: bytes, length: int) -> bytes:
    """A map whose header says that it has so many bytes."""
    return fmap[:12] + struct.pack("<I", length) + fmap[16:]


def size_rows() -> dict[str, Sized]:
    """For the dialects that push."""
    space = Space()
    nowhere = 1 << 40

    def long(count: int, *real: int) -> tuple[bytes, dict[int, int]]:
        """So many runs, of which those given are on the device and the others far behind its end."""
        nonlocal nowhere
        runs = [(nowhere + at * UNIT, UNIT) for at in range(count)]
        nowhere += count * UNIT
        for at in real:
            runs[at] = space.run()
        return simple(*runs), {at * UNIT: mark(runs[at][0]) for at in real}

    def asks(count: int, *real: int, first: Callable[[bytes], bytes]) -> Sized:
        fmap, marks = long(count, *real)
        return Sized([first(fmap), fmap], [PAGE, len(fmap)], marks=marks)

    def alone(fmap: bytes) -> bytes:
        return fmap[: abi.FMAP_HEADER.size]

    def small() -> tuple[bytes, dict[int, int]]:
        run = space.run()
        return simple(run), {0: mark(run[0])}

    def plain(length: int) -> Sized:
        fmap, marks = small()
        return Sized([with_length(fmap, length)], [PAGE], marks=marks)

    def announced(length: int, *then: bytes, marks: dict[int, int] | None = None, opened: int = 0) -> Sized:
        asked = [PAGE, length] if then else [PAGE]
        return Sized([with_length(header(0, 1, UNIT), length), *then], asked, opened, marks or {})

    largest = 16 * MIB
    fits, fits_marks = long(169, 0, 100, 168)
    less, less_marks = small()
    most, most_marks = small()
    too_long = long(170)[0]
    return {
        "169 runs": Sized([fits], [PAGE], marks=fits_marks),
        "170 runs": asks(170, 0, 169, first=alone),
        "2000 runs": asks(2000, 1, 1999, first=alone),
        "100000 runs": asks(100_000, 0, 77_777, 99_999, first=alone),
        "cut off": asks(170, 17, first=lambda fmap: fmap[:PAGE]),
        "length 0": plain(0),
        "length larger than the message": plain(4000),
        "length of a page": plain(PAGE),
        "smaller then": announced(8192, less, marks=less_marks),
        "larger then": announced(8192, with_length(less, 8193), opened=EINVAL),
        "16 MiB": announced(largest, most, marks=most_marks),
        "above 16 MiB": announced(largest + 1, opened=errno.EFBIG),
        "largest number": announced(2**32 - 1, opened=errno.EFBIG),
        "sent though too long": Sized([too_long], [PAGE], EIO, refused=(EINVAL,)),
        "31 bytes that announce more": Sized([with_length(too_long, 8192)[:31], too_long], [PAGE], EIO),
        "no run, more announced": Sized([with_length(header(0, 0, 0), 8192), header(0, 0, 0)], [PAGE, 8192], ERANGE),
    }


@pytest.mark.parametrize("dialect", [PUSH, STRIPES])
def test_sizes(tmp_path: Path, device: Path, dialect: str) -> None:
    rows = size_rows()
    files = {}
    for name, row in rows.items():
        last = row.answers[-1]
        assert isinstance(last, bytes)
        size = int.from_bytes(last[16:24], "little") if len(last) >= 24 else UNIT
        files[name] = File(list(row.answers), size)

    def client(name: str) -> tuple[int, dict[int, int]]:
        try:
            fd = os.open(mount.path(name), os.O_RDWR)
        except OSError as error:
            return error.errno or -1, {}
        marks = {at: word(os.pread(fd, 8, at)) for at in rows[name].marks}
        for at, value in marks.items():
            assert word(Mapped(fd, at + PAGE).load(at)) == value
        os.close(fd)
        return 0, marks

    with RawMount(tmp_path, files, dialect=dialect, device=device) as mount:
        found = apart(lambda: {name: client(name) for name in rows}, seconds=60)
        asked: dict[int, list[Request]] = {}
        for request in mount.call("seen"):
            if request.opcode == GET_FMAP:
                asked.setdefault(request.nodeid, []).append(request)
        for name, row in rows.items():
            requests = asked[mount.call("nodeid", name)]
            assert (name, *found[name]) == (name, row.opened, row.marks)
            assert (name, [struct.unpack("<II", one.body) for one in requests]) == (name, [(n, 0) for n in row.asked])
            assert (name, requests[-1].refused) == (name, row.refused)


# -- data (2.c)


def test_silence(tmp_path: Path, device: Path) -> None:
    """Nothing is asked while a file is read, written and mapped, but for the first FSYNC."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        mount.call("seen")
        assert word(os.pread(fd, 8, PAGE)) == mark(PAGE)
        assert os.pwrite(fd, b"abcdefgh", PAGE) == 8
        mapped = Mapped(fd, 2 * UNIT)
        assert mapped.load(PAGE) == b"abcdefgh"
        mapped.store(PAGE, struct.pack("<Q", mark(PAGE)))
        assert word(os.pread(fd, 8, PAGE)) == mark(PAGE)
        called("mlock", ctypes.c_void_p(mapped.address), ctypes.c_size_t(UNIT))
        assert mount.call("seen") == []
        called("msync", mapped.address, UNIT, 4)
        assert opcodes(mount.call("seen")) == [Opcode.FSYNC]
        for sync in (os.fsync, os.fdatasync):
            sync(fd)
        called("msync", mapped.address, UNIT, 4)
        assert mount.call("seen") == []

    with RawMount(tmp_path, {"file": whole(Space(), 2)}, device=device) as mount:
        apart(client)


def test_stored_bytes_are_on_the_device(tmp_path: Path, devices: list[Path], set_mode: SetMode) -> None:
    """What write(2) and a mapping store is found in devdax mode, at the place that the map names."""
    device = devices[1]
    offset = 20 * UNIT
    stripe = Stripe([(offset + 2 * UNIT, UNIT), (offset, UNIT)], UNIT, 2 * UNIT)

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        assert os.pwrite(fd, b"written", 100) == 7
        Mapped(fd, 2 * UNIT).store(UNIT + 100, b"mapped")

    with RawMount(
        tmp_path, {"file": File(striped(stripe, size=2 * UNIT), 2 * UNIT)}, dialect=STRIPES, device=device
    ) as mount:
        apart(client)
    fd = os.open(set_mode(device.name, "devdax"), os.O_RDWR)
    with mmap.mmap(fd, UNIT, offset=offset + 2 * UNIT) as first, mmap.mmap(fd, UNIT, offset=offset) as second:
        assert (first[100:107], second[100:106]) == (b"written", b"mapped")
    os.close(fd)
    set_mode(device.name, "fsdev")


def test_size_of_faults(tmp_path: Path, device: Path) -> None:
    """A fault brings 2 MiB, and a page in a unit that the file does not fill, or that is mapped at another place."""
    reserve = 8 * UNIT

    def faults(address: int, length: int, step: int) -> int:
        out, into = os.pipe()
        os.set_blocking(out, False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for at in range(0, length, step):
            called("write", into, address + at, 1)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        os.close(out)
        os.close(into)
        return after - before

    def client() -> dict[str, int]:
        found = {}
        anonymous = called("mmap", None, reserve, 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
        faults(anonymous, reserve, PAGE)
        for name, length in {"large": 32 * UNIT, "tail": UNIT + 64 * PAGE}.items():
            fd = os.open(mount.path(name), os.O_RDONLY)
            mapped = Mapped(fd, length, prot=mmap.PROT_READ)
            found[name] = faults(mapped.address, length, 4 * PAGE if name == "large" else PAGE)
            found["again"] = faults(mapped.address, length, 4 * PAGE)
        fd = os.open(mount.path("shifted"), os.O_RDONLY)
        free = called("mmap", None, reserve, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        address = -(-free // UNIT) * UNIT + PAGE
        fixed = mmap.MAP_SHARED | 0x10
        called("mmap", address, UNIT, mmap.PROT_READ, fixed, fd, 0)
        found["shifted"] = faults(address, UNIT, PAGE)
        return found

    space = Space()
    files = {
        "large": whole(space, 32),
        "tail": File(simple(space.run(2), size=UNIT + 64 * PAGE), UNIT + 64 * PAGE),
        "shifted": whole(space),
    }
    with RawMount(tmp_path, files, device=device) as mount:
        found = apart(client)
    few = 5  # of the program's own
    expected = {"large": 32, "again": 0, "tail": 1 + 64, "shifted": 512}
    assert {name: count for name, count in found.items() if not expected[name] <= count < expected[name] + few} == {}


def test_end_of_file(tmp_path: Path, device: Path) -> None:
    """Reads and writes stop at the end; the rest of its page can be mapped and is the device's; the next is SIGBUS."""
    size = UNIT + 3 * PAGE + 4

    def client() -> dict[str, Any]:
        fd = os.open(mount.path("file"), os.O_RDWR)
        appending = os.open(mount.path("file"), os.O_RDWR | os.O_APPEND)
        mapped = Mapped(fd, 2 * UNIT)
        return {
            "read across": os.pread(fd, 100, size - 4),
            "read at": os.pread(fd, 100, size),
            "read behind": os.pread(fd, 100, 1 << 40),
            "rest of the page": word(mapped.load(UNIT + 3 * PAGE)),
            "next page": failure(mapped.load, UNIT + 4 * PAGE),
            "far": failure(mapped.load, 2 * UNIT - PAGE),
            "write across": os.pwrite(fd, bytes(100), size - 2),
            "write at": os.pwrite(fd, b"x", size),
            "write behind": os.pwrite(fd, b"x", 1 << 40),
            "write behind the unit": os.pwrite(fd, b"x", 2 * UNIT),
            "size": os.fstat(fd).st_size,
            "append": os.write(appending, b"start"),
            "append again": os.write(appending, b"ed"),
            "begin": os.pread(fd, 7, 0),
        }

    run = Space(8 * UNIT).run(2)
    with RawMount(tmp_path, {"file": File(simple(run, size=size), size)}, device=device) as mount:
        found = apart(client)
        last = mark(run[0] + UNIT + 3 * PAGE)
        assert found == {
            "read across": struct.pack("<Q", last)[:4],
            "read at": b"",
            "read behind": b"",
            "rest of the page": last,
            "next page": EFAULT,
            "far": EFAULT,
            "write across": 2,
            "write at": 0,
            "write behind": 0,
            "write behind the unit": 0,
            "size": size,
            "append": 5,
            "append again": 2,
            "begin": b"started",
        }
        with pytest.raises(ChildProcessError) as caught:
            apart(lambda: touch_behind(mount.path("file"), size))
        assert caught.value.errno == -signal.SIGBUS
    restore_marks(tmp_path, device, run)


def touch_behind(path: Path, size: int) -> int:
    """Read the page behind the end as a program does."""
    mapped = Mapped(os.open(path, os.O_RDONLY), size + UNIT, prot=mmap.PROT_READ)
    return ctypes.string_at(mapped.address + size + PAGE, 1)[0]


def restore_marks(folder: Path, device: Path, run: tuple[int, int]) -> None:
    """Mark the pages of a run again."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        for at in range(0, run[1], PAGE):
            os.pwrite(fd, struct.pack("<Q", mark(run[0] + at)), at)

    with RawMount(folder, {"file": File(simple(run), run[1])}, device=device) as mount:
        apart(client)


MAP_SHARED_VALIDATE, MAP_SYNC, MAP_POPULATE = 3, 0x80000, 0x8000
ADVICE = {
    "NORMAL": (0, 0), "RANDOM": (1, 0), "SEQUENTIAL": (2, 0), "WILLNEED": (3, 0), "DONTNEED": (4, 0),
    "FREE": (8, EINVAL), "REMOVE": (9, EOPNOTSUPP), "DONTFORK": (10, 0), "DOFORK": (11, 0), "HUGEPAGE": (14, 0),
    "DONTDUMP": (16, 0), "COLD": (20, 0), "PAGEOUT": (21, 0), "POPULATE_READ": (22, 0), "POPULATE_WRITE": (23, 0),
}  # fmt: skip


def test_kinds_of_mappings(tmp_path: Path, device: Path) -> None:
    kinds = {
        "sync": {"flags": MAP_SHARED_VALIDATE | MAP_SYNC},
        "validate": {"flags": MAP_SHARED_VALIDATE},
        "populate": {"flags": mmap.MAP_SHARED | MAP_POPULATE},
        "executable": {"prot": mmap.PROT_READ | mmap.PROT_EXEC},
        "private": {"flags": mmap.MAP_PRIVATE},
    }

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        mount.call("seen")
        found = {}
        for name, kind in kinds.items():
            found[name] = failure(lambda kind=kind: Mapped(fd, UNIT, **kind).load(PAGE))
        assert found == dict.fromkeys(kinds, 0) | {"sync": EOPNOTSUPP}

        private = Mapped(fd, UNIT, flags=mmap.MAP_PRIVATE)
        private.store(PAGE, b"private!")
        shared = Mapped(fd, UNIT)
        assert private.load(PAGE) == b"private!"
        assert word(shared.load(PAGE)) == word(os.pread(fd, 8, PAGE)) == mark(PAGE)
        shared.store(3 * PAGE, b"shared!!")
        assert private.load(3 * PAGE) == b"shared!!"
        shared.store(3 * PAGE, struct.pack("<Q", mark(3 * PAGE)))

        assert mount.call("seen") == []
        failed = {name: failure(shared.advise, number) for name, (number, _) in ADVICE.items()}
        assert failed == {name: number for name, (_, number) in ADVICE.items()}
        assert [one for one in opcodes(mount.call("seen")) if one != Opcode.GETXATTR] == [Opcode.FALLOCATE]
        assert word(shared.load(PAGE)) == mark(PAGE)

    with RawMount(tmp_path, {"file": whole(Space())}, device=device) as mount:
        apart(client)


def test_program_is_run(tmp_path: Path, devices: list[Path]) -> None:
    program = Path("/bin/true").read_bytes()
    run = (30 * UNIT, UNIT)

    def client() -> int:
        fd = os.open(mount.path("file"), os.O_RDWR)
        assert os.write(fd, program) == len(program)
        os.close(fd)
        pid = os.posix_spawn(mount.path("file"), ["true"], {})
        return os.waitpid(pid, 0)[1]

    file = File(simple(run, size=len(program)), len(program), mode=stat.S_IFREG | 0o777)
    with RawMount(tmp_path, {"file": file}, device=devices[1]) as mount:
        assert apart(client) == 0


def test_closed_while_mapped(tmp_path: Path, device: Path) -> None:
    """FLUSH comes with close(2), RELEASE with munmap(2); the mount is busy meanwhile."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        mount.call("seen")
        os.close(fd)
        assert opcodes(mount.call("seen")) == [Opcode.FLUSH]
        assert word(mapped.load(0)) == mark(0)
        assert failure(called, "umount2", bytes(mount.point), 0) == EBUSY
        mapped.close()
        assert opcodes(mount.call("seen")) == [Opcode.RELEASE]
        assert failure(called, "umount2", bytes(mount.point), 0) == 0

    with RawMount(tmp_path, {"file": whole(Space())}, device=device) as mount:
        apart(client)


# -- new files (2.f)


@pytest.mark.parametrize("dialect", [PULL, PUSH])
def test_created(tmp_path: Path, device: Path, dialect: str) -> None:
    """A file that CREATE made has no map until it is opened; then its first descriptor has it too."""
    space = Space()
    about = {"size": 0, "truncate": 0, "open_flags": OpenFlag.DIRECT_IO}
    new_files = {name: File(simple(space.run()), **about) for name in ("open", "closed")}
    extra = [GET_DAXDEV] if dialect == PULL else []

    def client() -> None:
        first = os.open(mount.path("open"), os.O_RDWR | os.O_CREAT, 0o600)
        assert opcodes(mount.call("seen")) == [Opcode.LOOKUP, Opcode.CREATE]
        os.ftruncate(first, UNIT)
        attributes, size = mount.call("seen")
        assert (attributes.opcode, attributes.body[8:]) == (Opcode.GETXATTR, b"security.capability\0")
        assert (size.opcode, struct.unpack_from("<I", size.body)) == (Opcode.SETATTR, (0x248,))
        assert (os.pwrite(first, b"x", 0), os.pread(first, 8, 0)) == (1, bytes(8))
        assert opcodes(mount.call("seen")) == [Opcode.WRITE, Opcode.READ]
        assert failure(Mapped, first, UNIT) == errno.ENODEV
        assert not shows_dax(first)

        second = os.open(mount.path("open"), os.O_RDWR)
        assert opcodes(mount.call("seen")) == [Opcode.OPEN, GET_FMAP, *extra]
        for fd in (first, second):
            assert word(os.pread(fd, 8, 0)) == word(Mapped(fd, UNIT).load(0)) == mark(0)
        assert os.pwrite(first, struct.pack("<Q", mark(0)), 0) == 8
        assert mount.call("seen") == []
        assert shows_dax(first)

        first = os.open(mount.path("closed"), os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(first, UNIT)
        os.close(first)
        mount.call("seen")
        assert word(read_at(mount.path("closed"))) == mark(UNIT)
        assert opcodes(mount.call("seen"))[:2] == [Opcode.OPEN, GET_FMAP]

    with RawMount(tmp_path, Script(new_files=new_files), dialect=dialect, device=device) as mount:
        apart(client)


def test_made_by_mknod(tmp_path: Path, device: Path) -> None:
    """CREATE that is ENOSYS becomes MKNOD and OPEN, and GET_FMAP comes at once; its error leaves the node."""
    script = Script(new_files={"new": File(-EBUSY)}, errors={Opcode.CREATE: -ENOSYS})
    with RawMount(tmp_path, script, device=device) as mount:
        assert apart(open_close, mount.path("new"), os.O_RDWR | os.O_CREAT) == EBUSY
        asked = [Opcode.LOOKUP, Opcode.CREATE, Opcode.MKNOD, Opcode.OPEN, GET_FMAP, Opcode.RELEASE]
        assert opcodes(mount.call("seen")) == asked
        assert apart(os.path.exists, mount.path("new"))


def test_read_only_mount(tmp_path: Path, device: Path) -> None:
    """The kernel refuses every change by itself."""

    def client() -> list[int]:
        path = mount.path("file")
        assert word(read_at(path)) == mark(0)
        mount.call("seen")
        found = [open_close(path, flags) for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC)]
        return [*found, failure(os.truncate, path, 0)]

    with RawMount(tmp_path, {"file": whole(Space())}, device=device, read_only=True) as mount:
        assert apart(client) == [errno.EROFS] * 4
        assert opcodes(mount.call("seen")) == []
        assert apart(open_close, mount.path("new"), os.O_RDWR | os.O_CREAT) == errno.EROFS
        assert opcodes(mount.call("seen")) == [Opcode.LOOKUP]


# -- operations on a file with a map (2.g)


def test_truncate_refused(tmp_path: Path, device: Path) -> None:
    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        mapped.load(0)
        mount.call("seen")
        assert failure(os.truncate, path, 0) == EPERM
        *_, asked = mount.call("seen")
        assert (asked.opcode, struct.unpack_from("<I", asked.body)) == (Opcode.SETATTR, (0x208,))
        assert failure(os.ftruncate, fd, 5) == EPERM
        mount.call("seen")
        assert open_close(path, os.O_RDWR | os.O_TRUNC) == EPERM
        opened, *others = [one for one in mount.call("seen") if one.opcode != Opcode.GETXATTR]
        assert struct.unpack("<II", opened.body) == (os.O_RDWR | 0x8000, 0)
        assert opcodes([opened, *others]) == [Opcode.OPEN, Opcode.SETATTR, Opcode.RELEASE]
        assert word(mapped.load(0)) == word(os.pread(fd, 8, 0)) == mark(0)

    with RawMount(tmp_path, {"file": whole(Space())}, device=device) as mount:
        apart(client)


def test_truncating_open(tmp_path: Path, device: Path) -> None:
    """With ATOMIC_O_TRUNC the kernel takes the size for 0, until the server's next attributes say the old one."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR | os.O_TRUNC)
        assert os.fstat(fd).st_size == UNIT
        assert word(os.pread(fd, 8, PAGE)) == mark(PAGE)

    script = Script({"file": whole(Space())}, bits=MAPPING | InitFlag.ATOMIC_O_TRUNC)
    with RawMount(tmp_path, script, device=device) as mount:
        apart(client)


def test_operations_that_fail(tmp_path: Path, device: Path) -> None:
    """Errors, and what the server is asked the first and the second time."""

    def client() -> None:
        fd, other = (os.open(mount.path(name), os.O_RDWR) for name in ("file", "other"))
        plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
        os.write(plain, bytes(PAGE))
        out, into = os.pipe()

        def spliced() -> None:
            os.write(into, b"x")
            try:
                os.splice(out, fd, 1, offset_dst=0)
            finally:
                os.read(out, 1)

        copies: list[int] = [Opcode.COPY_FILE_RANGE_64, Opcode.COPY_FILE_RANGE]
        table: dict[str, tuple[Callable[[], Any], int, list[int]]] = {
            "O_DIRECT": (lambda: os.open(mount.path("file"), os.O_RDONLY | os.O_DIRECT), EINVAL, []),
            "fallocate": (lambda: called("fallocate", fd, 0, 0, PAGE), EOPNOTSUPP, [Opcode.FALLOCATE]),
            "punch": (lambda: called("fallocate", fd, 3, 0, PAGE), EOPNOTSUPP, []),
            "sendfile in": (lambda: os.sendfile(fd, plain, 0, 8), EIO, []),
            "splice in": (spliced, EIO, []),
            "copy within": (lambda: os.copy_file_range(other, fd, 8, 0, 0), EIO, copies),
            "copy within, again": (lambda: os.copy_file_range(other, fd, 8, 0, 0), EIO, []),
            "copy in": (lambda: os.copy_file_range(plain, fd, 8, 0, 0), errno.EXDEV, []),
            "copy out": (lambda: os.copy_file_range(fd, plain, 8, 0, 0), errno.EXDEV, []),
            "RWF_NOWAIT": (lambda: os.preadv(fd, [bytearray(8)], 0, os.RWF_NOWAIT), EOPNOTSUPP, []),
        }
        mount.call("seen")
        for name, (operation, number, asked) in table.items():
            found = failure(operation), [one for one in opcodes(mount.call("seen")) if one not in harmless]
            assert (name, *found) == (name, number, asked)
        assert word(os.pread(fd, 8, 0)) == mark(0)

    harmless = (Opcode.GETXATTR, Opcode.OPEN, Opcode.RELEASE)
    space = Space()
    with RawMount(tmp_path, {"file": whole(space), "other": whole(space)}, device=device) as mount:
        apart(client)


def test_operations_that_work(tmp_path: Path, device: Path) -> None:
    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR)
        synced = os.open(path, os.O_RDWR | os.O_SYNC)
        plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
        out, into = os.pipe()
        left, right = socket.socketpair()
        assert os.sendfile(plain, fd, PAGE, 8) == 8
        assert word(os.pread(plain, 8, 0)) == mark(PAGE)
        assert os.sendfile(left.fileno(), fd, 2 * PAGE, 8) == 8
        assert word(right.recv(8)) == mark(2 * PAGE)
        assert os.sendfile(into, fd, 3 * PAGE, 8) == 8
        assert word(os.read(out, 8)) == mark(3 * PAGE)
        assert os.splice(fd, into, 8, offset_src=4 * PAGE) == 8
        assert word(os.read(out, 8)) == mark(4 * PAGE)

        mount.call("seen")
        assert [os.lseek(fd, at, how) for at, how in ((5, os.SEEK_DATA), (5, os.SEEK_HOLE))] == [5, UNIT]
        assert os.lseek(fd, 0, os.SEEK_END) == UNIT
        assert opcodes(mount.call("seen")) == [Opcode.LSEEK]

        marked = struct.pack("<Q", mark(PAGE))
        assert os.pwritev(fd, [marked], PAGE, os.RWF_DSYNC) == os.pwrite(synced, marked, PAGE) == 8
        os.fsync(fd)
        called("syncfs", fd)
        assert shows_dax(fd)
        assert os.pread(fd, 16, UNIT - 8) == bytes(8)

    with RawMount(tmp_path, {"file": whole(Space())}, device=device) as mount:
        apart(client)


def test_write_to_a_mapped_file(tmp_path: Path, device: Path) -> None:
    """write(2) is seen in mappings that have the page already, whatever its size there."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        for data in (b"abcdefgh", struct.pack("<Q", mark(PAGE))):
            mapped.load(PAGE)
            assert os.pwrite(fd, data, PAGE) == 8
            assert mapped.load(PAGE) == data

    with RawMount(tmp_path, {"file": whole(Space())}, device=device) as mount:
        apart(client)


@pytest.mark.parametrize(
    ("bits", "guard"), [(MAPPING, "N"), (MAPPING | InitFlag.AUTO_INVAL_DATA, "Y")], ids=["", "AUTO_INVAL_DATA"]
)
def test_invalidation(tmp_path: Path, device: Path, bits: int, guard: str) -> None:
    """Notifications, and a new mtime, harm neither maps nor mappings; a forgotten inode gets its map anew.

    AUTO_INVAL_DATA has the dax core warn of a new mtime, unless guard=1.
    """

    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        nodeid = mount.call("nodeid", "file")

        def fine() -> None:
            assert word(mapped.load(PAGE)) == word(os.pread(fd, 8, PAGE)) == mark(PAGE)

        fine()
        for offset, length in ((0, 0), (0, PAGE), (-1, 0)):
            assert mount.call("write", abi.inval_inode(nodeid, offset, length)) == 0
            fine()
        assert mount.call("forget_name", "file") == 0
        fine()
        mount.call("change", "file", mtime=5)
        mount.call("write", abi.inval_inode(nodeid, -1, 0))
        assert os.fstat(fd).st_mtime == 5
        fine()
        mount.call("seen")
        assert word(read_at(path)) == mark(0)
        assert GET_FMAP not in opcodes(mount.call("seen"))

        mapped.close()
        os.close(fd)
        mount.call("forget_name", "file")
        assert Opcode.FORGET in [one.opcode for one in mount.call("seen")]
        assert word(read_at(path)) == mark(0)
        assert GET_FMAP in opcodes(mount.call("seen"))

    with RawMount(tmp_path, Script({"file": whole(Space())}, bits=bits), device=device, guard=guard) as mount:
        apart(client)


# -- devices (2.h, 2.i, 3)


def look(path: Path) -> tuple[int, int, int, int, int]:
    """Errors of open, of a mapping's first page, of read, of another mapping, and of another read."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        return error.errno or -1, 0, 0, 0, 0
    read = failure(os.pread, fd, 8, 0)
    return 0, failure(lambda: Mapped(fd, UNIT).load(0)), read, failure(Mapped, fd, UNIT), failure(os.pread, fd, 8, 0)


GOOD, BAD = (0, 0, 0, 0, 0), (0, EIO, EIO, EIO, EIO)


@pytest.mark.parametrize("trouble", ["devdax", "unbound", "/dev/null", "held"])
def test_device_that_is_refused(tmp_path: Path, devices: list[Path], set_mode: SetMode, trouble: str) -> None:
    """Its slot is lost for the connection: no further GET_DAXDEV, also when the trouble is over."""
    space = Space()
    files = {str(number): whole(space) for number in range(3)}
    device = devices[1]

    def first(path: Path) -> tuple[int, ...]:
        """A mapping that is made before any access is made; its page is not there."""
        fd = os.open(path, os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        return failure(mapped.load, 0), failure(os.pread, fd, 8, 0), failure(Mapped, fd, UNIT)

    with contextlib.ExitStack() as stack, contextlib.ExitStack() as meanwhile:
        if trouble == "held":
            holder = meanwhile.enter_context(RawMount(tmp_path, {"file": whole(space)}, dialect=PULL, device=device))
            assert apart(look, holder.path("file")) == GOOD
        elif trouble != "/dev/null":
            set_mode(device.name, trouble)
        node = Path(trouble) if trouble == "/dev/null" else device
        mount = stack.enter_context(RawMount(tmp_path, files, dialect=PULL, device=node))
        assert apart(first, mount.path("0")) == (EFAULT, EIO, EIO)
        meanwhile.close()
        set_mode(device.name, "fsdev")
        mount.call("alter", daxdevs=[device_name(device)])
        mount.call("seen")
        assert apart(lambda: [look(mount.path(name)) for name in files]) == [BAD] * 3
        assert GET_DAXDEV not in opcodes(mount.call("seen"))
    with RawMount(tmp_path, {"file": whole(space)}, dialect=PULL, device=device) as mount:
        assert apart(look, mount.path("file")) == GOOD


def test_device_names(tmp_path: Path, device: Path) -> None:
    """A name that leads to no device costs its file alone; the next file asks again."""
    link, plain = tmp_path / "link", tmp_path / "plain"
    link.symlink_to(device)
    plain.touch()
    names: dict[str, Answer] = {
        "missing": device_name("/dev/no-such-device"),
        "regular": device_name(plain),
        "folder": device_name("/dev"),
        "relative": device_name(device.name),
        "empty": device_name(""),
        "unterminated": abi.DAXDEV_OUT.pack(0, bytes(device).ljust(256, b"x")),
        "error": -ENOENT,
        "another error": -ENOSYS,
        "short reply": device_name(device)[:-1],
        "symbolic link": device_name(link),
    }
    space = Space()
    files = {name: whole(space) for name in names} | {"later": whole(space)}
    script = Script(files, daxdevs=list(names.values()))
    with RawMount(tmp_path, script, dialect=PULL, device=device) as mount:
        found = apart(lambda: {name: look(mount.path(name)) for name in files})
        good = ("symbolic link", "later")
        assert found == {name: GOOD if name in good else BAD for name in files}
        assert opcodes(mount.call("seen")).count(GET_DAXDEV) == len(names)
        again = apart(lambda: {name: look(mount.path(name)) for name in files})
        assert again == {name: GOOD if name in good else BAD for name in files}


@pytest.mark.parametrize("dialect", [PULL, PUSH, STRIPES])
def test_remounts(tmp_path: Path, device: Path, dialect: str) -> None:
    """An unmount gives the device back."""
    for _ in range(5):
        with RawMount(tmp_path, {"file": whole(Space())}, dialect=dialect, device=device) as mount:
            assert apart(look, mount.path("file")) == GOOD
            assert failure(called, "umount2", bytes(mount.point), 0) == 0


def test_two_mounts(tmp_path: Path, device: Path) -> None:
    """Of two mounts that pull one device the first opener wins; the other one never gets it."""
    space = Space()
    files = {"one": whole(space), "two": whole(space)}
    with RawMount(tmp_path, files, dialect=PULL, device=device) as loser:
        with RawMount(tmp_path, files, dialect=PULL, device=device) as winner:
            assert apart(look, winner.path("one")) == GOOD
            assert apart(look, loser.path("one")) == BAD
            assert apart(look, winner.path("two")) == GOOD
        assert apart(lambda: [look(loser.path(name)) for name in files]) == [BAD] * 2


@pytest.mark.parametrize("keeper", ["mapping", "descriptor"])
def test_device_is_kept(tmp_path: Path, device: Path, keeper: str) -> None:
    """After a lazy unmount a mapping keeps the device, and so does a descriptor of /dev/famfs."""

    def client(out: int, into: int) -> None:
        mapped = Mapped(os.open(old.path("file"), os.O_RDWR), UNIT)
        os.write(into, b"x")
        os.read(out, 1)
        assert word(mapped.load(PAGE)) == mark(PAGE)

    with RawMount(tmp_path, {"file": whole(Space())}, device=device) as old:
        (out, there), (here, into) = os.pipe(), os.pipe()
        other = Client(client, here, there)
        os.read(out, 1)
        old.unmount()
        if keeper == "mapping":
            old.kill()
        else:
            os.write(into, b"x")
            other.result()
        with RawMount(tmp_path, {"file": whole(Space())}) as new:
            assert new.call("push", str(device)) == EBUSY
        if keeper == "mapping":
            os.write(into, b"x")
            other.result()
        else:
            old.kill()
        with RawMount(tmp_path, {"file": whole(Space())}, device=device) as new:
            assert apart(look, new.path("file")) == GOOD
        for fd in (out, there, here, into):
            os.close(fd)


# -- the ioctl that pushes (3)


def test_push_errors(tmp_path: Path, devices: list[Path], set_mode: SetMode) -> None:
    device, other = map(str, devices)
    plain = tmp_path / "plain"
    plain.touch()
    space = Space()
    files = {"first": whole(space), "second": whole(space), "third": File(simple((*space.run(), 1)), UNIT)}
    with RawMount(tmp_path, files, dialect=STRIPES, attached=False) as mount:

        def push(*arguments: Any) -> int:
            error: int = mount.call("push", *arguments)
            return error

        assert push(9999) == errno.EBADF
        assert push(str(plain), 0) == EINVAL
        assert push("/dev", 0, 0, os.O_RDONLY) == EINVAL
        assert push(device, 64) == EINVAL
        assert push(device, 1 << 40) == EINVAL
        assert push(device, 0, 1) == EINVAL
        # None of these has cost the slot. A descriptor for reading is enough, before the mount can be seen.
        assert push(device, 0, 0, os.O_RDONLY) == 0
        assert push(device, 0) == 0
        assert push(device, 1) == EBUSY
        assert push(other, 0) == EBUSY
        mount.call("attach", mount.point)
        assert apart(look, mount.path("first")) == GOOD
        # Slot 1 has not suffered from the device that another slot has.
        assert push(other, 1) == 0
        assert apart(look, mount.path("third")) == GOOD
        assert push("/dev/null", 63) == errno.ENODEV
        assert push("/dev/null", 63) == EIO

    set_mode(devices[1].name, "devdax")
    with RawMount(tmp_path, files) as mount:
        assert push(other, 0) == EOPNOTSUPP
        set_mode(devices[1].name, "fsdev")
        assert push(other, 0) == EIO
        assert push(device, 0) == EIO
        assert push(other, 1) == 0
    with RawMount(tmp_path, files) as mount:
        with RawMount(tmp_path, files, device=devices[0]):
            assert push(device, 0) == EBUSY
        assert push(device, 0) == EIO
        assert push(device, 2) == 0
        assert apart(look, mount.path("first")) == BAD


def test_push_in_vain(tmp_path: Path, device: Path) -> None:
    """Where there is no such ioctl, no mount, or no map was negotiated."""

    def unattached() -> int:
        fuse = os.open(kernels.MODULE.device, os.O_RDWR)
        fd = os.open(device, os.O_RDONLY)
        return failure(fcntl.ioctl, fuse, DAXDEV_OPEN, abi.BACKING_MAP.pack(fd, 0, 0))

    with RawMount(tmp_path, {}, dialect=PULL) as mount:
        assert mount.call("push", str(device)) == errno.ENOTTY
    for dialect, number in ((PULL, errno.ENOTTY), ("none", errno.ENOTTY), (PUSH, EPERM), (STRIPES, EPERM)):
        with parameters(dialect=dialect):
            assert (dialect, apart(unattached)) == (dialect, number)
    with RawMount(tmp_path, Script(bits=InitFlag.INIT_EXT)) as mount:
        assert mount.call("push", str(device)) == EOPNOTSUPP
    with RawMount(tmp_path, {}, rawio="never") as mount:
        assert mount.call("push", str(device)) == EOPNOTSUPP
    # None of them has taken the device.
    with RawMount(tmp_path, {}, device=device):
        pass


@pytest.mark.parametrize("dialect", [PUSH, STRIPES])
def test_missing_device(tmp_path: Path, device: Path, dialect: str) -> None:
    """A file that is opened before its device is pushed stays bad; others are good afterwards."""
    space = Space()
    files = {"early": whole(space), "late": whole(space)}
    with RawMount(tmp_path, files, dialect=dialect) as mount:
        assert apart(look, mount.path("early")) == BAD
        assert mount.call("push", str(device)) == 0
        assert apart(lambda: [look(mount.path(name)) for name in files]) == [BAD, GOOD]
        # Until its inode is evicted.
        mount.call("forget_name", "early")
        assert apart(look, mount.path("early")) == GOOD


# -- memory that fails (2.j)


@pytest.mark.parametrize("dialect", [PULL, PUSH])
def test_memory_failure(tmp_path: Path, device: Path, dialect: str) -> None:
    """Every file of the device is EHWPOISON once and then EIO; a new mount forgets it."""
    space = Space()
    files = {"bad": whole(space), "other": whole(space), "new": whole(space)}

    def client() -> bool:
        fd, other = (os.open(mount.path(name), os.O_RDWR) for name in ("bad", "other"))
        mapped, before = Mapped(fd, UNIT), Mapped(other, UNIT)
        mapped.load(0)
        before.load(0)
        if failure(mapped.advise, 100, 0, PAGE) == EINVAL:
            return False
        for number in (fd, other, os.open(mount.path("new"), os.O_RDWR)):
            found = [failure(os.pread, number, 8, PAGE) for _ in range(3)]
            assert found == [EHWPOISON, EIO, EIO]
            assert failure(Mapped, number, UNIT) == EIO
        # Who has the page of another file already is not told.
        assert word(before.load(0)) == mark(UNIT)
        return True

    with RawMount(tmp_path, files, dialect=dialect, device=device) as mount:
        if not apart(client):
            pytest.skip("this kernel cannot inject memory failures (CONFIG_MEMORY_FAILURE)")
    with RawMount(tmp_path, files, dialect=dialect, device=device) as mount:
        assert apart(lambda: [look(mount.path(name)) for name in files]) == [GOOD] * 3


# -- hazards: what a server must not do, and the module warns of (4)


Warned = Callable[..., None]


@pytest.fixture
def warned(kernel_log: KernelLog) -> Warned:
    """`warned(text, ...)` asserts that the kernel has warned with each text in the test so far, and of nothing else."""

    def check(*texts: str) -> None:
        lines = kernel_log.lines()
        # What a warning says stands above the line that names its place.
        said = [before for before, line in itertools.pairwise(lines) if "WARNING:" in line]
        assert [text for text in texts if not any(text in line for line in said)] == []
        assert [line for line in said if not any(text in line for text in texts)] == []
        assert [line for line in lines if ALARM.search(line) and not re.search("WARNING:|Call Trace", line)] == []

    return check


@pytest.mark.parametrize("dialect", [PULL, PUSH, STRIPES])
def test_two_maps_of_one_page(tmp_path: Path, device: Path, warned: Warned, dialect: str) -> None:
    """Reads and writes are coherent."""
    files = {
        "one": File(simple((0, 2 * UNIT)), 2 * UNIT),
        "two": File(simple((UNIT, 2 * UNIT)), 2 * UNIT),
        "self": File(simple((4 * UNIT, UNIT), (4 * UNIT, UNIT)), 2 * UNIT),
    }

    def client() -> None:
        one, two, itself = (os.open(mount.path(name), os.O_RDWR) for name in files)
        assert word(os.pread(one, 8, UNIT)) == word(os.pread(two, 8, 0)) == mark(UNIT)
        assert os.pwrite(one, b"both", UNIT + 8) == 4
        assert os.pread(two, 4, 8) == b"both"
        assert word(os.pread(itself, 8, 0)) == word(os.pread(itself, 8, UNIT)) == mark(4 * UNIT)

    with RawMount(tmp_path, files, dialect=dialect, device=device, strict="Y") as mount:
        apart(client)
    warned("two maps of one page")


def test_page_that_is_mapped_twice(tmp_path: Path, device: Path, warned: Warned) -> None:
    """With guard=1 the file that comes second cannot be mapped: without it, unmounting never ends."""
    files = {
        "one": File(simple((0, 2 * UNIT)), 2 * UNIT),
        "two": File(simple((UNIT, 2 * UNIT)), 2 * UNIT),
        "self": File(simple((4 * UNIT, UNIT), (4 * UNIT, UNIT)), 2 * UNIT),
    }

    def client() -> list[int]:
        def load(name: str, at: int) -> None:
            Mapped(os.open(mount.path(name), os.O_RDWR), 2 * UNIT).load(at)

        return [failure(load, name, at) for name in files for at in (0, UNIT)]

    with RawMount(tmp_path, files, device=device, strict="Y", guard="Y") as mount:
        assert apart(client) == [0, 0, EIO, EIO, EIO, EIO]
        for name in ("one", "two"):
            mount.call("forget_name", name)
        assert apart(lambda: Mapped(os.open(mount.path("two"), os.O_RDWR), UNIT).load(0)) == struct.pack(
            "<Q", mark(UNIT)
        )
    warned("two maps of one page")


def test_map_for_cached_pages(tmp_path: Path, device: Path, warned: Warned) -> None:
    """With guard=1 no file gets a map while a program uses its page cache; then the pages go, and the map counts."""
    script = Script(new_files={"file": File(simple((0, UNIT)), size=0, truncate=0)})

    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, UNIT)
        os.write(fd, b"x" * 2 * PAGE)
        assert open_close(path) == EBUSY
        mapped = Mapped(fd, UNIT)
        mapped.store(PAGE, b"changed!")
        os.close(fd)
        assert open_close(path) == EBUSY
        mapped.close()
        assert Opcode.WRITE in opcodes(mount.call("seen"))
        fd = os.open(path, os.O_RDWR)
        assert word(Mapped(fd, UNIT).load(PAGE)) == word(os.pread(fd, 8, PAGE)) == mark(PAGE)

    with RawMount(tmp_path, script, device=device, strict="Y", guard="Y") as mount:
        apart(client)
    warned("pages in the cache", "is mapped by a program")


def test_map_for_a_private_mapping(tmp_path: Path, device: Path, warned: Warned) -> None:
    """With guard=1 a private mapping of a file without a map counts as a use of the page cache, as it is one."""
    script = Script(new_files={"file": File(simple((0, UNIT)), size=0, truncate=0, open_flags=OpenFlag.DIRECT_IO)})

    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, UNIT)
        private = Mapped(fd, UNIT, flags=mmap.MAP_PRIVATE)
        private.store(PAGE, b"private!")
        assert open_close(path) == EBUSY
        assert (private.load(PAGE), private.load(2 * PAGE)) == (b"private!", bytes(8))
        os.close(fd)
        private.close()
        fd = os.open(path, os.O_RDWR)
        assert word(Mapped(fd, UNIT).load(PAGE)) == word(os.pread(fd, 8, PAGE)) == mark(PAGE)

    with RawMount(tmp_path, script, device=device, strict="Y", guard="Y") as mount:
        apart(client)
    warned("is mapped by a program", "pages in the cache")


def test_sent_before_the_map(tmp_path: Path, device: Path) -> None:
    """With guard=1 sendfile(2) and splice(2) out of a FOPEN_DIRECT_IO file leave no pages that its map would find."""
    script = Script(new_files={"file": File(simple((0, UNIT)), size=0, truncate=0, open_flags=OpenFlag.DIRECT_IO)})

    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, UNIT)
        out, into = os.pipe()
        assert (os.sendfile(into, fd, 0, 8), os.splice(fd, into, 8, offset_src=PAGE)) == (8, 8)
        assert os.read(out, 16) == bytes(16)
        second = os.open(path, os.O_RDWR)
        assert word(Mapped(second, UNIT).load(PAGE)) == word(os.pread(fd, 8, PAGE)) == mark(PAGE)

    with RawMount(tmp_path, script, device=device, strict="Y", guard="Y") as mount:
        apart(client)


@pytest.mark.parametrize("size", [0, PAGE, 3 * UNIT])
def test_map_of_another_size(tmp_path: Path, device: Path, warned: Warned, size: int) -> None:
    """The map's size becomes the file's, until the server is asked for attributes again."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        assert os.fstat(fd).st_size == 2 * UNIT
        assert word(os.pread(fd, 8, 2 * UNIT - PAGE)) == mark(2 * UNIT - PAGE)
        assert os.pread(fd, 8, 2 * UNIT) == b""
        mount.call("write", abi.inval_inode(mount.call("nodeid", "file"), -1, 0))
        assert os.fstat(fd).st_size == size
        assert [failure(os.pread, fd, 8, 0) for _ in range(3)] == [ENXIO, EIO, EIO]

    with RawMount(tmp_path, {"file": File(simple((0, 2 * UNIT)), size)}, device=device, strict="Y") as mount:
        apart(client)
    warned("bytes, by its map", "bytes, and by its map")


@pytest.mark.parametrize("size", [0, PAGE + 5, UNIT - 1, 3 * UNIT])
@pytest.mark.parametrize("cause", ["attributes", "truncate"])
def test_size_changes(tmp_path: Path, device: Path, warned: Warned, size: int, cause: str) -> None:
    """A file whose size changes is bad, also for those who have it mapped, until its inode is evicted."""

    def client() -> None:
        path = mount.path("file")
        fd = os.open(path, os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        mapped.load(0)
        mapped.store(PAGE, struct.pack("<Q", mark(PAGE)))
        if cause == "truncate":
            os.truncate(path, size)
        else:
            mount.call("change", "file", size=size)
            mount.call("write", abi.inval_inode(mount.call("nodeid", "file"), -1, 0))
            assert os.fstat(fd).st_size == size
        assert [failure(os.pread, fd, 8, 0) for _ in range(3)] == [ENXIO, EIO, EIO]
        assert failure(os.pwrite, fd, b"x", 0) == EIO
        assert failure(Mapped, fd, UNIT) == EIO
        assert failure(mapped.load, 0) == failure(mapped.load, PAGE) == EFAULT
        # The old size does not help.
        mount.call("change", "file", size=UNIT)
        mount.call("write", abi.inval_inode(mount.call("nodeid", "file"), -1, 0))
        assert os.fstat(fd).st_size == UNIT
        assert failure(os.pread, fd, 8, 0) == EIO

    with RawMount(tmp_path, {"file": whole(Space(), truncate=0)}, device=device, strict="Y", guard="Y") as mount:
        apart(client)
        mount.call("forget_name", "file")
        assert apart(look, mount.path("file")) == GOOD
    warned("bytes, and by its map")


def test_notify_store(tmp_path: Path, device: Path, warned: Warned) -> None:
    """Pages for a file with a map are refused."""

    def client() -> None:
        fd = os.open(mount.path("file"), os.O_RDWR)
        mapped = Mapped(fd, UNIT)
        mapped.load(0)
        for offset in (0, UNIT // 2, UNIT, 5 * UNIT):
            assert mount.call("store", "file", b"stored" * 1000, offset) == EINVAL
        assert word(mapped.load(PAGE)) == word(os.pread(fd, 8, PAGE)) == mark(PAGE)
        assert os.fstat(fd).st_size == UNIT

    with RawMount(tmp_path, {"file": whole(Space())}, device=device, strict="Y") as mount:
        apart(client)
    warned("gets pages by NOTIFY_STORE")


def test_notify_store_without_map(tmp_path: Path, device: Path) -> None:
    """With guard=1, where maps are negotiated, they are refused for every file: a map may come at the same time."""
    for bits, number in ((MAPPING, EINVAL), (InitFlag.INIT_EXT, 0)):
        with RawMount(tmp_path, Script({"file": whole(Space())}, bits=bits), guard="Y") as mount:
            apart(os.stat, mount.path("file"))
            assert mount.call("store", "file", b"stored" * 1000) == number


def test_size_after_a_map_of_none(tmp_path: Path, device: Path, warned: Warned) -> None:
    """A new file that MKNOD made and that got a map of size 0 is bad when its size is set."""
    script = Script(new_files={"new": File(simple((0, UNIT), size=0), truncate=0)}, errors={Opcode.CREATE: -ENOSYS})

    def client() -> None:
        fd = os.open(mount.path("new"), os.O_RDWR | os.O_CREAT)
        assert os.write(fd, b"x") == 0
        os.ftruncate(fd, UNIT)
        assert [failure(os.write, fd, b"x") for _ in range(3)] == [ENXIO, EIO, EIO]

    with RawMount(tmp_path, script, device=device, strict="Y") as mount:
        apart(client)
    warned("bytes, and by its map")
