# SPDX-License-Identifier: Apache-2.0
"""A worker dies: what it had in hand is sent again and done once, or ends with EIO where a kernel cannot send again.

The kernel here plays what a death leaves: a reply that was never written, or a worker that is killed while it writes.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct
from typing import Any

import pytest

from famfs_server.cli.status import render
from famfs_server.daemon.control_client import ControlClient, ControlError
from famfs_server.fuse.session import SessionRecord
from famfs_server.omf import layout
from tests.twin import trees
from tests.twin.connection import IN_HEADER, STOCK, Bit, Op
from tests.twin.kernel import Inode, OpenFile
from tests.twin.maps import Dialect
from tests.twin.server import Twin
from tests.twin.trees import Tree

READ = Struct("<QQIIQII")
MIB = 1 << 20
CREATE_FLAGS = os.O_RDWR | os.O_CREAT | 0x8000
OLD = STOCK & ~Bit.HAS_RESEND
"""What a kernel before 6.9 offers."""


@pytest.fixture
def tree(golden_image: Callable[[str, Path], Path], tmp_path: Path) -> Tree:
    return trees.of_volume(golden_image("03-interleaved", tmp_path))


@pytest.fixture(params=[None, Dialect.PULL, Dialect.PUSH], ids=["server", "pull", "push"])
def twin(request: pytest.FixtureRequest, tree: Tree) -> Iterator[Twin]:
    twin = Twin(tree.image, request.param, host=tree.host, metadata_end=tree.metadata_end)
    twin.mount()
    yield twin
    twin.kernel.require_silence()
    assert twin.end() == 0, twin.log()


def entry(payload: bytes) -> int:
    """The nodeid in the answer to LOOKUP, MKDIR or CREATE."""
    return int.from_bytes(payload[:8], "little")


def twice(twin: Twin, opcode: int, nodeid: int, body: bytes) -> bytes:
    """What a request is answered with that two workers have carried out, the first one without its reply."""
    kernel = twin.kernel
    unique = kernel.send(opcode, nodeid, body)
    kernel.lose(unique)
    twin.succeed()
    error, payload = kernel.receive(unique)
    assert error == 0, os.strerror(error)
    return payload


def test_mkdir_is_done_once(twin: Twin) -> None:
    kernel = twin.kernel
    node = entry(twice(twin, Op.MKDIR, 1, Struct("<II").pack(0o755, 0) + b"made\0"))
    assert kernel.resolve(b"made").nodeid == node
    assert [name for name, _ in kernel.names(kernel.root())].count(b"made") == 1
    # The same name from somebody else is another request.
    with pytest.raises(FileExistsError):
        kernel.mkdir(kernel.root(), b"made")
    after = kernel.mkdir(kernel.root(), b"next")
    assert after.nodeid == node + 1


def test_mkdir_of_a_name_that_was_there_fails_again(twin: Twin) -> None:
    kernel = twin.kernel
    kernel.mkdir(kernel.root(), b"made")
    unique = kernel.send(Op.MKDIR, 1, Struct("<II").pack(0o755, 0) + b"made\0")
    kernel.lose(unique)
    twin.succeed()
    assert kernel.receive(unique)[0] == errno.EEXIST


def test_create_is_done_once(twin: Twin) -> None:
    kernel = twin.kernel
    payload = twice(twin, Op.CREATE, 1, Struct("<4I").pack(CREATE_FLAGS, 0o644, 0, 0) + b"new\0")
    node = entry(payload)
    assert payload[136] & 1, "FOPEN_DIRECT_IO"
    body = Struct("<IIQQQQQQIIIIIIII").pack(0x48, 0, 0, 70_000, *[0] * 12)
    twice(twin, Op.SETATTR, node, body)
    twice(twin, Op.RELEASE, node, Struct("<QIIQ").pack(0, 0, 0, 0))
    assert kernel.resolve(b"new").size == 70_000
    assert [name for name, _ in kernel.names(kernel.root())].count(b"new") == 1


def test_order_of_messages(twin: Twin) -> None:
    """All that was in hand comes again in its order, each with the bit, and once."""
    kernel = twin.kernel
    uniques = [
        kernel.send(Op.MKDIR, 1, Struct("<II").pack(0o755, 0) + b"first\0"),
        kernel.send(Op.LOOKUP, 1, b"first\0"),
        kernel.send(Op.MKDIR, 1, Struct("<II").pack(0o755, 0) + b"second\0"),
    ]
    for unique in uniques:
        kernel.lose(unique)
    for _ in range(3):
        kernel.in_hand[:] = [unique for unique in uniques if not kernel.answered(unique)]
        twin.succeed()
    answers = [kernel.receive(unique) for unique in uniques]
    assert [error for error, _ in answers] == [0, 0, 0]
    first, looked_up, second = (entry(payload) for _, payload in answers)
    assert first == looked_up == second - 1


def test_map_that_was_in_hand(tree: Tree) -> None:
    twin = Twin(tree.image, Dialect.PULL, host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    node = kernel.resolve(b"striped_33m").nodeid
    before = kernel.fetch_fmap(node)
    assert twice(twin, Op.GET_FMAP, node, b"") == before
    assert twin.end() == 0


# -- what a kernel does not send again ---------------------------------------------------------------


def record_of(pid: int) -> SessionRecord:
    """The memory that a worker reads requests into."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "famfs-session" in os.readlink(link):
            return SessionRecord(os.open(link, os.O_RDWR))
    raise AssertionError("the worker has none")


