# SPDX-License-Identifier: Apache-2.0
"""The twin itself: it refuses what running kernels refuse, and sees through every server that breaks a rule."""

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.twin import maps
from tests.twin.connection import (
    ATTR,
    ATTR_HEAD,
    ENTRY_HEAD,
    IN_HEADER,
    INIT_OUT,
    OPEN_OUT,
    OUT_HEADER,
    STOCK,
    Bit,
    Op,
)
from tests.twin.kernel import PUSH_ARGUMENT, PUSH_IOCTL, Device, FakeKernel
from tests.twin.maps import EXTENT, HEADER, INTERLEAVE, PMD, SIMPLE, STRIPED, Dialect, Extent, Map, TwinViolation

PULL, PUSH, BOTH = Dialect.PULL, Dialect.PUSH, Dialect.PUSH_INTERLEAVE
DEVICE_SIZE = 64 * PMD
METADATA_END = 5 * PMD


def simple(*extents: tuple[int, int, int], size: int = PMD, count: int | None = None, need: int | None = None) -> bytes:
    """A map of (device, offset, length) extents."""
    total = HEADER.size + EXTENT.size * len(extents)
    count = len(extents) if count is None else count
    header = HEADER.pack(0, 0, 1, SIMPLE, count, total if need is None else need, size, 0)
    return header + b"".join(EXTENT.pack(device, 0, *rest) for device, *rest in extents)


def striped(chunk: int, nbytes: int, *strips: tuple[int, int, int], size: int, count: int | None = None) -> bytes:
    """A map of one interleaved extent."""
    rows = b"".join(EXTENT.pack(device, 0, *rest) for device, *rest in strips)
    body = STRIPED.pack(len(strips) if count is None else count, chunk, nbytes, 0) + rows
    return HEADER.pack(0, 0, 1, INTERLEAVE, 1, HEADER.size + len(body), size, 0) + body


ONE = (0, 8 * PMD, PMD)
FOUR = tuple((0, (8 + 4 * number) * PMD, 3 * PMD) for number in range(4))
"""Strips of 6 MiB."""


