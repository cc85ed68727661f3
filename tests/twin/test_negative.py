# SPDX-License-Identifier: Apache-2.0
"""What no kernel should ask and what no file system can grant: the documented errno, and the server lives on."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct

import numpy as np
import pytest

from famfs_server.omf import append, layout, log
from famfs_server.omf.log import Fmap
from tests.twin import trees
from tests.twin.connection import IO_IN, Op
from tests.twin.kernel import Device, FakeKernel
from tests.twin.maps import PMD, Dialect
from tests.twin.server import Refused, Twin, mounted
from tests.twin.trees import Tree

CLIENT = trees.OTHER_DEVICE
"""A host UUID that is not the volume's."""

FIRST = layout.LOG_OFFSET + trees.LOG_LENGTH


@pytest.fixture
def tree(golden_image: Callable[[str, Path], Path], tmp_path: Path) -> Tree:
    return trees.of_volume(golden_image("03-interleaved", tmp_path))


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.value)
def kernel(request: pytest.FixtureRequest, tree: Tree) -> Iterator[FakeKernel]:
    words = (f"dialect={request.param.value}",)
    with mounted(tree.image, request.param, words=words, host=tree.host, metadata_end=tree.metadata_end) as kernel:
        yield kernel
        check_alive(kernel)


def check_alive(kernel: FakeKernel) -> None:
    kernel.require_silence(0.05)
    inode = kernel.resolve(b".meta/.superblock")
    opened = kernel.open(inode)
    assert kernel.read(opened, 0, 8) == layout.SUPERBLOCK_MAGIC.to_bytes(8, "little")
    kernel.close_file(opened)


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """Expect an error with one of these errnos."""
    with pytest.raises(OSError, match=r"\(") as error:
        yield
    assert error.value.errno in numbers, error.value


def fmap_request(kernel: FakeKernel) -> bytes:
    return b"" if kernel.dialect is Dialect.PULL else Struct("<II").pack(4096, 0)


# -- maps --------------------------------------------------------------------------------------------


def test_fmap_of_what_has_none(kernel: FakeKernel) -> None:
    directory = kernel.resolve(b"sd")
    for nodeid, number in (
        (1, errno.EISDIR),
        (directory.nodeid, errno.EISDIR),
        (0, errno.ESTALE),
        (2, errno.ESTALE),
        (1 << 62, errno.ESTALE),
        ((1 << 64) - 1, errno.ESTALE),
        (100_000, errno.ESTALE),
        (15_000, errno.ESTALE),
    ):
        with refused(number):
            kernel.fetch_fmap(nodeid)


def test_fmap_of_a_forgotten_file_is_its_own(kernel: FakeKernel, tree: Tree) -> None:
    """A nodeid means the same file for ever, so asking too late gets that file's map or an error, never another's."""
    inode = kernel.resolve(b"sd/odd")
    before = kernel.fetch_fmap(inode.nodeid)
    kernel.forget(inode)
    kernel.require_silence(0.05)
    assert kernel.fetch_fmap(inode.nodeid) == before


def test_fmap_request_of_wrong_length(kernel: FakeKernel) -> None:
    inode = kernel.resolve(b"sd/odd")
    for length in {0, 4, 8, 12, 16} - {len(fmap_request(kernel))}:
        with refused(errno.EINVAL):
            kernel.call(Op.GET_FMAP, inode.nodeid, bytes(length), most=4096)


def test_concurrent_first_opens(kernel: FakeKernel) -> None:
    """Two openers may ask at once; both get the same (protocol 2.1)."""
    inode = kernel.resolve(b"sd/odd")
    uniques = [kernel.send(Op.GET_FMAP, inode.nodeid, fmap_request(kernel)) for _ in range(5)]
    kernel.interrupt(uniques[0])
    kernel.interrupt(12_345_678)
    answers = {kernel.receive(unique) for unique in reversed(uniques)}
    assert len(answers) == 1
    assert answers.pop()[0] == 0


