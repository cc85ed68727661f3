# SPDX-License-Identifier: Apache-2.0
"""Directories with very many names: listed whole, from the middle, and while they grow."""

import json
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from famfs_server.omf import layout, log
from harness import BIN, CLIENT_UUID, FAST, MIB, File, Mount, Site, client, format_device, populate, run, succeed

COUNT = 100_000
LOG_LENGTH = 64 * MIB

pytestmark = pytest.mark.timeout(120)


def write_many(device: Path) -> None:
    """Put COUNT directories named 000000, 000001, … straight into the log; much faster than making them."""
    blank = log.build_mkdir(0, b"######", mode=0o755, uid=0, gid=0)
    path_at = blank.index(b"######")
    head, tail = blank[8:path_at], blank[path_at + 6 : layout.LOG_ENTRY_CRC_SPAN]
    entries = []
    for index in range(COUNT):
        body = index.to_bytes(8, "little") + head + b"%06d" % index + tail
        entries.append(body + zlib.crc32(body).to_bytes(8, "little"))
    with device.open("r+b") as image:
        image.seek(layout.entry_offset(0))
        image.write(b"".join(entries))
        image.seek(layout.LOG_OFFSET + layout.NEXT_SEQNUM_OFFSET)
        image.write(COUNT.to_bytes(8, "little") * 2)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device with a very long listing."""
    device = format_device(tmp_path_factory.mktemp("crowded") / "device", log_length=LOG_LENGTH)
    write_many(device)
    return device


@pytest.fixture(params=FAST, ids=lambda fast: f"fastpath={fast}")
def mount(request: pytest.FixtureRequest, site: Site, crowded: Path) -> Iterator[Mount]:
    succeed("cp", "--sparse=always", crowded, site.directory / "device")
    with site.mounted(site.directory / "device", f"fastpath={request.param}") as mount:
        yield mount


def test_listing_while_names_are_added(mount: Mount) -> None:
    lister = """
import subprocess
code = "import os, sys\\nfor number in range(300): os.mkdir(sys.argv[1] + '/added%d' % number)"
adding = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, arguments[0]])
rounds = 0
old_names = {"%06d" % index for index in range(100000)}
problems = []
while adding.poll() is None or rounds < 2:
    names = [entry.name for entry in os.scandir(arguments[0]) if entry.is_dir(follow_symlinks=False)]
    rounds += 1
    if len(names) != len(set(names)):
        problems.append("a name twice")
    if old_names - set(names):
        problems.append("names missing")
    if any(not name.startswith("added") and name != ".meta" for name in set(names) - old_names):
        problems.append("names from nowhere")
names = os.listdir(arguments[0])
result = [problems, adding.returncode, len(names), len(set(names))]
"""
    expected = COUNT + 300 + 1
    assert client(lister, mount.path, timeout=90) == [[], 0, expected, expected]


def test_listing_goes_on_from_where_it_was(mount: Mount) -> None:
    code = """
import ctypes, random
libc = ctypes.CDLL(None, use_errno=True)
class Entry(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("offset", ctypes.c_int64), ("length", ctypes.c_ushort),
        ("type", ctypes.c_ubyte), ("name", ctypes.c_char * 256)]
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Entry)
libc.telldir.restype = ctypes.c_long
for function in (libc.readdir, libc.telldir, libc.rewinddir, libc.closedir):
    function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
directory = libc.opendir(os.fsencode(arguments[0]))
def read():
    entry = libc.readdir(directory)
    return entry.contents.name.decode() if entry else None
names, places = [], []
while True:
    places.append(libc.telldir(directory))
    name = read()
    if name is None:
        break
    names.append(name)
seed = random.SystemRandom().randrange(1 << 32)
chosen = random.Random(seed)
wrong = []
for at in [0, 1, 2, 3, *(chosen.randrange(len(places)) for _ in range(200))]:
    libc.seekdir(directory, places[at])
    for following in [*names, None][at : at + chosen.choice((1, 3, 2000))]:
        if read() != following:
            wrong.append([seed, at])
            break