@pytest.mark.parametrize(
    ("data", "pull", "push", "both"),
    [
        # data, and what each dialect makes of it: 0 or an errno (findings 2.b and 3, protocol 2.2).
        (simple(ONE), 0, 0, 0),
        (simple(ONE) + bytes(100), 0, 0, 0),
        (simple((0, PMD, 0), ONE), 0, 0, 0),
        (simple(ONE, size=0), 0, 0, 0),
        (b"", errno.EINVAL, errno.EIO, errno.EIO),
        (simple(ONE)[:31], errno.EINVAL, errno.EIO, errno.EIO),
        (simple(ONE)[:32], errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (simple(ONE)[:-1], errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (simple(), errno.ERANGE, errno.ERANGE, errno.ERANGE),
        (simple(*[ONE] * 32), 0, 0, 0),
        (simple(*[ONE] * 33), errno.ERANGE, 0, 0),
        (simple((1, PMD, PMD)), errno.EINVAL, errno.EINVAL, 0),
        (simple((64, PMD, PMD)), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (simple((0, 4096, PMD)), errno.EINVAL, errno.EINVAL, 0),
        (simple((0, 512, PMD)), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (simple((0, 0, PMD + 4096)), errno.EINVAL, errno.EINVAL, 0),
        (simple(ONE, size=PMD + 1), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (simple(ONE)[:4] + b"\7" + simple(ONE)[5:], errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (simple((0, (1 << 64) - PMD, PMD)), 0, 0, errno.EINVAL),
        (striped(PMD, 12 * PMD, *FOUR, size=12 * PMD), 0, errno.EINVAL, 0),
        (striped(2 * PMD, PMD, *FOUR, size=PMD), 0, errno.EINVAL, errno.EINVAL),
        (striped(4096, PMD, *FOUR, size=PMD), errno.EINVAL, errno.EINVAL, 0),
        (striped(0, PMD, *FOUR, size=PMD), TwinViolation, errno.EINVAL, errno.EINVAL),
        (striped(PMD, 0, *FOUR, size=PMD), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (striped(PMD, PMD, size=PMD), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (striped(PMD, PMD, *[ONE] * 33, size=PMD), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (striped(PMD, PMD, *FOUR, size=PMD, count=5), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (striped(PMD, 12 * PMD, *FOUR, size=12 * PMD + 1), errno.EINVAL, errno.EINVAL, errno.EINVAL),
        (striped(PMD, 13 * PMD, *FOUR, size=12 * PMD), 0, errno.EINVAL, errno.EINVAL),
    ],
)
def test_map_is_taken_as_kernels_take_it(data: bytes, pull: int | type[TwinViolation], push: int, both: int) -> None:
    for dialect, verdict in ((PULL, pull), (PUSH, push), (BOTH, both)):
        if verdict == 0:
            maps.parse(dialect, data)
        elif isinstance(verdict, int):
            with pytest.raises(OSError, match=r"\(") as refused:
                maps.parse(dialect, data)
            assert refused.value.errno == verdict, dialect
        else:
            with pytest.raises(verdict):
                maps.parse(dialect, data)


def test_offsets_resolve_as_in_the_kernels_example() -> None:
    """Chunks of 2 MiB, 4 strips, 24 MiB (protocol 6.4), and the same file unrolled."""
    found = maps.parse(PULL, striped(PMD, 12 * PMD, *FOUR, size=12 * PMD))
    assert found.resolve(0, 1) == Extent(0, FOUR[0][1], 1)
    assert found.resolve(4 << 20, 1) == Extent(0, FOUR[2][1], 1)
    assert found.resolve(15 << 20, 9 << 20) == Extent(0, FOUR[3][1] + (3 << 20), 1 << 20)
    chunks = [(0, FOUR[chunk % 4][1] + chunk // 4 * PMD, PMD) for chunk in range(12)]
    unrolled = maps.parse(PUSH, simple(*chunks, size=12 * PMD))
    for corner in range(0, 12 * PMD, PMD):
        for offset in {max(corner - 1, 0), corner, corner + 1}:
            assert found.resolve(offset, 5) == unrolled.resolve(offset, 5)
            # The fast path of push kernels for extents of one power of two.
            extent = unrolled.extents[offset >> 21]
            assert unrolled.resolve(offset, 1) == Extent(0, extent.offset + (offset & PMD - 1), 1)
    with pytest.raises(OSError, match="behind"):
        Map(PMD, (Extent(0, 0, 4096),), ()).resolve(4096, 1)


# -- servers that break rules ----------------------------------------------------------------------


def reply(unique: int, payload: bytes = b"", error: int = 0, *, claim: int | None = None) -> bytes:
    """A reply; `claim` is the length in its header, where that is a lie."""
    length = OUT_HEADER.size + len(payload)
    return OUT_HEADER.pack(length if claim is None else claim, -error, unique) + payload


def attr(nodeid: int, size: int, mode: int = 0o100644) -> bytes:
    """struct fuse_attr."""
    return ATTR.pack(nodeid, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def entry(nodeid: int, size: int = PMD, mode: int = 0o100644, valid: int = 60) -> bytes:
    """The answer to LOOKUP."""
    return ENTRY_HEAD.pack(nodeid, 0, valid, 60, 0, 0) + attr(nodeid, size, mode)


def init_out(flags: int = 0, high: int | None = None, *, minor: int = 38, max_write: int = 1 << 17) -> bytes:
    """The answer to INIT; bit 43 and INIT_EXT are in it."""
    high = Bit.DAX_FMAP >> 32 if high is None else high
    return INIT_OUT.pack(7, minor, 0, flags | Bit.INIT_EXT, 0, 0, max_write, 1, 0, 0, high, 0, 0)


def daxdev(name: bytes) -> bytes:
    """The answer to GET_DAXDEV."""
    return bytes(24) + name.ljust(256, b"\0")


Answer = Callable[[int, int], Sequence[bytes]]
"""The datagrams that answer a request, by its unique and its nodeid."""


def just(payload: bytes, error: int = 0) -> Answer:
    """An ordinary reply."""
    return lambda unique, nodeid: [reply(unique, payload, error)]


@contextmanager
def liar(
    image: Path,
    dialect: Dialect | None = PULL,
    lies: Mapping[str, Answer] = MappingProxyType({}),
    *,
    init: bool = True,
    timeout: float = 20,
    heard: list[tuple[Op, int]] | None = None,
) -> Iterator[FakeKernel]:
    """A kernel whose server has files 10 and 11 of 2 MiB, called `a` and `b`; `lies` replace answers by opcode, and
    `heard` gets what is asked."""
    truth: dict[str, Answer] = {
        "INIT": just(init_out()),
        "GETATTR": lambda unique, nodeid: [
            reply(
                unique,
                bytes(ATTR_HEAD.size) + attr(nodeid, 0 if nodeid == 1 else PMD, 0o40755 if nodeid == 1 else 0o100644),
            )
        ],
        "LOOKUP": just(entry(10)),
        "OPEN": just(OPEN_OUT.pack(0, 0, 0)),
        "GET_FMAP": just(simple(ONE)),
        "GET_DAXDEV": just(daxdev(os.fsencode(image))),
        "FLUSH": just(b"", errno.ENOSYS),
        "RELEASE": just(b""),
        "FORGET": lambda unique, nodeid: [],
    } | dict(lies)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        # The kernel may be gone before it has heard everything.
        with suppress(BrokenPipeError, ConnectionResetError):
            while request := theirs.recv(1 << 16):
                _, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(request)
                if heard is not None:
                    heard.append((Op(opcode), nodeid))
                for datagram in truth[Op(opcode).name](unique, nodeid):
                    theirs.send(datagram)

    thread = threading.Thread(target=serve)
    thread.start()
    device = Device(str(image))
    kernel = FakeKernel(ours, dialect, devices=[device], metadata_end=METADATA_END, timeout=timeout)
    try:
        if init:
            kernel.init()
            if dialect not in (None, PULL):
                with image.open("rb") as file:
                    assert kernel.register(0, file.fileno()) == 0
        yield kernel
    finally:
        kernel.close()
        thread.join()
        theirs.close()
        device.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "dax0.0"
    path.write_bytes(b"")
    os.truncate(path, DEVICE_SIZE)
    return path


def use_file(kernel: FakeKernel, silence: float = 0.1) -> None:
    """What a program does with one file. Nothing may come for `silence` seconds afterwards."""
    file = kernel.open(kernel.lookup(kernel.root(), b"a"))
    kernel.read(file, 0, 100)
    kernel.getattr(file.inode)
    kernel.close_file(file)
    kernel.forget(file.inode)
    kernel.require_silence(silence)


@pytest.mark.parametrize("dialect", [PULL, PUSH, BOTH])
def test_honest_server(dialect: Dialect, image: Path) -> None:
    with liar(image, dialect) as kernel:
        use_file(kernel)


LIES: dict[str, tuple[str, dict[str, Answer]]] = {
    "wrong length": ("pending", {"LOOKUP": lambda u, n: [reply(u, entry(10), claim=143)]}),
    "positive error": ("pending", {"LOOKUP": just(b"", -errno.EIO)}),
    "huge error": ("pending", {"LOOKUP": just(b"", 512)}),
    "error with payload": ("behind error", {"LOOKUP": just(b"x", errno.EIO)}),
    "long payload": ("129 bytes", {"LOOKUP": just(entry(10) + b"x")}),
    "short payload": ("103 bytes", {"GETATTR": just(bytes(103))}),
    "no reply": ("hangs", {"OPEN": lambda u, n: []}),
    "two replies": ("nobody waits", {"OPEN": lambda u, n: [reply(u, OPEN_OUT.pack(0, 0, 0))] * 2}),
    "reply to FORGET": ("nobody waits", {"FORGET": lambda u, n: [reply(u)]}),
    "EINTR": ("EINTR", {"GET_FMAP": just(b"", errno.EINTR)}),
    "NOTIFY_STORE": ("STORE", {"OPEN": lambda u, n: [reply(0, bytes(24), -4), reply(u, OPEN_OUT.pack(0, 0, 0))]}),
    "odd notification": ("notification 2", {"OPEN": lambda u, n: [reply(0, bytes(4), -2)]}),
    "size at LOOKUP": ("size", {"LOOKUP": just(entry(10, PMD - 1))}),
    "size in the map": ("size", {"GET_FMAP": just(simple(ONE, size=PMD - 1))}),
    "cached miss": ("missing for", {"LOOKUP": just(entry(0))}),
    "a link": ("mode", {"LOOKUP": just(entry(10, mode=0o120777))}),
    "the root again": ("nodeid 1", {"LOOKUP": just(entry(1))}),
    "FLUSH succeeds": ("FLUSH", {"FLUSH": just(b"")}),
    "in the log": ("superblock or log", {"GET_FMAP": just(simple((0, 4 * PMD, PMD)))}),
    "behind the device": ("behind the device", {"GET_FMAP": just(simple((0, DEVICE_SIZE, PMD)))}),
    "no fmap_size": ("fmap_size", {"GET_FMAP": just(simple(ONE, need=0))}),
    "empty extent": ("length 0", {"GET_FMAP": just(simple(ONE, (0, 9 * PMD, 0)))}),
    "overlap in itself": ("share pages", {"GET_FMAP": just(simple(ONE, ONE))}),
    "chunk 0": ("divides", {"GET_FMAP": just(striped(0, PMD, ONE, size=PMD))}),
    "short strip": ("behind a strip", {"GET_FMAP": just(striped(PMD, 3 * PMD, ONE, FOUR[1], size=3 * PMD))}),
    "nbytes": ("add up", {"GET_FMAP": just(striped(PMD, 1, ONE, size=PMD))}),
    "unterminated name": ("absolute", {"GET_DAXDEV": just(daxdev(b"/" * 256))}),
    "relative name": ("absolute", {"GET_DAXDEV": just(daxdev(b"dev/dax0.0"))}),
    "long GET_DAXDEV": ("281 bytes", {"GET_DAXDEV": just(daxdev(b"/dev/dax0.0") + b"x")}),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_seen(lie: str, image: Path) -> None:
    verdict, lies = LIES[lie]
    # Only silence takes the whole of its time.
    timeout = 0.3 if verdict == "hangs" else 20
    with liar(image, lies=lies, timeout=timeout) as kernel, pytest.raises(TwinViolation, match=verdict):
        use_file(kernel, silence=20)


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [
        ("72 bytes", init_out() + bytes(8)),
        ("8 bytes", init_out()[:8]),
        ("flags2", INIT_OUT.pack(7, 38, 0, 0, 0, 0, 4096, 1, 0, 0, Bit.DAX_FMAP >> 32, 0, 0)),
        ("not offered", init_out(high=1 << 1)),
        ("were negotiated", init_out(Bit.AUTO_INVAL_DATA)),
        ("were negotiated", init_out(Bit.ATOMIC_O_TRUNC)),
        ("writes of", init_out(max_write=512)),
    ],
    ids=["long", "short", "no INIT_EXT", "not offered", "AUTO_INVAL_DATA", "ATOMIC_O_TRUNC", "max_write"],
)
def test_bad_init_is_seen(verdict: str, answer: bytes, image: Path) -> None:
    with liar(image, lies={"INIT": just(answer)}, init=False) as kernel, pytest.raises(TwinViolation, match=verdict):
        kernel.init()


def test_refused_init(image: Path) -> None:
    with (
        liar(image, lies={"INIT": just(b"", errno.EPROTO)}, init=False) as kernel,
        pytest.raises(OSError, match="INIT") as refused,
    ):
        kernel.init()
    assert refused.value.errno == errno.ECONNREFUSED


def test_two_files_in_one_place(image: Path) -> None:
    """Two live inodes with one page, also when the first one is closed already, hang umount for good."""
    by_turns = iter((10, 11))
    with liar(image, lies={"LOOKUP": lambda unique, nodeid: [reply(unique, entry(next(by_turns)))]}) as kernel:
        kernel.close_file(kernel.open(kernel.lookup(kernel.root(), b"a")))
        other = kernel.lookup(kernel.root(), b"b")
        with pytest.raises(TwinViolation, match="share pages"):
            kernel.open(other)


def in_turn(*answers: Answer) -> Answer:
    """One after the other."""
    rest = iter(answers)
    return lambda unique, nodeid: next(rest)(unique, nodeid)


CREATED = just(entry(10, 0) + OPEN_OUT.pack(0, 1, 0))


def test_name_that_leads_to_another_inode(image: Path) -> None:
    """It is dropped and looked up once more; the old inode lives beside the new one as long as somebody has it open."""
    heard: list[tuple[Op, int]] = []
    lies = {"LOOKUP": in_turn(*map(just, (entry(10), entry(11), entry(11), entry(11))))}
    with liar(image, lies=lies, heard=heard) as kernel:
        old = kernel.hold(kernel.lookup(kernel.root(), b"a"))
        heard.clear()
        found = kernel.lookup(kernel.root(), b"a")
        assert kernel.lookup(kernel.root(), b"a") is found
        assert (found.nodeid, found.lookups, old.inode.lookups) == (11, 2, 1)
        assert kernel.inodes.keys() == {1, 10, 11}
        kernel.close_file(old)
        assert kernel.inodes.keys() == {1, 11}
        kernel.close_file(kernel.open(found))
    asked = [Op.LOOKUP, Op.FORGET, Op.LOOKUP, Op.LOOKUP, Op.FORGET, Op.OPEN, Op.GET_FMAP]
    assert [opcode for opcode, _ in heard if opcode is not Op.GETATTR][:7] == asked
    assert [nodeid for opcode, nodeid in heard if opcode is Op.FORGET] == [11, 10]


def test_name_that_is_missing_now(image: Path) -> None:
    heard: list[tuple[Op, int]] = []
    missing = just(b"", errno.ENOENT)
    with liar(image, lies={"LOOKUP": in_turn(just(entry(10)), missing, missing)}, heard=heard) as kernel:
        kernel.lookup(kernel.root(), b"a")
        heard.clear()
        with pytest.raises(FileNotFoundError):
            kernel.lookup(kernel.root(), b"a")
        assert kernel.inodes.keys() == {1}
    assert heard == [(Op.LOOKUP, 1), (Op.FORGET, 10), (Op.LOOKUP, 1)]


def test_second_nodeid_for_a_mapped_file(image: Path) -> None:
    with liar(image, lies={"LOOKUP": in_turn(just(entry(10)), just(entry(11)))}) as kernel:
        kernel.open(kernel.lookup(kernel.root(), b"a"))
        with pytest.raises(TwinViolation, match="was mapped as 10"):
            kernel.lookup(kernel.root(), b"a")


def test_names_are_looked_up_as_long_as_they_are_not_cached(image: Path) -> None:
    heard: list[tuple[Op, int]] = []
    for valid, lookups in ((60, 1), (0, 3)):
        heard.clear()
        with liar(image, lies={"LOOKUP": just(entry(10, valid=valid))}, heard=heard) as kernel:
            for _ in range(3):
                kernel.close_file(kernel.openat(b"a"))
        assert heard.count((Op.LOOKUP, 1)) == lookups
        assert heard.count((Op.OPEN, 10)) == heard.count((Op.RELEASE, 10)) == 3
        assert heard.count((Op.GET_FMAP, 10)) == heard.count((Op.FLUSH, 10)) == 1


@pytest.mark.parametrize(("times", "opened"), [(1, True), (2, False)])
def test_stale_file_is_opened_once_more(times: int, opened: bool, image: Path) -> None:
    """And each name is looked up then, cached or not."""
    heard: list[tuple[Op, int]] = []
    stale = just(b"", errno.ESTALE)
    lies = {"OPEN": in_turn(*[stale] * times, *[just(OPEN_OUT.pack(0, 0, 0))] * 2)}
    with liar(image, lies=lies, heard=heard) as kernel:
        kernel.lookup(kernel.root(), b"a")
        heard.clear()
        if opened:
            kernel.openat(b"a")
        else:
            with pytest.raises(OSError, match="Stale"):
                kernel.openat(b"a")
    asked = [opcode for opcode, _ in heard if opcode is not Op.GETATTR]
    assert asked[:3] == [Op.OPEN, Op.LOOKUP, Op.OPEN]
    assert (Op.GET_FMAP in asked) == opened


def test_no_release_once_an_open_was_not_implemented(image: Path) -> None:
    """Not even for files that were opened or made before."""
    heard: list[tuple[Op, int]] = []
    lies = {
        "CREATE": CREATED,
        "LOOKUP": just(entry(11)),
        "OPEN": in_turn(just(OPEN_OUT.pack(5, 0, 0)), just(b"", errno.ENOSYS)),
    }
    with liar(image, lies=lies, heard=heard) as kernel:
        made = kernel.create(kernel.root(), b"a")
        files = [kernel.openat(b"b"), kernel.openat(b"b"), kernel.openat(b"b"), made]
        for file in files:
            kernel.close_file(file)
        assert made.inode.opens == files[0].inode.opens == 0
    assert [opcode for opcode, _ in heard].count(Op.OPEN) == 2
    assert Op.RELEASE not in [opcode for opcode, _ in heard]


def test_map_for_the_inode_that_a_file_was_made_as(image: Path) -> None:
    with liar(image, lies={"CREATE": CREATED}) as kernel:
        made = kernel.create(kernel.root(), b"a")
        with pytest.raises(TwinViolation, match="made as this inode"):
            kernel.openat(b"a")
        assert made.inode.map is None


@pytest.mark.parametrize(
    ("answer", "verdict"), [(just(entry(10) + OPEN_OUT.pack(0, 0, 0)), "buffered"), (just(b"", errno.ENOSYS), "MKNOD")]
)
def test_dangerous_create(answer: Answer, verdict: str, image: Path) -> None:
    with liar(image, lies={"CREATE": answer}) as kernel, pytest.raises(TwinViolation, match=verdict):
        kernel.create(kernel.root(), b"a")


def test_push_asks_twice_for_a_large_map(image: Path) -> None:
    """The header alone first; a map that grows meanwhile, or is larger than 16 MiB, is refused."""
    extents = [(0, (8 + number % 50) * PMD, PMD) for number in range(300)]
    whole = simple(*extents, size=PMD)
    for answers, number in (
        ([whole[:32], whole], 0),
        ([whole[:64], whole], 0),
        ([whole[:32], simple(*extents[:10])], 0),
        ([whole[:32], simple(ONE, need=len(whole) + 1)], errno.EINVAL),
        ([simple(need=(16 << 20) + 1)], errno.EFBIG),
        ([whole[:31]], errno.EIO),
    ):
        by_turns = iter(answers)

        def answer(unique: int, nodeid: int, by_turns: Iterator[bytes] = by_turns) -> Sequence[bytes]:
            return [reply(unique, next(by_turns))]

        with liar(image, PUSH, {"GET_FMAP": answer}) as kernel:
            if number:
                with pytest.raises(OSError, match=r"\(") as refused:
                    kernel.fetch_fmap(10)
                assert refused.value.errno == number
            else:
                kernel.fetch_fmap(10)
            assert next(by_turns, None) is None
    with liar(image, PUSH, {"GET_FMAP": just(whole)}) as kernel, pytest.raises(TwinViolation, match="are due"):
        kernel.fetch_fmap(10)


def test_device_registration(image: Path, tmp_path: Path) -> None:
    """Errors of the push, and slots that stay lost (findings 3)."""
    with liar(image, PUSH) as kernel, image.open("rb") as dax, open("/dev/null", "rb") as null:
        assert kernel.register(0, dax.fileno()) == 0
        assert kernel.register(1, dax.fileno()) == errno.EBUSY
        assert kernel.register(64, dax.fileno()) == errno.EINVAL
        assert kernel.register(1, None) == errno.EBADF
        with pytest.raises(TwinViolation):
            kernel.register(1, null.fileno())
        kernel.slots.clear()
        kernel.devices[0].driver = "device_dax"
        assert kernel.register(0, dax.fileno()) == errno.EOPNOTSUPP
        kernel.devices[0].driver = "fsdev_dax"
        assert kernel.register(0, dax.fileno()) == errno.EIO
        with (tmp_path / "other").open("w+b") as other:
            assert kernel.register(2, other.fileno()) == errno.EINVAL
        assert kernel.ioctl(PUSH_IOCTL, PUSH_ARGUMENT.pack(-1, 0, 0), None) == -errno.EBADF
        assert kernel.ioctl(PUSH_IOCTL + 1, b"", None) == -errno.ENOTTY
    with liar(image) as kernel:
        assert kernel.ioctl(PUSH_IOCTL, PUSH_ARGUMENT.pack(-1, 0, 0), None) == -errno.ENOTTY


def test_stock_kernel_offers_no_famfs(image: Path) -> None:
    with liar(image, None, {"INIT": just(init_out(high=0))}) as kernel:
        assert kernel.offered == STOCK
        assert not kernel.famfs
