# SPDX-License-Identifier: Apache-2.0
"""INIT as this guest's kernel sends it, byte by byte as recorded in tests/data; new ones are recorded here too."""

import os
import re
from pathlib import Path

import pytest

from famfs_server.fuse.dialects import decide
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.fuse.negotiation import parse_init_request

DATA = Path(__file__).parents[1] / "data"
IO_URING = Path("/sys/module/fuse/parameters/enable_uring")


def without_pid(request: bytes) -> bytes:
    """7.3 says there who mounts; older kernels say 0."""
    return request[:32] + bytes(4) + request[36:]


@pytest.mark.parametrize("io_uring", [False, True], ids=["plain", "io-uring"])
def test_init_is_as_recorded(io_uring: bool) -> None:
    if io_uring and not IO_URING.exists():
        pytest.skip("this kernel's FUSE has no io_uring")
    series = re.match(r"\d+\.\d+", os.uname().release)
    assert series is not None
    name = f"init-{series[0]}{'-io-uring' if io_uring else ''}.bin"
    if io_uring:
        IO_URING.write_text("1")
    fuse = os.open("/dev/fuse", os.O_RDWR)
    try:
        with DetachedMount.create(fuse, "recorder"):
            sent = os.read(fuse, 1 << 17)
    finally:
        os.close(fuse)
        if io_uring:
            IO_URING.write_text("0")
    if results := os.environ.get("VM_TEST_RESULTS"):
        (Path(results) / name).write_bytes(sent)
    assert decide(parse_init_request(sent), policy="auto").data_path == "server"
    recorded = DATA / name
    if not recorded.exists():
        pytest.skip(f"nobody has recorded {name} yet; the folder of results has it now")
    assert without_pid(sent) == without_pid(recorded.read_bytes())
