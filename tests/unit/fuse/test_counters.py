# SPDX-License-Identifier: Apache-2.0
"""Counting requests: every one is counted, one of sixteen is measured, and a successor goes on from what was noted."""

from famfs_server.fuse import counters
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.session import SessionRecord


def test_samples_fall_into_buckets_that_double() -> None:
    words = SessionRecord.create().counters
    for count, nanoseconds in enumerate((1, 1023, 1024, 2047, 2048, 1 << 50), 1):
        counters.measured(words, Opcode.READ, count, nanoseconds)
    found = counters.figures(words, counters.counts(words))
    assert list(found) == [Opcode.READ]
    row = found[Opcode.READ]
    assert (row.count, row.samples, row.errors) == (6, 6, 0)
    assert row.histogram[:3] == (2, 2, 1)
    assert row.histogram[-1] == 1
    assert row.sampled_seconds > 1e6


def test_quantiles_are_upper_bounds_of_buckets() -> None:
    words = SessionRecord.create().counters
    for nanoseconds in [1500] * 98 + [3_000_000] * 2:
        counters.measured(words, Opcode.LOOKUP, 1, nanoseconds)
    row = counters.figures(words, counters.counts(words))[Opcode.LOOKUP]
    assert 1500e-9 <= row.quantile(0.5) <= 3000e-9
    assert 3e-3 <= row.quantile(0.99) <= 6e-3
    assert counters.OpcodeFigures(0, 0, 0, 0.0, (0,) * counters.BUCKETS).quantile(0.5) == 0.0


def test_a_successor_finds_what_was_noted() -> None:
    record = SessionRecord.create()
    counters.measured(record.counters, Opcode.GETATTR, 17, 5000)
    counters.failed(record.counters, Opcode.GETATTR)
    counters.failed(record.counters, 4096)
    again = SessionRecord(record.fd)
    counts = counters.counts(again.counters)
    assert counts[Opcode.GETATTR] == 17
    assert counters.figures(again.counters, counts)[Opcode.GETATTR].errors == 1
    assert len(counters.figures(again.counters, counts)) == 1


def test_names() -> None:
    assert counters.name(Opcode.READDIRPLUS) == "readdirplus"
    assert counters.name(63) == "opcode_63"