def test_get_daxdev(kernel: FakeKernel, tree: Tree) -> None:
    if kernel.dialect is not Dialect.PULL:
        with refused(errno.ENOSYS):
            kernel.call(Op.GET_DAXDEV, 0, exact=280)
        return
    assert kernel.call(Op.GET_DAXDEV, 0, exact=280)[24:].rstrip(b"\0") == os.fsencode(os.path.realpath(tree.image))
    for index in (1, 23, 24, 1 << 63, (1 << 64) - 1):
        with refused(errno.EINVAL):
            kernel.call(Op.GET_DAXDEV, index, exact=280)


# -- framing -----------------------------------------------------------------------------------------


def test_request_shorter_than_its_structure(kernel: FakeKernel) -> None:
    for opcode in (Op.LOOKUP, Op.GETATTR, Op.SETATTR, Op.READ, Op.WRITE, Op.READDIRPLUS, Op.CREATE, Op.MKDIR):
        with refused(errno.EINVAL):
            kernel.call(opcode, 1, b"", most=4096)


def test_request_that_claims_another_length(kernel: FakeKernel) -> None:
    for opcode in (Op.LOOKUP, Op.GETATTR, Op.GET_FMAP, Op.CREATE):
        for claim in (0, 41, 100, 1 << 31):
            error, _ = kernel.receive(kernel.send(opcode, 1, bytes(16), claim=claim))
            assert error == errno.EINVAL


def test_name_of_nothing(kernel: FakeKernel) -> None:
    for name in (b"sd", b"\0", b"sd/odd\0", b"s\0d\0"):
        with refused(errno.EINVAL, errno.ENOENT):
            kernel.call(Op.LOOKUP, 1, name, exact=128)
    for name in (b"..\0", b".\0", b"x" * 79 + b"\0", b"\xff\xfe\0"):
        with refused(errno.ENOENT):
            kernel.call(Op.LOOKUP, 1, name, exact=128)
    for name in (b"x" * 80 + b"\0", b"x" * 255 + b"\0"):
        with refused(errno.ENAMETOOLONG):
            kernel.call(Op.LOOKUP, 1, name, exact=128)


def test_unknown_opcode(kernel: FakeKernel) -> None:
    # 4096 is libfuse's own, for character devices.
    for opcode in (7, 19, 48, 49, 56, 63, 64, 255, 4096, 1 << 20, (1 << 32) - 1):
        for body in (b"", bytes(8), bytes(200)):
            with refused(errno.ENOSYS):
                kernel.call(opcode, 1, body, most=4096)


