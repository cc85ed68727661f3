# SPDX-License-Identifier: Apache-2.0
"""How many requests of each opcode have come, and how long answering them takes.

The numbers lie in the session record, so that they survive a worker. Every request is counted, but only one of 16 of an
opcode is measured with the clock and entered there: looking at a clock twice and storing four words takes about as
long as a tenth of a hot request does.
"""

from dataclasses import dataclass
from typing import Final

from famfs_server.fuse.abi import Opcode

OPCODES: Final = 64
"""Only opcodes below this are counted."""
_STRIDE: Final = 32
SIZE: Final = 8 * OPCODES * _STRIDE
"""Bytes that the counters take."""
SAMPLED: Final = 15
"""A request is measured if the number of requests of its opcode, itself included, has the rest 1 by one more than
this, which is a power of two."""
_COUNT, _ERRORS, _SAMPLED_NS, _FIRST_BUCKET = range(4)
"""Words of an opcode: requests, those that ended with an error, nanoseconds of all samples, then the histogram."""
BUCKETS: Final = _STRIDE - _FIRST_BUCKET
_SHORTEST_BITS: Final = 10
"""Samples of less than 2**10 ns fall into the first bucket; each bucket reaches twice as far as the one before."""


def counts(words: memoryview) -> list[int]:
    """How many requests of each opcode had come when each was measured last."""
    return words[_COUNT::_STRIDE].tolist()


def measured(words: memoryview, opcode: int, count: int, nanoseconds: int) -> None:
    """Enter a sample of an opcode, and how many requests there were."""
    at = opcode * _STRIDE
    words[at + _COUNT] = count
    words[at + _SAMPLED_NS] += nanoseconds
    bucket = nanoseconds.bit_length() - _SHORTEST_BITS
    words[at + _FIRST_BUCKET + min(max(bucket, 0), BUCKETS - 1)] += 1


def failed(words: memoryview, opcode: int) -> None:
    """Count a request that is answered with an error that its handler did not expect to give."""
    if opcode < OPCODES:
        words[opcode * _STRIDE + _ERRORS] += 1


@dataclass(frozen=True, slots=True)
class OpcodeFigures:
    """What is known of the requests of one opcode. Times are in seconds."""

    count: int
    """Since the mount; a takeover may lose the last few."""
    errors: int
    samples: int
    sampled_seconds: float
    histogram: tuple[int, ...]
    """How many samples fell into each bucket."""

    def quantile(self, part: float) -> float:
        """A time that `part` of the samples did not exceed: the upper bound of its bucket. 0 without samples."""
        left = part * self.samples
        for bound, count in zip(bounds(), self.histogram, strict=True):
            left -= count
            if left <= 0 and self.samples:
                return bound
        return 0.0


def bounds() -> list[float]:
    """The upper bounds of the buckets in seconds. The last bucket holds all that took longer, too."""
    return [(1 << _SHORTEST_BITS + bucket) / 1e9 for bucket in range(BUCKETS)]


def figures(words: memoryview, counts: list[int]) -> dict[int, OpcodeFigures]:
    """The figures of each opcode that has come."""
    found = {}
    for opcode, count in enumerate(counts):
        if count:
            row = words[opcode * _STRIDE : (opcode + 1) * _STRIDE].tolist()
            histogram = tuple(row[_FIRST_BUCKET:])
            found[opcode] = OpcodeFigures(count, row[_ERRORS], sum(histogram), row[_SAMPLED_NS] / 1e9, histogram)
    return found


def name(opcode: int) -> str:
    """What an opcode is called, in lower case."""
    try:
        return Opcode(opcode).name.lower()
    except ValueError:
        return f"opcode_{opcode}"
