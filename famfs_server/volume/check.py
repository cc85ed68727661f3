# SPDX-License-Identifier: Apache-2.0
"""fsck: the media examined from scratch, as figures, findings and text (docs/format.md 5.3, 6.1, 6.5).

Space is counted here in another way than the allocator does: every entry with a right checksum counts, shown or
skipped, which is how the reference counts; where the two differ, somebody should know. Nothing is changed here;
`volume/repair.py` mends what can be mended.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from famfs_server.errors import DeviceFaultError, UsageError
from famfs_server.omf import layout, log
from famfs_server.omf.layout import EntryType, ExtentType
from famfs_server.omf.log import LogHeader
from famfs_server.omf.superblock import Superblock
from famfs_server.sizes import human_size
from famfs_server.volume.faults import Fault
from famfs_server.volume.replay import BLOCK, Damage, Stop
from famfs_server.volume.volume import DeviceMemory, Role, Volume

_SHOWN_PATHS = 1000
"""Skipped entries listed one by one; a hostile log can hold millions."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A log entry with a right checksum that is not shown, and why."""

    index: int
    fault: Fault
    path: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """One of N equal parts of the first device, for striping. In bytes."""

    number: int
    used: int
    free: int
    largest_free: int


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """What is known of one device of the file system. In bytes; `collisions` in allocation units."""

    number: int
    size: int
    allocated: int
    free: int
    collisions: int


@dataclass(slots=True)
class Usage:
    """What the entries with right checksums say, by the reference's rules (format 6.1). In bytes and counts."""

    entries: int = 0
    bad_entries: int = 0
    """Entries below `next_index` whose checksum or sequence number is wrong."""
    files: int = 0
    directories: int = 0
    file_bytes: int = 0
    collisions: int = 0
    """Allocation units that more than one extent, or an extent and the metadata, claim."""
    allocated: int = 0
    """Superblock and log included."""
    used: list[tuple[int, int]] = field(default_factory=list)
    """Disjoint ranges of allocation units in use on the first device, ascending."""
    unreachable: int = 0
    """Bytes that only entries which are not shown claim: no file has them, and no new file gets them (decisions 3)."""
    devices: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Bytes in use and colliding units of each device that an entry names."""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of `examine`. Sizes are in bytes."""

    device: str
    superblock: Superblock
    header: LogHeader
    role: Role
    capacity: int
    """Whole allocation units of the first device."""
    usage: Usage
    further_devices: tuple[int, ...]
    """Sizes of the devices that the log has added."""
    shown_files: int
    shown_directories: int
    skipped: tuple[Skipped, ...]
    skipped_count: int
    stop: Stop | None
    problems: tuple[str, ...]
    """What else is wrong with the media."""
    notes: tuple[str, ...]
    """What is unusual and harmless."""

    @property
    def devices(self) -> list[DeviceUsage]:
        """The devices by number, with their own figures."""
        found = []
        for number, size in enumerate((self.capacity, *self.further_devices)):
            allocated, collisions = self.usage.devices.get(number, (0, 0))
            found.append(DeviceUsage(number, size, allocated, max(size - allocated, 0), collisions))
        return found

    @property
    def free(self) -> int:
        """Bytes that no entry claims."""
        return self.capacity - self.usage.allocated

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong with the media."""
        return not (self.usage.collisions or self.usage.bad_entries or self.skipped_count or self.stop or self.problems)

    @property
    def exit_status(self) -> int:
        """What `famfs fsck` ends with: the number of collisions, as the reference does (format 6.5)."""
        return self.usage.collisions

    @property
    def fsck_bits(self) -> int:
        """What `fsck.famfs` ends with: 0 clean, 4 errors left, as fsck(8) says (format 6.5)."""
        return 0 if self.clean else 4

    def buckets(self, count: int) -> list[Bucket]:
        """The first device in `count` equal parts. Raises UsageError for a count that no striping can have."""
        if not 1 <= count <= layout.MAX_BUCKETS:
            raise UsageError(f"the number of buckets must be 1 to {layout.MAX_BUCKETS}, not {count}")
        unit = self.superblock.alloc_unit
        size = self.capacity // unit // count
        found = []
        for number in range(count):
            start, end = number * size, (number + 1) * size
            at, used, largest = start, 0, 0
            for run_start, run_end in self.usage.used:
                low, high = max(run_start, start), min(run_end, end)
                if low < high:
                    largest = max(largest, low - at)
                    used += high - low
                    at = high
            largest = max(largest, end - at)
            found.append(Bucket(number, used * unit, (size - used) * unit, largest * unit))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        usage = self.usage
        return {
            "device": self.device,
            "uuid": str(self.superblock.uuid),
            "device_uuid": str(self.superblock.device_uuid),
            "owner_uuid": str(self.superblock.system_uuid),
            "role": self.role.value,
            "version": self.superblock.version,
            "omf_version": list(self.superblock.omf_version),
            "alloc_unit": self.superblock.alloc_unit,
            "device_path": self.superblock.device_path,
            "device_size": self.superblock.device_size,
            "capacity": self.capacity,
            "allocated": usage.allocated,
            "free": self.free,
            "file_bytes": usage.file_bytes,
            "log_length": self.header.length,
            "log_entries": self.header.next_index,
            "log_capacity": self.header.last_index + 1,
            "files": usage.files,
            "directories": usage.directories,
            "shown_files": self.shown_files,
            "shown_directories": self.shown_directories,
            "collisions": usage.collisions,
            "bad_entries": usage.bad_entries,
            "skipped_count": self.skipped_count,
            "skipped": [
                {"index": entry.index, "fault": entry.fault.name.lower(), "path": entry.path} for entry in self.skipped
            ],
            "stop": None if self.stop is None else {"index": self.stop.index, "damage": self.stop.damage.value},
            "unreachable": usage.unreachable,
            "devices": [asdict(device) for device in self.devices],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "clean": self.clean,
        }


def examine(
    memory: DeviceMemory,
    device: str,
    host: UUID | None,
    *,
    reading: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Examine the file system in `memory`; `host` is this host's UUID, which decides the role.

    The log is read twice; `reading` is told each time how many entries were, and of how many.
    Raises MediaError where superblock or log header are invalid, DeviceFaultError where they cannot be read.
    """
    volume = Volume(memory, host, device, reading=reading)
    try:
        header = log.decode_header(
            memory.read_fresh(layout.LOG_OFFSET, layout.LOG_HEADER_SIZE), volume.superblock.log_length
        )
        figures = volume.statistics()
        skipped = []
        for fault, indexes in volume.namespace.faults().items():
            skipped += [(index, fault) for index in indexes]
        skipped.sort()
        unit = volume.superblock.alloc_unit
        return Report(
            device=device,
            superblock=volume.superblock,
            header=header,
            role=volume.role,
            capacity=volume.superblock.device_size // unit * unit,
            usage=count_usage(
                memory,
                header.next_index,
                volume.superblock,
                hidden=[index for index, _ in skipped],
                stop=header.next_index if figures.stop is None else figures.stop.index,
                reading=reading,
            ),
            further_devices=tuple(volume.space.sizes[1:]),
            shown_files=figures.files,
            shown_directories=figures.directories,
            skipped=tuple(
                Skipped(index, fault, _stored_path(memory, index)) for index, fault in skipped[:_SHOWN_PATHS]
            ),
            skipped_count=len(skipped),
            stop=figures.stop,
            problems=tuple(_problems(memory, volume.superblock, header)),
            notes=tuple(_notes(memory, volume.superblock, header)),
        )
    finally:
        volume.close()


