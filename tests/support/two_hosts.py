# SPDX-License-Identifier: Apache-2.0
"""What two hosts tell one another while both run the same test, in guests that share the memory of their dax devices
and nothing else: files in a folder that both see (the runner shares it by virtiofs), which needs no network.

A conftest.py imports `meeting` and `pytest_runtest_makereport` by name.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

STEP = 0.005
WAIT_SECONDS = 180
LOOK_SECONDS = 0.5  # between looks at whether the other host still lives


class Meeting:
    """What two hosts tell one another: small files `WORD-HOST`, whose content is whole or absent."""

    def __init__(self, folder: Path, host: int) -> None:
        self._folder = folder
        self._host = host
        self._other = 3 - host
        self._counter = os.open(folder / f"counter-{host}", os.O_RDWR | os.O_CREAT)
        self._others_counter = -1

    @property
    def is_master(self) -> bool:
        """The first guest makes the file system and is its master."""
        return self._host == 1

    def tell(self, word: str, content: str = "") -> None:
        """Leave a word for the other host."""
        draft = self._folder / f".{word}-{self._host}"
        draft.write_text(content)
        draft.rename(self._folder / f"{word}-{self._host}")

    def _waiting(self, what: str) -> Iterator[None]:
        deadline = time.monotonic() + WAIT_SECONDS
        look = time.monotonic() + LOOK_SECONDS
        while True:
            yield
            time.sleep(STEP)
            if time.monotonic() < look:
                continue
            look = time.monotonic() + LOOK_SECONDS
            for end in ("failed", "ended"):
                if (self._folder / f"{end}-{self._other}").exists():
                    pytest.fail(f"the other host has {end}; waiting for {what}")
            if time.monotonic() > deadline:
                pytest.fail(f"nothing heard from the other host in {WAIT_SECONDS} s; waiting for {what}")

    def hear(self, word: str) -> str:
        """Wait for a word of the other host; its content. Fails the test if that host has failed or ended."""
        path = self._folder / f"{word}-{self._other}"
        for _ in self._waiting(word):
            if path.exists():
                return path.read_text()
        raise AssertionError

    def meet(self, word: str) -> None:
        """Wait until both are here."""
        self.tell(word)
        self.hear(word)

    def count(self, number: int) -> None:
        """Tell how far this host has come; cheaper than a word."""
        os.pwrite(self._counter, number.to_bytes(8, "little"), 0)

    def others_count(self) -> int:
        """How far the other host has come."""
        if self._others_counter < 0:
            self._others_counter = os.open(self._folder / f"counter-{self._other}", os.O_RDONLY | os.O_CREAT)
        return int.from_bytes(os.pread(self._others_counter, 8, 0), "little")

    def wait_for_count(self, number: int) -> None:
        """Wait until the other host has come so far."""
        for _ in self._waiting(f"count {number}"):
            if self.others_count() >= number:
                return

    def kill_other(self) -> None:
        """Have the other guest killed, as by a power failure, and wait until it is gone."""
        (self._folder / f"kill-{self._other}").touch()
        deadline = time.monotonic() + WAIT_SECONDS
        while not (self._folder / f"ended-{self._other}").exists():
            assert time.monotonic() < deadline, "the runner has not killed the other guest"
            time.sleep(STEP)

    def fail(self) -> None:
        """Tell the other host not to wait."""
        (self._folder / f"failed-{self._host}").touch()


@pytest.fixture(scope="session")
def meeting() -> Meeting:
    """The way to the other host."""
    return Meeting(Path(os.environ["VM_TEST_MEETING"]), int(os.environ["VM_TEST_HOST"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that fails here must not make the other host wait."""
    report = yield
    if report.failed and "meeting" in item.funcargs:  # type: ignore[attr-defined]
        item.funcargs["meeting"].fail()  # type: ignore[attr-defined]
    return report
