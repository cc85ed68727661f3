# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the marker that each folder gives, the seed of random tests, the golden images."""

import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

import golden
from golden import GoldenImages

TESTS = Path(__file__).parent
TIERS = ("unit", "twin", "mount", "fuzz", "vm", "fmap")
ABSENT = f"no golden images in {golden.folder()} (FAMFS_VECTORS names another folder)"


def pytest_configure(config: pytest.Config) -> None:
    """Loads the profile of random tests: many more cases when FAMFS_TEST_LONG is set."""
    if os.environ.get("VM_TEST") == "1":
        return  # no random tests there, and importing Hypothesis takes an emulated processor 10 seconds
    import hypothesis

    # No deadline here: the machines that run the tests are small and shared.
    fixed = bool(os.environ.get("CI"))
    hypothesis.settings.register_profile("famfs", deadline=None, print_blob=True, database=None, derandomize=fixed)
    hypothesis.settings.register_profile("long", hypothesis.settings.get_profile("famfs"), max_examples=5000)
    hypothesis.settings.load_profile("long" if os.environ.get("FAMFS_TEST_LONG") else "famfs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test the marker of its folder."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in TIERS:
            item.add_marker(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeats a test that has a parameter `golden_name` for every golden image."""
    if "golden_name" in metafunc.fixturenames:
        images = GoldenImages(golden.folder())
        skipped = pytest.param("none", marks=pytest.mark.skip(reason=ABSENT))
        metafunc.parametrize("golden_name", images.names or [skipped])


@pytest.fixture(scope="session")
def vectors() -> GoldenImages:
    """The golden images; a test that uses them is skipped where they are absent."""
    images = GoldenImages(golden.folder())
    if not images.names:
        pytest.skip(ABSENT)
    return images


@pytest.fixture(scope="session")
def golden_names(vectors: GoldenImages) -> list[str]:
    """The names of all golden images."""
    return vectors.names


@pytest.fixture
def golden_image(vectors: GoldenImages) -> Callable[[str, Path], Path]:
    """`golden_image(name, directory)` makes a sparse device image of a golden image, and gives its path."""
    return vectors.build


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A random generator; FAMFS_TEST_SEED repeats a run, and the seed is printed with every failure."""
    seed = int(os.environ.get("FAMFS_TEST_SEED") or secrets.randbits(32))
    print(f"FAMFS_TEST_SEED={seed} {request.node.nodeid}")
    return random.Random(f"{seed} {request.node.nodeid}")