os.mkdir(arguments[0] + "/late")
libc.seekdir(directory, places[-2])
late = [read(), read(), read()]
libc.rewinddir(directory)
again = sum(1 for _ in iter(read, None))
result = [len(names), wrong, late, again, names[:3]]
"""
    last = f"{COUNT - 1:06d}"
    expected = [COUNT + 3, [], [last, "late", None], COUNT + 4, [".", "..", ".meta"]]
    assert client(code, mount.path, timeout=90) == expected


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("new", [False, True], ids=["logged", "new"])
def test_listing_from_every_place_in_pieces_of_any_size(site: Site, fast: str, new: bool) -> None:
    device = format_device(site.directory / "device")
    populate(device, ["d", "long" * 15], [File(f"f{number}", size=4096) for number in range(20)])
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
directory = os.open(arguments[0], os.O_RDONLY)
held = []
if arguments[1]:
    for number in range(20):
        held.append(os.open(f"{arguments[0]}/new{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        if number % 3:
            os.ftruncate(held[-1], 4096)
        if number % 3 == 2:
            os.close(held.pop())
def listed(cookie, size):
    os.lseek(directory, cookie, os.SEEK_SET)
    buffer, found = ctypes.create_string_buffer(size), []
    while (length := libc.syscall(217, directory, buffer, size)) > 0:
        at = 0
        while at < length:
            end = at + int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
            name = buffer.raw[at + 19 : end].split(b"\\0")[0].decode()
            found.append((name, int.from_bytes(buffer.raw[at + 8 : at + 16], "little")))
            at = end
    if length < 0:
        raise OSError(ctypes.get_errno(), f"behind {cookie} in {size} bytes")
    return found
whole = listed(0, 1 << 16)
names, cookies = zip(*whole)
wrong = []
for at, cookie in enumerate([0, *cookies]):
    for size in (80, 104, 200, 1 << 16):
        if [name for name, _ in listed(cookie, size)] != list(names[at:]):
            wrong.append([at, size])
result = [sorted(names), wrong]
"""
    expected = {".", "..", ".meta", "d", "long" * 15, *(f"f{number}" for number in range(20))}
    expected |= {f"new{number}" for number in range(20) if new}
    with site.mounted(device, f"fastpath={fast}") as mount:
        assert client(code, mount.path, "new" if new else "") == [sorted(expected), []]


def test_listings_carry_what_their_reader_looks_at(site: Site) -> None:
    device = format_device(site.directory / "device")
    folders = [f"d{number}" for number in range(20)]
    populate(device, folders, [File(f"{folder}/f{number}", size=4096) for folder in folders for number in range(30)])
    with site.mounted(device) as mount:

        def lookups() -> int:
            shown = mount.host.run(BIN / "famfs", "status", "--json", mount.path).stdout
            return int(json.loads(shown)["requests"]["opcodes"]["lookup"]["count"])

        walk = """
for number in range(int(arguments[1]), int(arguments[2])):
    for entry in os.scandir(f"{arguments[0]}/d{number}"):
        if arguments[3]:
            entry.stat()
"""
        by_name = """
for number in range(10, 20):
    for file in range(30):
        os.stat(f"{arguments[0]}/d{number}/f{file}")
"""
        asked = [lookups()]
        for code, words in ((walk, ("0", "10", "looks")), (walk, ("10", "20", "")), (by_name, ())):
            client(code, mount.path, *words)
            asked.append(lookups())
        # One for each directory, and where files are looked at one more. Of the files that nobody looked at the kernel
        # was told in the first directory alone, and of all of them but one there.
        assert [after - before for before, after in pairwise(asked)] == [20, 10, 300 - 29]


def test_another_host_lists_what_was_added(mount: Mount) -> None:
    with mount.site.mounted(mount.device, host=CLIENT_UUID) as other:
        succeed("mkdir", mount / "fresh")
        assert client("result = len(os.listdir(arguments[0]))", other.path) == COUNT + 2
        assert run("rmdir", other / "fresh").returncode == 1
        assert succeed("ls", "-d", other / "fresh").strip() == str(other / "fresh")
