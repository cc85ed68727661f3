# SPDX-License-Identifier: Apache-2.0
"""What a worker does by itself, beside answering; the rest of it is the twin's and the mount tier's."""

import os
from uuid import UUID

import pytest
import trio

from famfs_server.daemon import worker
from famfs_server.daemon.metafiles import MetaFiles
from famfs_server.dax.partial import PartialMemory
from famfs_server.errors import DeviceFaultError
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.session import SessionRecord
from famfs_server.omf import layout
from famfs_server.volume import namespace as ns
from famfs_server.volume.replay import Damage
from famfs_server.volume.volume import Volume
from memories import HOST, LOG_LENGTH, ScratchMemory, formatted, meta_files

OTHER = UUID(int=99)
SIZE = 1 << 30


def test_the_poll_finds_entries_and_another_file_system_with_as_many() -> None:
    memory = ScratchMemory()
    formatted(memory)
    client = FileSystem(Volume(memory, OTHER, "memory"), Settings(b"/run/here"))

    def make_directory() -> None:
        master = Volume(memory, HOST, "memory")
        master.mkdir(b"d", 0o755, 0, 0)
        master.close()

    async def look() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker._poll, client, 0.01)
                make_directory()
                while not client.namespace.lookup(ns.ROOT, b"d"):
                    await trio.sleep(0.01)
                memory.view[48:64] = bytes(range(16))
                while client.volume.stop is None:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    trio.run(look)
    assert client.volume.stop is not None
    assert client.volume.stop.damage is Damage.REPLACED
    assert client.namespace.replayed == 1
    client.volume.close()


def test_what_is_said_of_a_log_that_ends_early(caplog: pytest.LogCaptureFixture) -> None:
    memory = ScratchMemory()
    formatted(memory)
    master = Volume(memory, HOST, "memory")
    for name in (b"a", b"b"):
        master.mkdir(name, 0o755, 0, 0)
    master.close()

    def said(host: UUID) -> list[tuple[str, str]]:
        volume = Volume(memory, host, "memory")
        caplog.clear()
        worker._report_damage(volume)
        volume.close()
        return [(record.levelname, record.message) for record in caplog.records]

    assert said(HOST) == said(OTHER) == []
    place = layout.entry_offset(1)
    memory.view[place : place + 4] = bytes(4)
    ((level, message),) = said(HOST)
    assert level == "ERROR"
    assert message.startswith("memory: log entry 1: ")
    assert "nothing can be created" in message
    ((level, message),) = said(OTHER)
    assert level == "WARNING"
    assert message == "memory: log entry 1 of another host is not whole yet; it is shown once it is"
    place = layout.entry_offset(0)
    memory.view[place : place + 4] = b"\xff" * 4
    assert [level for level, _ in said(OTHER)] == ["ERROR"]


def files_of_a_mount_that_nobody_sees() -> MetaFiles:
    superblock, log = meta_files(SIZE)
    released, mounted = os.pipe()
    os.close(mounted)
    return MetaFiles(superblock, log, os.memfd_create("meta"), LOG_LENGTH, writable=True, released=released)


def memory_of(files: MetaFiles) -> PartialMemory:
    parts = ((files.superblock, layout.SUPERBLOCK_REGION), (files.log, LOG_LENGTH))
    return PartialMemory(parts, SIZE, writable=(False, True))


def test_what_was_closed_is_logged_before_the_log_is_let_go() -> None:
    files = files_of_a_mount_that_nobody_sees()
    memory, next_mount = memory_of(files), memory_of(files)
    data_at = layout.SUPERBLOCK_REGION + LOG_LENGTH
    space = os.memfd_create("space")
    os.truncate(space, SIZE - data_at)
    memory.show(data_at, SIZE - data_at, space)
    os.close(space)
    made = FileSystem(Volume(memory, HOST, "memory"), Settings(b"/run/here")).made
    node = made.create(ns.ROOT, b"written", 0o644, 0, 0)
    made.grow(node, 4, memoryview(b"data"))

    async def last_close() -> None:
        await trio.sleep(0.1)
        made.released(node)

    async def let_go() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(last_close)
                await worker._let_go(files, memory, None, lambda: made.in_use, lambda: True, SessionRecord.create())

    trio.run(let_go)
    again = Volume(next_mount, HOST, "memory")
    assert again.namespace.size[again.namespace.resolve(b"written")] == 4


def test_log_is_let_go_though_requests_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LAST_CLOSES_SECONDS", 0.1)
    files = files_of_a_mount_that_nobody_sees()
    memory = memory_of(files)

    async def let_go() -> None:
        with trio.fail_after(60):
            await worker._let_go(files, memory, None, lambda: False, lambda: False, SessionRecord.create())

    trio.run(let_go)
    with pytest.raises(DeviceFaultError):
        memory.read(layout.LOG_OFFSET, 8)
