# SPDX-License-Identifier: Apache-2.0
"""The clock of a guest, on which all time limits in it rest."""

import os
import time
from pathlib import Path

import pytest

RTC = Path("/sys/class/rtc/rtc0/since_epoch")
SECONDS = 5


def test_clock_runs_like_that_of_the_machine_outside() -> None:
    """QEMU keeps the real time clock by the machine's own."""
    if os.environ.get("VM_TEST") != "1" or not RTC.exists():
        pytest.skip("needs a guest with a real time clock")

    def read() -> tuple[float, int]:
        return time.monotonic(), int(RTC.read_text())

    began = now = read()
    while now[1] - began[1] < SECONDS and now[0] - began[0] < 100 * SECONDS:
        time.sleep(0.5)
        now = read()
    assert 0.5 < (now[0] - began[0]) / (now[1] - began[1]) < 2
