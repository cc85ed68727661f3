# SPDX-License-Identifier: Apache-2.0
"""Damaged media: superblock and log bytes through everything that reads them.

Whatever they hold, a reader either refuses them in words (FamfsError) or shows what a plain reading of the rules shows,
and fsck says so where anything is not shown.
"""

import json
import random
from collections import Counter
from collections.abc import Callable

from agreement import check_agreement, check_names, check_places, check_space, shown
from famfs_server.errors import FamfsError
from famfs_server.omf import layout, log, superblock
from famfs_server.volume import check, repair
from famfs_server.volume.namespace import Namespace
from famfs_server.volume.replay import Replay
from famfs_server.volume.space import Interleave, Space
from famfs_server.volume.volume import NewFile, Volume
from golden import GoldenImages, folder
from hostile import MIB, UNIT, Mutator, random_log
from memories import HOST, ScratchMemory, formatted

_BASES = ("11-bad-entries", "02-tree", "03-interleaved", "09-add-daxdev", "05-bad-entry-crc", "07c-counters-disagree")
_GENERATED = 300
"""Logs that are made up, by their numbers."""
_USED = 256 << 10
"""Bytes at the start of the log that cases use: what one leaves there must not be seen by the next."""


class Images:
    """Mutated golden images and generated logs, opened, followed, checked and written to."""

    def __init__(self) -> None:
        self._memory = ScratchMemory(16 << 30)
        formatted(self._memory)
        self._superblock = self._memory.read(0, layout.SUPERBLOCK.itemsize)
        self._header = self._memory.read(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE)
        self._generated: dict[str, tuple[bytes, bytes, int]] = {}
        images = GoldenImages(folder())
        self._golden = []
        for name in images.names:
            if name in _BASES:
                pieces = images.piece(name, "sb"), images.piece(name, "log")
                self._golden.append((*pieces, len(images.facts(name)["entries"])))

    def case(self, rng: random.Random) -> Counter[str]:
        """One image, and sometimes another that replaces it while it is open."""
        counts: Counter[str] = Counter(images=1)
        mutate = self._mutator(rng)
        self._store(*mutate())
        self._judge_parts()
        try:
            volume = Volume(self._memory, HOST if rng.random() < 0.8 else None, "memory")
        except FamfsError:
            counts["refused"] = 1
            try:
                check.examine(self._memory, "memory", HOST)
            except FamfsError:
                return counts
            raise AssertionError("fsck accepts what cannot be opened") from None
        try:
            expected = check_names(volume, self._memory)
            check_places(volume, self._memory)
            roll = rng.random()
            if roll < 0.3:
                self._check_fsck(volume)
            elif roll < 0.5:
                check_space(volume, expected)
            elif roll < 0.65:
                self._check_careful_replay(volume)
            elif roll < 0.85:
                self._write(volume, rng)
                counts["written to"] = 1
            else:
                self._follow(volume, mutate, rng)
                counts["changed while open"] = 1
        finally:
            volume.close()
        return counts

    def _mutator(self, rng: random.Random) -> Callable[[], tuple[bytes, bytes]]:
        if self._golden and rng.random() < 0.6:
            return Mutator(rng, *rng.choice(self._golden)).next
        name = f"log {rng.randrange(_GENERATED)}"
        if name not in self._generated:
            source = random.Random(name)
            entries = random_log(source, source.choice((1, 5, 20, 60)))
            counters = len(entries).to_bytes(8, "little")
            data = self._header[: layout.NEXT_SEQNUM_OFFSET] + counters + counters + b"".join(entries)
            self._generated[name] = self._superblock, data, len(entries)
        return Mutator(rng, *self._generated[name]).next

    def _store(self, sb: bytes, data: bytes) -> None:
        view = self._memory.view
        view[: 1 << 12] = sb.ljust(1 << 12, b"\0")[: 1 << 12]
        view[layout.LOG_OFFSET : layout.LOG_OFFSET + _USED] = data.ljust(_USED, b"\0")[:_USED]

    def _judge_parts(self) -> None:
        """The functions that decode, by themselves: they never raise anything but MediaError."""
        found = superblock.inspect(self._memory.read(0, layout.SUPERBLOCK.itemsize))
        assert (found.state is superblock.SuperblockState.VALID) == (found.problem == "")
        assert "\n" not in found.problem
        header = self._memory.read(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE)
        if found.superblock is not None:
            try:
                log.decode_header(header, found.superblock.log_length)
            except FamfsError as error:
                _require_one_line(error)

    def _check_fsck(self, volume: Volume) -> None:
        """fsck says something where replay did not show everything, and its words can be printed."""
        report = check.examine(self._memory, "memory", HOST)
        faults = volume.namespace.faults()
        assert (report.stop is None) == (volume.stop is None)
        assert report.skipped_count == sum(map(len, faults.values()))
        if volume.stop is not None or faults:
            assert not report.clean
        for line in check.render(report, human=True, verbose=1):
            assert line.isprintable(), line
        json.dumps(report.as_dict())
        report.buckets(8)
        assert 0 <= report.free <= report.capacity
        try:
            repair.plan(self._memory, report, torn=True)
        except FamfsError as error:
            _require_one_line(error)

    def _check_careful_replay(self, volume: Volume) -> None:
        """Entry by entry the log shows the same as in bulk."""
        sb = volume.superblock
        tree = Namespace.create(volume.last_index + 1, sb.log_length, None, volume=1)
        try:
            replay = Replay(tree, Space(volume.log_end, sb.device_size, sb.alloc_unit), bulk=False)
            header = log.decode_header(self._memory.read(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), sb.log_length)
            stops = list(replay.run(self._memory, header.next_index, block=7))
            assert (stops[-1] if stops else None) == volume.stop
            other = volume.namespace
            assert list(tree.walk()) == list(other.walk())
            assert tree.faults() == other.faults()
            for node in tree.walk():
                assert (tree.path(node), tree.size[node], tree.mode[node]) == (
                    other.path(node),
                    other.size[node],
                    other.mode[node],
                )
                assert tree.fmap(node) == other.fmap(node)
        finally:
            tree.close()

    def _write(self, volume: Volume, rng: random.Random) -> None:
        """Files and directories made on top of the damage: they are there afterwards, and nothing else has changed."""
        before = shown(volume)
        made = set()
        for number in range(rng.randrange(1, 5)):
            path = b"new%d" % number if rng.random() < 0.8 else rng.choice((b"a/new", b"x/y/z", b"..", b"n" * 90))
            try:
                if rng.random() < 0.3:
                    volume.mkdir(path, 0o700, 5, 6)
                else:
                    striped = Interleave(2, 2, UNIT) if rng.random() < 0.2 else None
                    node = volume.create(NewFile(path, rng.choice((1, 5000, 9000)), 0o600, 5, 6, striped))
                    volume.write(node, 0, memoryview(b"bytes")[: volume.namespace.size[node]])
            except FamfsError as error:
                _require_one_line(error)
            else:
                made.add(path)
        after = shown(volume)
        assert after.keys() == before.keys() | made
        assert all(after[path] == node for path, node in before.items())
        again = Volume(self._memory, HOST, "memory")
        try:
            assert shown(again) == after
            check_agreement(again, self._memory)
        finally:
            again.close()

    def _follow(self, volume: Volume, mutate: Callable[[], tuple[bytes, bytes]], rng: random.Random) -> None:
        """The media change under an open volume; what it has shown it goes on to show."""
        before = shown(volume)
        for _ in range(rng.randrange(1, 4)):
            self._store(*mutate())
            if volume.stale():
                volume.refresh()
            try:
                volume.mkdir(b"while%d" % rng.randrange(1 << 30), 0o700, 1, 2)
            except FamfsError as error:
                _require_one_line(error)
            now = shown(volume)
            assert all(now.get(path) == node for path, node in before.items())
            before = now

    def close(self) -> None:
        """Nothing is left."""
        self._memory.close()


def _require_one_line(error: FamfsError) -> None:
    """What a user is told is one line, whatever the media hold."""
    assert str(error).isprintable(), error


assert _USED < MIB
