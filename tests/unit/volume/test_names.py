# SPDX-License-Identifier: Apache-2.0
"""The hash of names against Python's own SipHash-1-3, whose key follows from PYTHONHASHSEED."""

import json
import random
import subprocess
import sys

import pytest

from famfs_server.volume._names import name_hash

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