def await_idle(record: SessionRecord) -> None:
    """A worker notes that a request is dealt with some time after its answer."""
    deadline = time.monotonic() + 20
    while record.in_hand:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def written(twin: Twin, lookups: int = 1) -> OpenFile:
    """Somebody who holds the inode that a file was made as, by a nodeid that the kernel knows; the file is logged."""
    kernel = twin.kernel
    file = kernel.openat(b"new", os.O_RDWR | os.O_CREAT)
    held = kernel.hold(file.inode)
    while file.inode.lookups < lookups:
        kernel.lookup(kernel.root(), b"new")
    kernel.write(file, 0, b"data")
    kernel.close_file(file)
    while b"new" in kernel.dentries:
        assert kernel.pump(kernel.timeout), "the kernel is not told of its name"
    return held


def is_known(twin: Twin, nodeid: int) -> bool:
    """Whether the server keeps a place for a nodeid that is not the log's."""
    error, _ = twin.kernel.receive(twin.kernel.send(Op.GETATTR, nodeid, bytes(16)))
    assert error in (0, errno.ESTALE)
    return error == 0


def dies_with_forget(twin: Twin, inode: Inode, count: int) -> None:
    """A worker is killed when it has read a FORGET and done nothing about it."""
    record = record_of(twin.worker)
    body = Struct("<Q").pack(count)
    unique = twin.kernel.send(Op.STATFS, 1, b"")
    assert twin.kernel.receive(unique)[0] == 0
    await_idle(record)
    request = IN_HEADER.pack(IN_HEADER.size + len(body), Op.FORGET, unique + 1000, inode.nodeid, 0, 0, 0, 0, 0) + body
    record.buffer[: len(request)] = request
    twin.succeed()
    os.close(record.fd)


def test_forget_that_was_in_hand_is_carried_out(twin: Twin) -> None:
    inode = written(twin).inode
    assert is_known(twin, inode.nodeid)
    dies_with_forget(twin, inode, inode.lookups)
    twin.kernel.lose_inode(inode)
    assert not is_known(twin, inode.nodeid)
    assert twin.kernel.lookup(twin.kernel.root(), b"new").nodeid < inode.nodeid


def test_forget_that_was_in_hand_is_carried_out_once(twin: Twin) -> None:
    held = written(twin, 4)
    inode = held.inode
    for _ in range(2):
        dies_with_forget(twin, inode, 1)
        inode.lookups -= 1
        twin.succeed()
        assert twin.kernel.getattr(inode).size == 4
    assert inode.lookups == 2
    twin.kernel.close_file(held)
    assert not is_known(twin, inode.nodeid)
    assert twin.kernel.lookup(twin.kernel.root(), b"new").nodeid < inode.nodeid


def test_lookup_that_was_in_hand_is_counted_once(twin: Twin) -> None:
    """The worker has counted it, and dies before it can answer."""
    kernel = twin.kernel
    file = kernel.openat(b"new", os.O_RDWR | os.O_CREAT)
    kernel.write(file, 0, b"data")
    provisional = file.inode.nodeid
    record = record_of(twin.worker)
    unique = kernel.send(Op.LOOKUP, 1, b"new\0")
    kernel.lose(unique)
    await_idle(record)
    record.done(0)
    assert record.in_hand == unique
    twin.succeed()
    error, payload = kernel.receive(unique)
    assert (error, entry(payload)) == (0, provisional)
    file.inode.lookups += 1
    kernel.close_file(file)
    while provisional in kernel.inodes:
        assert kernel.pump(kernel.timeout), "the kernel is not told of its name"
    assert not is_known(twin, provisional)
    assert kernel.lookup(kernel.root(), b"new").nodeid < provisional
    os.close(record.fd)


