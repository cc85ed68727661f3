# SPDX-License-Identifier: Apache-2.0
"""Numbers on command lines: every spelling that the reference knows, and nothing else."""

import pytest

from famfs_server.cli.values import MODE, OWNER, SEED, THREADS, UUID_TEXT, parse_size
from famfs_server.cli.values import _Parsed as Parsed


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x100000", 1 << 20),
        ("0X10", 16),
        ("010", 8),
        ("4k", 4096),
        ("8M", 8 << 20),
        ("3g", 3 << 30),
        ("0x10k", 16 << 10),
        ("010m", 8 << 20),
        (" 5 ", 5),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", "1.5m", "8mb", "8t", "k", "0x", "08", "1_000", "m8", "9223372036854775808", "9" * 5000, "\u0663"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|large|digits|can be") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (MODE, "644", 0o644),
        (MODE, "0644", 0o644),
        (MODE, "04755", 0o4755),
        (OWNER, "0", 0),
        (OWNER, "4294967294", 4294967294),
        (SEED, "1", 1),
        (SEED, "0xffffffff", 0xFFFFFFFF),
        (THREADS, "0", 0),
        (THREADS, "256", 256),
    ],
)
def test_numbers(kind: Parsed, text: str, value: int) -> None:
    assert kind.parse(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (MODE, "8"),
        (MODE, "-1"),
        (MODE, "10000"),
        (MODE, "rwx"),
        (MODE, ""),
        (OWNER, "-1"),
        (OWNER, "4294967295"),
        (OWNER, "root"),
        (SEED, "0"),
        (SEED, "4294967296"),
        (THREADS, "-1"),
        (THREADS, "257"),
        (THREADS, "1e2"),
        (UUID_TEXT, "x"),
    ],
)
def test_what_is_refused(kind: Parsed, text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        kind.parse(text)
    assert "\n" not in str(caught.value)