def test_destroy(tree: Tree) -> None:
    """Kernels send it for block devices alone, as the last request."""
    twin = Twin(tree.image, Dialect.PULL, host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    kernel.close_file(kernel.open(kernel.resolve(b"sd/odd")))
    assert kernel.call(38, 0, b"", exact=0) == b""
    assert twin.end() == 0
    assert "Traceback" not in twin.log()


def test_handles_that_nobody_has_given(tree: Tree) -> None:
    """Found by fuzzing: by way of pyfuse3 a listing goes by its handle, which is a number of the request."""
    words = ("fmap=never", "fastpath=off")
    with mounted(tree.image, None, words=words, host=tree.host) as kernel:
        file = kernel.resolve(b"sd/odd").nodeid
        for handle in (0, 40, 1 << 20, file, 1 << 62, (1 << 64) - 1):
            with refused(errno.ESTALE, errno.ENOTDIR, errno.ENOENT):
                kernel.call(Op.READDIRPLUS, 1, IO_IN.pack(handle, 0, 4096, 0, 0, 0, 0), most=4096)
        assert kernel.call(Op.RELEASE, file, Struct("<QIIQ").pack(1 << 62, 0, 0, 0)) == b""
        assert sorted(name for name, _ in kernel.listing(kernel.root()))[:2] == [b".", b".."]
    assert "nobody foresaw" not in tree.image.with_suffix(".log").read_text()


def test_forget_of_anything(kernel: FakeKernel) -> None:
    pair = Struct("<QQ")
    for nodeid in (0, 1, 17, 1 << 62, (1 << 64) - 1):
        kernel.send(Op.FORGET, nodeid, Struct("<Q").pack(1 << 40), no_reply=True)
        kernel.send(Op.FORGET, nodeid, b"", no_reply=True)
        kernel.send(Op.BATCH_FORGET, 0, Struct("<II").pack(1, 0) + pair.pack(nodeid, 3), no_reply=True)
    kernel.send(Op.BATCH_FORGET, 0, Struct("<II").pack(1 << 31, 0), no_reply=True)
    kernel.send(Op.BATCH_FORGET, 0, b"", no_reply=True)
    kernel.forget(kernel.resolve(b"striped_32m"), kernel.resolve(b"sd/odd"))


# -- changes that nobody can make ---------------------------------------------------------------------


def test_truncating_open_keeps_the_file(kernel: FakeKernel, tree: Tree) -> None:
    inode = kernel.resolve(b"sd/odd")
    with refused(errno.EPERM):
        kernel.open(inode, os.O_RDWR | os.O_TRUNC)
    assert kernel.getattr(inode).size == tree.files[b"sd/odd"].size
    with refused(errno.EPERM):
        kernel.setattr(inode, 0x248, size=0)
    with refused(errno.EPERM):
        kernel.setattr(inode, 8, size=inode.size + 1)
    assert kernel.setattr(inode, 8, size=inode.size).size == inode.size
    kernel.close_file(kernel.open(inode))


def test_client_may_change_nothing(tree: Tree) -> None:
    with mounted(tree.image, Dialect.PULL, host=CLIENT, metadata_end=tree.metadata_end) as kernel:
        inode = kernel.resolve(b"sd/odd")
        with refused(errno.EROFS):
            kernel.open(inode, os.O_RDWR | os.O_TRUNC)
        with refused(errno.EROFS):
            kernel.mkdir(kernel.root(), b"new")
        with refused(errno.EROFS):
            kernel.create(kernel.root(), b"new")
        with refused(errno.EROFS):
            kernel.setattr(inode, 1, mode=0o600)
        opened = kernel.open(inode, os.O_RDWR)
        assert kernel.write(opened, 5, b"data") == 4
        assert kernel.read(opened, 4, 6)[1:5] == b"data"
        check_alive(kernel)


def test_change_that_the_format_has_no_words_for(kernel: FakeKernel) -> None:
    for opcode, body in (
        (8, Struct("<4I").pack(0o100644, 0, 0, 0) + b"new\0"),
        (6, b"new\0target\0"),
        (10, b"striped_32m\0"),
        (11, b"sd\0"),
        (12, Struct("<Q").pack(1) + b"striped_32m\0new\0"),
        (45, Struct("<QII").pack(1, 0, 0) + b"striped_32m\0new\0"),
        (13, Struct("<Q").pack(17) + b"new\0"),
    ):
        with refused(errno.EPERM):
            kernel.call(opcode, 1, body, most=4096)
    kernel.resolve(b"striped_32m")


def test_new_directory_is_there_at_once(kernel: FakeKernel) -> None:
    made = kernel.mkdir(kernel.resolve(b"sd"), b"sub", 0o777)
    assert made.attr.mode == 0o40755
    assert b"sub" in dict(kernel.names(kernel.resolve(b"sd")))
    assert made.path in {inode.path for inode in kernel.walk()}


def test_listings_in_pieces_of_any_size(kernel: FakeKernel) -> None:
    directory = kernel.resolve(b"sd")
    whole = list(kernel.names(directory))
    assert [name for name, _ in kernel.listing(directory)] == [name for name, _ in whole]
    for size in (200, 256, 333, 1000):
        assert list(kernel.names(directory, size)) == whole
        assert [name for name, _ in kernel.listing(directory, size)] == [name for name, _ in whole]


@pytest.mark.parametrize("path", [b"", b"sd"])
def test_listing_from_every_place_in_it(kernel: FakeKernel, path: bytes) -> None:
    directory = kernel.resolve(path)
    whole = list(kernel.names(directory))
    # `.` and `..` have the cookies 1 and 2, all others their nodeids (decisions 2).
    cookies = [0, 1, 2, *(ino for _, ino in whole[2:])]
    for at, cookie in enumerate(cookies):
        for size in (200, 4096):
            assert list(kernel.names(directory, size, cookie)) == whole[at:]
            assert [name for name, _ in kernel.listing(directory, size, cookie)] == [name for name, _ in whole[at:]]


# -- media and devices ---------------------------------------------------------------------------------


def hostile_image(path: Path) -> Path:
    """Files that must stay invisible, and one good one among them."""

    def extent(offset: int, length: int = PMD) -> log.Extent:
        return log.Extent(0, offset, length)

    good = extent(FIRST + 10 * PMD)
    bad = {
        b"zero chunk": Fmap((extent(FIRST), extent(FIRST + PMD)), PMD),
        b"17 strips": Fmap(tuple(extent(FIRST + n * PMD) for n in range(16)), PMD),
        b"strip beyond": Fmap((extent(FIRST), extent(4 << 30)), PMD),
        b"wraps": Fmap((extent((1 << 64) - PMD, 2 * PMD),)),
        b"in the log": Fmap((extent(layout.LOG_OFFSET),)),
        b"in the superblock": Fmap((extent(0),)),
        b"across the log": Fmap((extent(FIRST - PMD, 2 * PMD),)),
        b"beyond": Fmap((extent((4 << 30) - PMD, 2 * PMD),)),
        b"overlap": Fmap((extent(FIRST + 9 * PMD, 2 * PMD),)),
        b"overlaps itself": Fmap((extent(FIRST), extent(FIRST))),
        b"device 7": Fmap((log.Extent(7, FIRST, PMD),)),
        b"no bytes": Fmap((extent(FIRST, 0),)),
        b"misaligned": Fmap((extent(FIRST + 4096),)),
    }
    device = trees.empty(path, 4 << 30)
    entries = [log.build_file(0, b"good", size=PMD, mode=0o644, uid=0, gid=0, fmap=Fmap((good,)))]
    for index, (name, fmap) in enumerate(bad.items(), 1):
        entry = bytearray(log.build_file(index, name, size=PMD, mode=0o644, uid=0, gid=0, fmap=fmap))
        record = np.frombuffer(entry, layout.LOG_ENTRY, count=1)
        striped = record[0]["file"]["fm_fmap"]["ie"][0]
        if name == b"zero chunk":
            striped["ie_chunk_size"] = 0
        if name == b"17 strips":
            striped["ie_nstrips"] = 17
        record[0]["crc"] = layout.crc(bytes(entry)[: layout.LOG_ENTRY_CRC_SPAN])
        entries.append(bytes(entry))
    append.append(device.memory(), 0, b"".join(entries))
    device.close()
    return path


@pytest.mark.parametrize("dialect", Dialect)
def test_hostile_maps_never_reach_the_kernel(dialect: Dialect, tmp_path: Path) -> None:
    """Whatever the log says; asking by nodeid, past the names, gets nothing either."""
    image = hostile_image(tmp_path / "dax.img")
    words = (f"dialect={dialect.value}",)
    with mounted(image, dialect, words=words, host=trees.MASTER, metadata_end=FIRST) as kernel:
        files = [inode for inode in kernel.walk() if not inode.is_directory]
        assert [inode.path for inode in files if inode.path[0] != ord(".")] == [b"good"]
        for inode in files:
            kernel.close_file(kernel.open(inode))
        good = kernel.resolve(b"good").nodeid
        for nodeid in range(good + 1, good + 20):
            with refused(errno.ESTALE):
                kernel.fetch_fmap(nodeid)
        check_alive(kernel)


def test_map_too_large_for_the_dialect(tmp_path: Path) -> None:
    """1.4 TiB in chunks of 2 MiB need 700,000 extents; push kernels take 16 MiB of them, pull kernels the strips."""
    size = 1400 << 30
    image = tmp_path / "dax.img"
    device = trees.empty(image, 3 << 40)
    strips = tuple(log.Extent(0, FIRST + number * (701 << 30), 700 << 30) for number in range(2))
    fmap = Fmap(strips, PMD)
    entry = log.build_file(0, b"huge", size=size, mode=0o644, uid=0, gid=0, fmap=fmap)
    append.append(device.memory(), 0, entry)
    device.close()
    twin = Twin(image, Dialect.PUSH, words=("dialect=push",), host=trees.MASTER, metadata_end=FIRST)
    kernel = twin.mount()
    with refused(errno.EOPNOTSUPP):
        kernel.open(kernel.resolve(b"huge"))
    check_alive(kernel)
    assert "huge cannot be mapped" in twin.log()
    assert twin.end() == 0
    with mounted(image, Dialect.PULL, words=("dialect=pull",), host=trees.MASTER, metadata_end=FIRST) as kernel:
        opened = kernel.open(kernel.resolve(b"huge"))
        assert kernel.write(opened, size - 3, b"end!") == 3
        assert kernel.read(opened, size - 4, 9) == b"\0end"
    image.unlink()


@pytest.mark.parametrize("cut", ["in the middle", "at the end"])
def test_image_that_is_shorter_than_the_volume(cut: str, tree: Tree) -> None:
    """The device has shrunk: what lies or reaches behind its end is refused, the rest is served."""
    ends = sorted(e.offset + e.length for file in tree.files.values() for e in file.map.ranges())
    end = ends[-1 if cut == "at the end" else len(ends) // 2] - PMD
    os.truncate(tree.image, end)
    with mounted(tree.image, Dialect.PULL, host=tree.host, metadata_end=tree.metadata_end) as kernel:
        behind = {
            path for path, file in tree.files.items() if any(e.offset + e.length > end for e in file.map.ranges())
        }
        assert behind
        assert behind != tree.files.keys()
        for path in tree.files:
            if path in behind:
                with refused(errno.EOPNOTSUPP):
                    kernel.open(kernel.resolve(path))
            else:
                kernel.close_file(kernel.open(kernel.resolve(path)))


@pytest.mark.parametrize("what", ["held", "device_dax", ""])
def test_device_that_the_kernel_cannot_have(what: str, tree: Tree) -> None:
    """Pull: every open works, every access is EIO, and the server neither hangs nor dies."""
    device = Device(os.path.realpath(tree.image))
    if what == "held":
        device.held = True
    else:
        device.driver = what
    with mounted(tree.image, Dialect.PULL, host=tree.host, devices=[device], metadata_end=tree.metadata_end) as kernel:
        for path in (b"sd/odd", b"striped_32m"):
            opened = kernel.open(kernel.resolve(path))
            with refused(errno.EIO):
                kernel.read(opened, 0, 1)
        device.held, device.driver = False, "fsdev_dax"
        with refused(errno.EIO):
            kernel.read(kernel.open(kernel.resolve(b"sd/eight")), 0, 1)


def test_device_name_that_the_kernel_finds_later(tree: Tree) -> None:
    """A name that leads nowhere is asked for again by the next file, which then works."""
    device = Device(os.path.realpath(tree.image))
    with mounted(tree.image, Dialect.PULL, host=tree.host, devices=[], metadata_end=tree.metadata_end) as kernel:
        lost = kernel.open(kernel.resolve(b"sd/odd"))
        with refused(errno.EIO):
            kernel.read(lost, 0, 1)
        kernel.devices.append(device)
        assert len(kernel.read(kernel.open(kernel.resolve(b"sd/eight")), 0, 10)) == 10
        kernel.slots.clear()
    device.close()


def test_late_push(tree: Tree) -> None:
    """A file opened before its device was registered stays bad until it is evicted; others work."""
    twin = Twin(tree.image, Dialect.PUSH, push=False, host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    early = kernel.open(kernel.resolve(b"sd/odd"))
    with refused(errno.EIO):
        kernel.read(early, 0, 1)
    with tree.image.open("rb") as file:
        assert kernel.register(0, file.fileno()) == 0
    with refused(errno.EIO):
        kernel.read(early, 0, 1)
    assert len(kernel.read(kernel.open(kernel.resolve(b"sd/eight")), 0, 10)) == 10
    kernel.close_file(early)
    kernel.forget(early.inode)
    assert len(kernel.read(kernel.open(kernel.resolve(b"sd/odd")), 0, 10)) == 10
    assert twin.end() == 0


@pytest.mark.parametrize(
    ("held", "driver", "line"),
    [(True, "fsdev_dax", "another mount holds the device"), (False, "device_dax", "not bound to fsdev_dax")],
)
def test_refused_push_fails_the_mount(held: bool, driver: str, line: str, tree: Tree) -> None:
    device = Device(os.path.realpath(tree.image), driver, held)
    twin = Twin(tree.image, Dialect.PUSH, host=tree.host, devices=[device])
    with pytest.raises(Refused, match=line):
        twin.mount()
    assert twin.end() == 0


def test_kernel_that_negotiates_maps_and_reads_instead(kernel: FakeKernel, tree: Tree) -> None:
    """The watchdog: such a kernel is served, not coherent with other hosts, and the log says so once."""
    inode = kernel.resolve(b"striped_33m")
    body = Struct("<QQIIQII").pack(0, 0, 4096, 0, 0, 0, 0)
    answers = {kernel.call(Op.READ, inode.nodeid, body, most=4096) for _ in range(3)}
    opened = kernel.open(inode)
    assert answers == {kernel.read(opened, 0, 4096)}
    written = kernel.call(Op.WRITE, inode.nodeid, Struct("<QQIIQII").pack(0, 4000, 4, 0, 0, 0, 0) + b"abcd", exact=8)
    assert written[:4] == b"\4\0\0\0"
    assert kernel.read(opened, 4000, 4) == b"abcd"
    assert tree.image.with_suffix(".log").read_text().count("negotiated extent maps but sends reads") == 1


def test_kernel_that_reads_instead_can_be_refused(tree: Tree) -> None:
    twin = Twin(tree.image, Dialect.PULL, words=("watchdog=eio",), host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    inode = kernel.resolve(b"striped_33m")
    body = Struct("<QQIIQII").pack(0, 0, 4, 0, 0, 0, 0)
    for _ in range(2):
        with refused(errno.EIO):
            kernel.call(Op.READ, inode.nodeid, body, most=4096)
    with refused(errno.EIO):
        kernel.call(Op.WRITE, inode.nodeid, body + b"abcd", exact=8)
    assert twin.log().count("negotiated extent maps but sends reads") == 1
    check_alive(kernel)
    assert twin.end() == 0


def test_open_that_is_always_asked_for(tree: Tree) -> None:
    """`no_open=off`: the server sees every open, and can refuse one."""
    words = ("no_open=off", "dialect=pull")
    with mounted(tree.image, Dialect.PULL, words=words, host=tree.host, metadata_end=tree.metadata_end) as kernel:
        for _ in range(2):
            kernel.close_file(kernel.open(kernel.resolve(b"sd/odd")))
        assert not kernel.no_open
        with refused(errno.EPERM):
            kernel.open(kernel.resolve(b".meta/.log"), os.O_RDWR)