def _problems(memory: DeviceMemory, superblock: Superblock, header: LogHeader) -> Iterator[str]:
    if header.next_seqnum != header.next_index:
        yield (
            f"the log's counters disagree (next_seqnum {header.next_seqnum}, next_index {header.next_index}); "
            "the next append on the master repairs them, and so does --repair"
        )
    if superblock.device_size > memory.size > 0:
        yield f"the superblock says {superblock.device_size} bytes, but the device has only {memory.size}"


def _stands_at(memory: DeviceMemory, index: int) -> bool:
    try:
        data = memory.read_fresh(layout.entry_offset(index), layout.LOG_ENTRY_SIZE)
    except DeviceFaultError:
        return False
    return log.entry_is_valid(data, index)


def _notes(memory: DeviceMemory, superblock: Superblock, header: LogHeader) -> Iterator[str]:
    natural = layout.natural_last_index(header.length)
    if header.last_index != natural:
        yield f"the log's last index is {header.last_index}, not {natural}: part of the log is never used"
    if header.next_index <= header.last_index and _stands_at(memory, header.next_index):
        yield (
            f"a whole entry stands behind the end of the log, at {header.next_index}: an append that was never "
            "completed; the next one overwrites it"
        )
    if superblock.device_size % superblock.alloc_unit:
        yield f"the last {superblock.device_size % superblock.alloc_unit} bytes of the device are never used"


