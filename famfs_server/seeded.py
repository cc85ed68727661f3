# SPDX-License-Identifier: Apache-2.0
"""The stream of bytes that a seed names: what `creat -r -S SEED` writes and `verify` expects.

The generator is xoroshiro128+ with the constants 55, 14, 36, its two words of state drawn from the seed by
splitmix64. The stream is the low 32 bits of each draw, little-endian. A file's bytes are the stream from
its beginning, so that every implementation of famfs can check a file that another one made.

Python draws one number in a microsecond. Here the stream is cut into lanes of equal length, and numpy steps
a thousand lanes at once. A step is linear over GF(2), that is, a matrix of 128 by 128 bits: its powers of
two lead to the start of any lane, and so to any offset.
"""

from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Words = NDArray[np.uint64]

_MASK: Final = (1 << 64) - 1

# A lane is 2**7 draws: long enough that finding its start costs a fraction of drawing it, short enough that
# 2 MiB fill all lanes.
_LANE_BITS: Final = 7
_LANE: Final = 1 << _LANE_BITS
_LANES: Final = 4096

# Draws of all lanes are collected this many steps deep, then turned into the order of the stream.
_DEPTH: Final = 8

# numpy shifts by an array without a dimension twice as fast as by a number of Python.
_BY_9, _BY_14, _BY_28, _BY_36, _BY_55 = (np.array(bits, dtype=np.uint64) for bits in (9, 14, 28, 36, 55))

_WORD: Final = 4
_LANE_BYTES: Final = _LANE * _WORD


def _initial_state(seed: int) -> int:
    """The state after seeding: the first word in the low 64 bits, the second one above."""
    state, counter = 0, seed
    for shift in (0, 64):
        counter = (counter + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((counter ^ counter >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        state |= (mixed ^ mixed >> 31) << shift
    return state


def _step(state: int) -> int:
    """The state one draw later."""
    first, second = state & _MASK, state >> 64
    second ^= first
    first = (first << 55 | first >> 9) & _MASK ^ second ^ second << 14 & _MASK
    second = (second << 36 | second >> 28) & _MASK
    return second << 64 | first


def _product(matrix: tuple[int, ...], state: int) -> int:
    """`matrix`, given as the images of the 128 single bits, applied to `state`."""
    result = 0
    while state:
        lowest = state & -state
        result ^= matrix[lowest.bit_length() - 1]
        state ^= lowest
    return result


@cache
def _jump(power: int) -> tuple[int, ...]:
    """The matrix of 2**power steps."""
    if power == 0:
        return tuple(_step(1 << bit) for bit in range(128))
    half = _jump(power - 1)
    return tuple(_product(half, column) for column in half)


@cache
def _jump_tables(power: int) -> Words:
    """For each byte of a state, each value of it, and each word of the result: what it contributes."""
    columns = np.frombuffer(b"".join(column.to_bytes(16, "little") for column in _jump(power)), dtype="<u8")
    columns = columns.reshape(16, 8, 2)
    tables = np.zeros((16, 256, 2), dtype=np.uint64)
    for bit in range(8):
        tables[:, 1 << bit : 2 << bit] = tables[:, : 1 << bit] ^ columns[:, bit, None]
    return tables


def _lane_states(state: int, count: int) -> tuple[Words, Words]:
    """The states at the starts of `count` lanes in a row, the first of which starts at `state`."""
    states = np.empty((count, 2), dtype="<u8")
    states[0] = state & _MASK, state >> 64
    known, power = 1, _LANE_BITS
    while known < count:
        # As many new lanes as there are known ones, each that many lanes behind a known one.
        new = states[known : min(2 * known, count)]
        source = states[: len(new)].view(np.uint8)
        tables = _jump_tables(power)
        new[:] = 0
        for byte in range(16):
            new ^= tables[byte].take(source[:, byte], axis=0)  # several times faster than an index
        known, power = known + len(new), power + 1
    return states[:, 0].astype(np.uint64), states[:, 1].astype(np.uint64)


class SeededStream:
    """The endless stream of bytes of one seed.

    Any part can be had at any time; parts in order are the cheapest. Not for several threads at once.
    """

    def __init__(self, seed: int) -> None:
        """Take `seed`, 1 to 2**32 - 1; 0 means "no seed" in the format's tools. Otherwise ValueError."""
        if not 0 < seed < 1 << 32:
            raise ValueError(f"seed {seed} is not between 1 and {(1 << 32) - 1}")
        self._start = _initial_state(seed)
        self._next_lane, self._next_state = 0, self._start
        self._draws = np.empty((_DEPTH, _LANES), dtype=np.uint64)
        self._scratch = np.empty(_LANES, dtype=np.uint64)
        self._stream = np.empty((_LANES, _LANE), dtype="<u4")

    def fill(self, buffer: "WriteableBuffer", offset: int = 0) -> None:
        """Write the bytes of the stream from `offset` on into `buffer`, all of it.

        The stores are ordinary ones: give it memory of this process, not of a device. ValueError for a
        negative offset or a buffer that is not writable and contiguous.
        """
        target = np.frombuffer(memoryview(buffer), dtype=np.uint8)
        if not target.flags.writeable:
            raise ValueError("the buffer to fill is read-only")
        done = 0
        while done < target.size:
            part = self._part(offset + done, target.size - done)
            target[done : done + part.size] = part
            done += part.size

    def first_difference(self, buffer: "ReadableBuffer", offset: int = 0) -> int | None:
        """The first position in `buffer` that differs from the stream from `offset` on; None if all agree.

        ValueError for a negative offset or a buffer that is not contiguous.
        """
        given = np.frombuffer(memoryview(buffer), dtype=np.uint8)
        done = 0
        while done < given.size:
            part = self._part(offset + done, given.size - done)
            different = given[done : done + part.size] != part
            position = int(different.argmax())
            if different[position]:
                return done + position
            done += part.size
        return None

    def _part(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Some bytes of the stream from `offset` on, at most `length`; valid until the next call."""
        if offset < 0:
            raise ValueError(f"offset {offset} is negative")
        lane, skip = divmod(offset, _LANE_BYTES)
        count = min(-(-(skip + length) // _LANE_BYTES), _LANES)
        self._draw(lane, count)
        return self._stream[:count].reshape(-1).view(np.uint8)[skip : skip + length]

    def _draw(self, lane: int, count: int) -> None:
        """Draw the lanes from `lane` on into the first `count` rows of the stream."""
        if lane != self._next_lane:
            state, power, left = self._start, _LANE_BITS, lane
            while left:
                if left & 1:
                    state = _product(_jump(power), state)
                left >>= 1
                power += 1
            self._next_state = state
        first, second = _lane_states(self._next_state, count)
        scratch, draws = self._scratch[:count], self._draws[:, :count]
        low_halves = draws.astype("<u8", copy=False).view("<u4")[:, ::2]
        for column in range(0, _LANE, _DEPTH):
            for draw in draws:
                np.add(first, second, draw)
                np.bitwise_xor(second, first, second)
                np.left_shift(first, _BY_55, scratch)
                np.right_shift(first, _BY_9, first)
                np.bitwise_or(first, scratch, first)
                np.bitwise_xor(first, second, first)
                np.left_shift(second, _BY_14, scratch)
                np.bitwise_xor(first, scratch, first)
                np.left_shift(second, _BY_36, scratch)
                np.right_shift(second, _BY_28, second)
                np.bitwise_or(second, scratch, second)
            self._stream[:count, column : column + _DEPTH] = low_halves.T
        # Where the last lane has ended the next one starts.
        self._next_lane, self._next_state = lane + count, int(second[-1]) << 64 | int(first[-1])
