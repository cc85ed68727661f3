# SPDX-License-Identifier: Apache-2.0
"""INIT from every kernel that there may be: each gets the data path that docs/protocol.md 1.4 says, and a mount."""

import itertools
import os
from pathlib import Path

import pytest

from famfs_server.omf import layout
from tests.twin import trees
from tests.twin.connection import STOCK, Bit
from tests.twin.kernel import FakeKernel
from tests.twin.maps import Dialect
from tests.twin.server import Refused, Twin

EXT, RFC, FMAP = Bit.INIT_EXT, Bit.RFC_DAX_FMAP, Bit.DAX_FMAP
MINORS = range(31, 48) if os.environ.get("FAMFS_TEST_LONG") else (31, 36, 42, 43, 45, 46, 47)
KINDS = {"stock": None, "buffer pools": None, "pull": Dialect.PULL, "push": Dialect.PUSH}
"""Kernels by what bit 43 means to them; without RAWIO a famfs kernel says what a stock one says."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init") / "dax.img"
    trees.empty(path, 4 << 30).close()
    return path


def mount(twin: Twin) -> FakeKernel:
    kernel = twin.mount()
    assert kernel.famfs == (twin.data_path == "fmap")
    file = kernel.open(kernel.resolve(b".meta/.superblock"))
    assert (file.inode.map is not None) == kernel.famfs
    assert int.from_bytes(kernel.read(file, 0, 8), "little") == layout.SUPERBLOCK_MAGIC
    return kernel


def offers(kind: str, ext: bool, rfc: bool) -> int:
    offered = STOCK & ~(EXT | RFC)
    for bit, wanted in ((EXT, ext), (RFC, rfc), (FMAP, kind == "buffer pools")):
        offered |= bit if wanted else 0
    return offered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("minor", MINORS)
def test_data_path(minor: int, kind: str, image: Path) -> None:
    for ext, rfc, rawio in itertools.product((True, False), (True, False), (True, False)):
        visible = ext and minor >= 36 and (kind == "buffer pools" or (KINDS[kind] is not None and rawio))
        if kind == "buffer pools" and minor < 46:
            # Bit 43 could only be famfs's then.
            continue
        twin = Twin(image, KINDS[kind], rawio=rawio, minor=minor, offered=offers(kind, ext, rfc))
        mount(twin)
        expected = visible and (minor <= 45 or kind == "push")
        assert twin.data_path == ("fmap" if expected else "server"), twin.reason
        assert ("2025" in twin.reason) == (ext and rfc and minor == 42 and not visible)
        assert ("io_uring" in twin.reason) == (visible and not expected)
        assert twin.end() == 0
        warned = "serving reads and writes from the mapping instead" in twin.log()
        assert warned == (twin.data_path == "server")


def test_word_of_the_operator_is_evidence(image: Path) -> None:
    """On minor 46 bit 43 can mean two things; `dialect=pull` says which. The bit itself it cannot replace."""
    twin = Twin(image, Dialect.PULL, minor=46, words=("dialect=pull", "fmap=require"))
    assert mount(twin).famfs
    assert twin.end() == 0
    twin = Twin(image, Dialect.PULL, minor=46, rawio=False, words=("dialect=pull",))
    assert not mount(twin).famfs
    assert twin.end() == 0


@pytest.mark.parametrize("dialect", ["rfc1", "rfc2"])
def test_dialect_that_is_not_served(dialect: str, image: Path) -> None:
    twin = Twin(image, Dialect.PULL, words=(f"dialect={dialect}", "fmap=require"))
    with pytest.raises(Refused, match="2025"):
        twin.mount()
    assert twin.end() == 1


@pytest.mark.parametrize("minor", [42, 45, 46])
def test_required_maps_that_are_not_offered(minor: int, image: Path) -> None:
    twin = Twin(image, None, minor=minor, offered=STOCK | (FMAP if minor == 46 else 0), words=("fmap=require",))
    with pytest.raises(Refused, match="fmap=require cannot be met"):
        twin.mount()
    assert twin.end() == 1


def test_maps_that_are_not_wanted(image: Path) -> None:
    twin = Twin(image, Dialect.PULL, words=("fmap=never",))
    assert not mount(twin).famfs
    assert twin.end() == 0
    assert "WARNING" not in twin.log()


def test_kernel_that_is_too_old(image: Path) -> None:
    twin = Twin(image, None, minor=30)
    with pytest.raises(Refused, match=r"7\.31"):
        twin.mount()
    assert twin.end() == 1
