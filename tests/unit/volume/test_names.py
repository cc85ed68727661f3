# SPDX-License-Identifier: Apache-2.0
"""The index of names, and its hash against Python's own SipHash-1-3, whose key follows from PYTHONHASHSEED."""

import json
import random
import struct
import subprocess
import sys

import pytest

from famfs_server.volume._names import Index, name_hash

HASHES = "import json, sys; print(json.dumps([hash(bytes.fromhex(name)) for name in sys.argv[1:]]))"


def key_of(seed: int) -> bytes:
    """The key that Python makes of a seed: the high bytes of a linear congruential generator."""
    if not seed:
        return bytes(16)
    made = []
    for _ in range(16):
        seed = (seed * 214013 + 2531011) & 0xFFFFFFFF
        made.append(seed >> 16 & 0xFF)
    return bytes(made)


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="this Python hashes bytes in another way")
@pytest.mark.parametrize("seed", [0, 1, 4294967295])
def test_is_siphash(seed: int, rng: random.Random) -> None:
    # Python hashes the empty string to 0.
    names = [rng.randbytes(length) for length in range(1, 80)]
    words = [sys.executable, "-c", HASHES, *(name.hex() for name in names)]
    done = subprocess.run(words, env={"PYTHONHASHSEED": str(seed)}, capture_output=True, check=True, timeout=30)
    expected = [number & (1 << 64) - 1 for number in json.loads(done.stdout)]
    assert [name_hash(key_of(seed), 0, name) for name in names] == expected


def test_directory_and_key_count(rng: random.Random) -> None:
    key, other = rng.randbytes(16), rng.randbytes(16)
    made = {
        name_hash(k, parent, name) for k in (key, other) for parent in (1, 2, 1 << 31) for name in (b"", b"a", b"b")
    }
    assert len(made) == 18
    assert name_hash(key, 1, b"a") == name_hash(key, 1, b"a")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        name_hash(bytes(15), 1, b"a")
    with pytest.raises(TypeError):
        name_hash(bytes(16), 1, "a")  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        name_hash(bytes(16), -1, b"a")


def columns(rows: int, slots: int) -> list[memoryview]:
    """Slots, parents, offsets, lengths, next siblings, first and last children, modes, and a text of 100 bytes."""
    whole = {"slots": ("I", slots), "parents": ("I", rows), "offsets": ("Q", rows), "lengths": ("B", rows)}
    whole |= {"next": ("I", rows), "first": ("I", rows), "last": ("I", rows), "modes": ("I", rows), "text": ("B", 100)}
    return [memoryview(bytearray(memoryview(b"").cast(code).itemsize * n)).cast(code) for code, n in whole.values()]


def test_index_against_a_dictionary(rng: random.Random) -> None:
    _, _, offsets, lengths, following, first, last, _, text = made = columns(64, 128)
    index = Index(rng.randbytes(16), *made)
    known: dict[tuple[int, bytes], int] = {}
    text[:8] = b"abcdefgh"
    for nodeid in range(10, 60):
        offsets[nodeid], lengths[nodeid] = rng.randrange(5), rng.randrange(1, 4)
        place = rng.randrange(1, 4), bytes(text[offsets[nodeid] :][: lengths[nodeid]])
        assert index.find(*place) == known.get(place, 0)
        assert index.link(nodeid, *place) == (place not in known)
        known.setdefault(place, nodeid)
        assert index.find(*place) == known[place]
    for parent in range(1, 4):
        chain, node = [], first[parent]
        while node:
            chain.append(node)
            node = following[node]
        assert chain == [node for (directory, _), node in known.items() if directory == parent]
        assert last[parent] == chain[-1]
    # Once more is what a successor does with the entry that its predecessor died in.
    assert all(index.link(node, *place) for place, node in known.items())


def test_dirents(rng: random.Random) -> None:
    _, _, offsets, lengths, following, _, _, modes, text = made = columns(64, 128)
    index = Index(bytes(16), *made)
    text[:] = rng.randbytes(100)
    chain = rng.sample(range(1, 64), 30)
    expected: list[bytes] = []
    lead = rng.choice([0, 128])
    for node, after in zip(chain, [*chain[1:], 0], strict=True):
        offsets[node], lengths[node], following[node] = rng.randrange(60), rng.randrange(1, 41), after
        modes[node] = rng.choice([0o40755, 0o100644])
        name = bytes(text[offsets[node] :][: lengths[node]])
        record = struct.pack("<QQII", node, node, len(name), modes[node] >> 12) + name
        expected.append(bytes(lead) + record.ljust(-(-len(record) // 8) * 8, b"\0"))
    whole = b"".join(expected)
    for size in (0, len(expected[0]) - 1, len(expected[0]), *range(len(whole) - 50, len(whole) + 50)):
        count, used = 0, 0
        while count < len(expected) and used + len(expected[count]) <= size:
            used += len(expected[count])
            count += 1
        assert index.dirents(chain[0], size, lead) == whole[:used]
    assert index.dirents(0, 100, 0) == b""
    assert index.dirents(64, 100, 0) == b""
    for wrong in (-8, 4, 4104):
        with pytest.raises(ValueError, match="lead"):
            index.dirents(chain[0], 100, wrong)


def test_index_refuses_what_does_not_fit() -> None:
    key = bytes(16)
    with pytest.raises(ValueError, match="do not fit"):
        Index(key, *columns(64, 64))
    with pytest.raises(ValueError, match="do not fit"):
        Index(key, *columns(64, 96))
    with pytest.raises(ValueError, match="do not fit"):
        Index(key, *[*columns(64, 128)[:3], *columns(32, 128)[3:]])
    with pytest.raises(ValueError, match="16 bytes"):
        Index(b"", *columns(64, 128))
    index = Index(key, *columns(64, 128))
    for nodeid, parent in ((64, 1), (1, 64), (1, 1 << 63)):
        with pytest.raises(IndexError):
            index.link(nodeid, parent, b"a")
    assert index.find(1 << 63, b"a") == 0
    with pytest.raises(TypeError):
        index.find(1, "a")  # type: ignore[arg-type]


def test_index_survives_columns_that_lie() -> None:
    """What another process has written there must not make this one read beyond them."""
    slots, _, offsets, lengths, *_ = made = columns(64, 128)
    index = Index(bytes(16), *made)
    for nodeid, offset in ((3, 99), (3, 100), (3, 1 << 63), (3, (1 << 64) - 1), (4_000_000_000, 0)):
        for slot in range(127):
            slots[slot] = nodeid
        offsets[3], lengths[3] = offset, 2
        assert index.find(0, b"ab") == 0
        if nodeid == 3:
            assert index.dirents(nodeid, 4096, 0) == b""
