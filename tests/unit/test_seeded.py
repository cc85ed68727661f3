# SPDX-License-Identifier: Apache-2.0
"""The seeded stream against the same generator written as a plain loop."""

from collections.abc import Iterator
from functools import cache
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from famfs_server.seeded import SeededStream

MASK = (1 << 64) - 1

# The first bytes by the plain loop below, kept so that both cannot change together.
KNOWN = {
    1: "284991ee66b6fb343a87ca18de441778e8a866a128f453c9630a3f0c918da0a0",
    42: "985f52e27afb0c3df88c822b402249e5d5781cc4cce1aad536a0a03bdb08a0ef",
}

# More than all lanes of one pass.
LENGTH = 5 << 20


def splitmix64(state: int) -> Iterator[int]:
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def rotl(word: int, bits: int) -> int:
    return ((word << bits) | (word >> (64 - bits))) & MASK


@cache
def plain(seed: int, length: int) -> bytes:
    """The first `length` bytes of the stream, one draw after the other."""
    s0, s1 = islice(splitmix64(seed), 2)
    stream = bytearray()
    while len(stream) < length:
        stream += (((s0 + s1) & MASK) & 0xFFFFFFFF).to_bytes(4, "little")
        s1 ^= s0
        s0, s1 = rotl(s0, 55) ^ s1 ^ ((s1 << 14) & MASK), rotl(s1, 36)
    return bytes(stream[:length])


def filled(stream: SeededStream, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    stream.fill(buffer, offset)
    return bytes(buffer)


@pytest.mark.parametrize("seed", sorted(KNOWN))
def test_known_first_bytes(seed: int) -> None:
    assert filled(SeededStream(seed), 0, 32).hex() == KNOWN[seed] == plain(seed, 32).hex()


@pytest.mark.parametrize("seed", [1, 42, 0xFFFFFFFF])
def test_a_long_stream_in_one_piece(seed: int) -> None:
    length = LENGTH if seed == 42 else 200_000
    assert filled(SeededStream(seed), 0, length) == plain(seed, length)


STREAM = SeededStream(42)


@given(st.integers(0, LENGTH), st.integers(0, 20_000) | st.integers(0, LENGTH))
def test_any_part_at_any_time(offset: int, length: int) -> None:
    length = min(length, LENGTH - offset)
    assert filled(STREAM, offset, length) == plain(42, LENGTH)[offset : offset + length]


@given(st.integers(1, 0xFFFFFFFF), st.integers(0, 3000))
def test_any_seed(seed: int, length: int) -> None:
    assert filled(SeededStream(seed), 0, length) == plain(seed, 3000)[:length]


@given(st.lists(st.integers(0, 70_000), max_size=20))
def test_pieces_in_order_make_the_whole(lengths: list[int]) -> None:
    stream, whole = SeededStream(42), bytearray()
    for length in lengths:
        whole += filled(stream, len(whole), length)
    assert whole == plain(42, LENGTH)[: len(whole)]


@given(st.integers(0, 1 << 62), st.integers(1, 3000), st.integers(0, 5000))
def test_far_parts_agree_with_each_other(offset: int, length: int, before: int) -> None:
    before = min(before, offset)
    around = filled(SeededStream(7), offset - before, before + length)
    assert filled(SeededStream(7), offset, length) == around[before:]


def test_the_space_around_the_buffer_is_left_alone() -> None:
    memory = bytearray(b"\xaa" * 3000)
    SeededStream(42).fill(memoryview(memory)[1001:1998], 13)
    assert memory == b"\xaa" * 1001 + plain(42, 3000)[13:1010] + b"\xaa" * 1002


@given(st.integers(0, 9000), st.integers(0, 4 << 20), st.integers(0, 7))
def test_the_first_difference_is_found(offset: int, position: int, bit: int) -> None:
    stream = plain(42, LENGTH)[offset : offset + (4 << 20) + 1]
    damaged = bytearray(stream)
    assert STREAM.first_difference(damaged, offset) is None
    damaged[position] ^= 1 << bit
    damaged[-1] ^= 1
    expected = min(position, len(damaged) - 1) if damaged != stream else None
    assert STREAM.first_difference(damaged, offset) == expected


def test_nothing_differs_from_nothing() -> None:
    assert SeededStream(1).first_difference(b"") is None
    SeededStream(1).fill(bytearray())


@pytest.mark.parametrize("seed", [0, -1, 1 << 32])
def test_a_seed_outside_of_the_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed} is not between"):
        SeededStream(seed)


def test_a_negative_offset_is_refused() -> None:
    with pytest.raises(ValueError, match="offset -1 is negative"):
        SeededStream(1).fill(bytearray(1), -1)


@pytest.mark.parametrize("buffer", [bytes(8), memoryview(bytearray(8)).toreadonly()])
def test_a_read_only_buffer_is_refused(buffer: bytes | memoryview) -> None:
    with pytest.raises(ValueError, match="read-only"):
        SeededStream(1).fill(buffer)