def test_open_that_waits_outlives_its_worker(twin: Twin) -> None:
    """Whoever opens a new file that somebody else has open still gets an answer, and does not count as an opener."""
    kernel = twin.kernel
    file = kernel.openat(b"new", os.O_RDWR | os.O_CREAT)
    kernel.write(file, 0, b"data")
    waiting = kernel.send(Op.OPEN, file.inode.nodeid, Struct("<II").pack(os.O_RDONLY, 0))
    assert kernel.receive(kernel.send(Op.STATFS, 1, b""))[0] == 0
    if not kernel.answered(waiting):
        kernel.in_hand.append(waiting)
    twin.succeed()
    assert kernel.receive(waiting)[0] == (errno.EBUSY if kernel.famfs else 0)
    if kernel.famfs:
        kernel.close_file(file)
        opened = kernel.openat(b"new")
        assert (opened.inode.size, kernel.read(opened, 0, 10)) == (4, b"data")


# -- kernels that cannot send again ------------------------------------------------------------------


def stuck(pid: int) -> bool:
    """Whether a thread of the process waits for room to write a reply."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return any("sock_alloc_send" in (task / "wchan").read_text() for task in tasks)


def status(twin: Twin) -> dict[str, Any]:
    """What the server says of itself, as soon as its worker listens."""
    client = ControlClient(os.fspath(twin.log_path.with_suffix(".run")))
    deadline = time.monotonic() + 20
    while True:
        try:
            return client.status()
        except ControlError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_reads_in_hand_end_with_eio(tree: Tree) -> None:
    """The worker is killed with replies that nobody takes: one is in hand, some have gone, some were never read."""
    twin = Twin(tree.image, None, offered=OLD, words=("fmap=never",), host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    node = kernel.resolve(b"striped_33m").nodeid
    expected = kernel.call(Op.READ, node, READ.pack(0, 0, MIB, 0, 0, 0, 0), exact=MIB)
    uniques = [kernel.send(Op.READ, node, READ.pack(0, 0, MIB, 0, 0, 0, 0)) for _ in range(30)]
    deadline = time.monotonic() + 20
    while not stuck(twin.worker):
        assert time.monotonic() < deadline, "the worker answers all of it"
        time.sleep(0.01)
    twin.succeed()
    answers = [kernel.receive(unique) for unique in uniques]
    failed = [number for number, (error, _) in enumerate(answers) if error]
    assert [answers[number] for number in failed] == [(errno.EIO, b"")]
    assert 0 < failed[0] < 29, "some before it and some behind it are served"
    assert {payload for error, payload in answers if not error} == {expected}
    assert "1 requests have ended with EIO" in twin.log()
    lines = list(render(status(twin)))
    assert [line for line in lines if line.startswith("  1 requests have ended with EIO")] != [], lines
    assert kernel.notifications == []
    twin.succeed()
    assert kernel.resolve(b"sd/odd").size == tree.files[b"sd/odd"].size
    assert "2 requests" not in twin.log()
    assert twin.end() == 0


def test_kernel_that_can_send_again_repeats_it(tree: Tree) -> None:
    twin = Twin(tree.image, None, words=("fmap=never",), host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    node = kernel.resolve(b"striped_33m").nodeid
    uniques = [kernel.send(Op.READ, node, READ.pack(0, 0, MIB, 0, 0, 0, 0)) for _ in range(30)]
    deadline = time.monotonic() + 20
    while not stuck(twin.worker):
        assert time.monotonic() < deadline, "the worker answers all of it"
        time.sleep(0.01)
    kernel.one_by_one = uniques
    twin.succeed()
    answers = [kernel.receive(unique) for unique in uniques]
    assert {error for error, _ in answers} == {0}
    assert len({payload for _, payload in answers}) == 1
    assert len(kernel.notifications) == 1
    assert twin.end() == 0


def test_volume_is_served_on_by_an_old_kernel(tree: Tree) -> None:
    """Without anything in hand a death costs nothing there either."""
    twin = Twin(tree.image, None, offered=OLD, words=("fmap=never",), host=tree.host, metadata_end=tree.metadata_end)
    kernel = twin.mount()
    for number in range(3):
        kernel.mkdir(kernel.root(), b"made%d" % number)
        twin.succeed()
    assert {b"made0", b"made1", b"made2"} <= {name for name, _ in kernel.names(kernel.root())}
    assert int.from_bytes(kernel.read(kernel.open(kernel.resolve(b".meta/.superblock")), 0, 8), "little") == (
        layout.SUPERBLOCK_MAGIC
    )
    assert twin.end() == 0