def _stored_path(memory: DeviceMemory, index: int) -> str:
    """What an entry calls itself, escaped, since nothing about it is to be trusted."""
    try:
        data = memory.read_fresh(layout.entry_offset(index), layout.LOG_ENTRY_SIZE)
    except DeviceFaultError:
        return ""
    entry = np.frombuffer(data, layout.LOG_ENTRY, count=1)[0]
    match int(entry["type"]):
        case EntryType.FILE:
            stored = entry["file"]["fm_relpath"]
        case EntryType.MKDIR:
            stored = entry["mkdir"]["md_relpath"]
        case _:
            return ""
    return printable(stored.tobytes().split(b"\0", 1)[0].decode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """Text from the media that cannot move a terminal's cursor."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def count_usage(
    memory: DeviceMemory,
    end: int,
    superblock: Superblock,
    *,
    hidden: Sequence[int],
    stop: int,
    reading: Callable[[int, int], None] = lambda _done, _total: None,
) -> Usage:
    """Read the log entries below `end` once, the ones behind an invalid one too, and add up what they claim.

    `hidden` are the indexes of entries that are not shown; none is from `stop` on.
    """
    usage = Usage(entries=end)
    unit = superblock.alloc_unit
    metadata = np.array([[0, 0, (layout.LOG_OFFSET + superblock.log_length) // unit]], np.uint64)
    shown, others = [metadata], [metadata[:0]]
    hides = np.zeros(end, np.bool_)
    hides[list(hidden)] = True
    hides[stop:] = True
    for index, data, count in _blocks(memory, end):
        reading(index, end)
        if not data:
            usage.bad_entries += count
            continue
        entries = np.frombuffer(data, layout.LOG_ENTRY, count=count)
        valid = _valid(data, index, count)
        usage.bad_entries += count - int(np.count_nonzero(valid))
        files = entries["type"] == EntryType.FILE
        usage.files += int(np.count_nonzero(valid & files))
        usage.directories += int(np.count_nonzero(valid & (entries["type"] == EntryType.MKDIR)))
        usage.file_bytes += sum(entries[valid & files]["file"]["fm_size"].tolist())
        hide = hides[index : index + count]
        shown.append(_claims(entries[valid & files & ~hide]["file"]["fm_fmap"], unit))
        others.append(_claims(entries[valid & files & hide]["file"]["fm_fmap"], unit))
    seen = np.concatenate(shown)
    every = np.concatenate((seen, *others))
    for device in np.unique(every[:, 0]).tolist():
        limit = superblock.device_size // unit if device == 0 else None
        spans = _spans(every, device, limit)
        merged = _merge(spans)
        covered = _total(merged)
        collisions = _total(spans) - covered
        usage.collisions += collisions
        usage.devices[device] = covered * unit, collisions
        usage.unreachable += (covered - _total(_merge(_spans(seen, device, limit)))) * unit
        if device == 0:
            usage.allocated = covered * unit
            usage.used = [(start, end) for start, end in merged.tolist()]
    return usage


def _spans(claims: NDArray[np.uint64], device: int, limit: int | None) -> NDArray[np.uint64]:
    """The claims on one device as (first unit, end unit), cut at its end."""
    spans: NDArray[np.uint64] = claims[claims[:, 0] == device][:, 1:]
    if limit is not None:
        spans = np.minimum(spans, np.uint64(limit))
    return spans[spans[:, 1] > spans[:, 0]]


def _total(spans: NDArray[np.uint64]) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _blocks(memory: DeviceMemory, end: int) -> Iterator[tuple[int, bytes, int]]:
    """The log in blocks: index of the first entry, its bytes (none where memory cannot be read), and how many."""
    for index in range(0, end, BLOCK):
        count = min(BLOCK, end - index)
        try:
            data = memory.read_fresh(layout.entry_offset(index), count * layout.LOG_ENTRY_SIZE)
        except DeviceFaultError:
            data = b""
        yield index, data, count


def _valid(data: bytes, index: int, count: int) -> NDArray[np.bool_]:
    """Which of the entries have the right sequence number and checksum, those behind a wrong one too."""
    entries = np.frombuffer(data, layout.LOG_ENTRY, count=count)
    view = memoryview(data)
    starts = range(0, count * layout.LOG_ENTRY_SIZE, layout.LOG_ENTRY_SIZE)
    computed = np.fromiter((layout.crc(view[at : at + layout.LOG_ENTRY_CRC_SPAN]) for at in starts), np.uint64, count)
    valid: NDArray[np.bool_] = (computed == entries["crc"]) & (
        entries["seqnum"] == np.arange(index, index + count, dtype=np.uint64)
    )
    return valid


def _claims(fmap: NDArray[Any], unit: int) -> NDArray[np.uint64]:
    """Rows of (device, first unit, end unit) for all extents and strips of the files."""
    rows = []
    number = np.arange(layout.MAX_STRIPS)
    striped = fmap["ie"][:, 0]
    for kind, counts, extents in (
        (ExtentType.SIMPLE, fmap["fmap_nextents"], fmap["se"]),
        (ExtentType.INTERLEAVED, striped["ie_nstrips"], striped["ie_strips"]),
    ):
        chosen = (fmap["fmap_ext_type"] == kind)[:, None] & (number < np.minimum(counts, layout.MAX_STRIPS)[:, None])
        found = extents[chosen]
        length = found["se_len"]
        start = found["se_offset"] // unit
        units = length // unit + (length % unit != 0)
        rows.append(np.stack((found["se_devindex"], start, start + units), axis=1))
    return np.concatenate(rows)


def _merge(spans: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The union of (start, end) rows as disjoint rows, ascending."""
    if not len(spans):
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.concatenate(([True], spans[1:, 0] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.stack((spans[first, 0], reach[last]), axis=1)


def render(report: Report, *, human: bool = False, verbose: int = 0) -> Iterator[str]:
    """The report as the lines of `famfs fsck`. Scripts read "Free space:", "Device capacity:" and `log_len`."""

    def size(number: int) -> str:
        return human_size(number) if human else str(number)

    superblock, header, usage = report.superblock, report.header, report.usage
    major, minor = superblock.omf_version
    yield f"famfs superblock: {report.device}"
    yield f"  version:              {superblock.version} (on-media format {major}.{minor})"
    yield f"  file system UUID:     {superblock.uuid}"
    yield f"  device UUID:          {superblock.device_uuid}"
    yield f"  owner's system UUID:  {superblock.system_uuid}"
    yield f"  role of this host:    {'Owner' if report.role is Role.MASTER else 'Client'}"
    yield f"  allocation unit:      {size(superblock.alloc_unit)}"
    yield f"  device when made:     {printable(superblock.device_path)}"
    if verbose:
        yield f"  log_len               {header.length}"
        yield f"  log offset            {superblock.log_offset}"
        yield f"  checksum              {superblock.crc:#010x}"
        yield f"  log header checksum   {header.crc:#010x}"
        yield f"  next sequence number  {header.next_seqnum}"
    yield f"Log: {header.next_index} of {header.last_index + 1} entries in use"
    yield f"  Log size in use:      {size(layout.LOG_HEADER_SIZE + layout.LOG_ENTRY_SIZE * header.next_index)}"
    yield f"  Log size:             {size(header.length)}"
    yield f"  {usage.files} files and {usage.directories} directories logged"
    yield f"  {report.shown_files} files and {report.shown_directories} directories shown"
    yield "Capacity:"
    yield f"  Device capacity:      {size(superblock.device_size)}"
    yield f"  Allocatable capacity: {size(report.capacity)}"
    yield f"  Sum of file sizes:    {size(usage.file_bytes)}"
    yield f"  Allocated bytes:      {size(usage.allocated)}"
    yield f"  Free space:           {size(report.free)}"
    if usage.unreachable:
        yield f"  Unreachable space:    {size(usage.unreachable)}"
    if usage.file_bytes:
        yield f"  Space amplification:  {usage.allocated / usage.file_bytes:.2f}"
    yield f"  Percent used:         {100 * usage.allocated / report.capacity if report.capacity else 0:.1f}%"
    if report.further_devices:
        for device in report.devices:
            yield f"  Device {device.number}: {size(device.allocated)} of {size(device.size)} in use"
    for note in report.notes:
        yield f"note: {note}"
    for entry in report.skipped:
        name = f" ({entry.path})" if entry.path else ""
        yield f"skipped: log entry {entry.index}{name}: {entry.fault.meaning}"
    if report.skipped_count > len(report.skipped):
        yield f"skipped: {report.skipped_count - len(report.skipped)} more log entries"
    if report.stop:
        yield f"ERROR: {describe_stop(report.stop)}"
    for problem in report.problems:
        yield f"ERROR: {problem}"
    if usage.bad_entries:
        yield f"ERROR: {usage.bad_entries} log entries have a wrong checksum or sequence number"
    if usage.collisions:
        yield f"ERROR: {usage.collisions} ALLOCATION COLLISIONS FOUND"


def describe_stop(stop: Stop) -> str:
    """One line on where and why the replay ended early, and what that means."""
    match stop.damage:
        case Damage.TORN:
            meaning = "it is hidden, and nothing can be created until it is dealt with"
        case Damage.CORRUPT:
            meaning = "this entry and all behind it are hidden, and nothing can be created"
        case Damage.UNREADABLE:
            meaning = "entries from there on are hidden"
        case Damage.REPLACED:
            meaning = "nothing of it can be used any more; unmount it"
    return f"log entry {stop.index}: {stop.damage.value}; {meaning}"
