# SPDX-License-Identifier: Apache-2.0
"""The tree of names against a dictionary, and as another process sees it in the same memory file."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from stat import S_IFDIR, S_IFREG

import pytest

from famfs_server.omf.log import Extent, Fmap
from famfs_server.volume import namespace as ns
from famfs_server.volume.faults import Fault
from famfs_server.volume.namespace import Namespace

CAPACITY = 3000
LOG_LENGTH = 8 << 20


@pytest.fixture
def tree() -> Iterator[Namespace]:
    tree = Namespace.create(CAPACITY, LOG_LENGTH)
    tree.complete()
    yield tree
    tree.close()


def add(tree: Namespace, parent: int, name: bytes, *, directory: bool) -> tuple[int, bool]:
    nodeid = tree.published
    tree.mode[nodeid] = (S_IFDIR if directory else S_IFREG) | 0o644
    tree.name_offset[nodeid], tree.name_length[nodeid] = tree.store_names(name), len(name)
    linked = tree.link(nodeid, parent, name)
    if not linked:
        tree.skip(nodeid, Fault.DUPLICATE)
    tree.publish(nodeid + 1)
    return nodeid, linked


def test_against_a_dictionary(tree: Namespace, rng: random.Random) -> None:
    model: dict[int, dict[bytes, int]] = {ns.ROOT: {ns.META_NAME: ns.META}}
    for _ in range(CAPACITY):
        parent = rng.choice(list(model))
        name = (
            b"%d" % rng.randrange(40) if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 79)).replace(b"/", b"_")
        )
        directory = rng.random() < 0.2
        nodeid, linked = add(tree, parent, name, directory=directory)
        assert linked is (name not in model[parent])
        if linked:
            model[parent][name] = nodeid
            if directory:
                model[nodeid] = {}
    for parent, names in model.items():
        assert [(tree.name(child), child) for child in tree.children(parent)] == list(names.items())
        children = list(names.values())
        for at in (0, len(children) // 2):
            if at < len(children):
                assert list(tree.children(parent, children[at])) == children[at + 1 :]
        for name, nodeid in names.items():
            assert tree.lookup(parent, name) == nodeid
            assert tree.resolve(tree.path(nodeid)) == nodeid
        for name in (b"absent", b"", b"4000", ns.META_NAME if parent != ns.ROOT else b"x"):
            assert tree.lookup(parent, name) == 0
    visible = sorted(nodeid for names in model.values() for nodeid in names.values() if nodeid >= ns.FIRST_NODEID)
    assert list(tree.walk()) == visible
    assert sum(map(len, tree.faults().values())) + len(visible) == CAPACITY == tree.replayed


def test_meta_files(tree: Namespace) -> None:
    assert tree.resolve(b"") == ns.ROOT
    assert tree.resolve(b".meta") == ns.META
    for path, size, offset in ((b".meta/.superblock", 0x200000, 0), (b".meta/.log", LOG_LENGTH, 0x200000)):
        nodeid = tree.resolve(path)
        assert (tree.size[nodeid], tree.mode[nodeid]) == (size, S_IFREG | 0o444)
        assert tree.fmap(nodeid) == Fmap((Extent(0, offset, size),))
    assert tree.resolve(b".meta/.log/x") == 0


def test_another_mapping_of_the_same_memory_file(tree: Namespace) -> None:
    directory, _ = add(tree, ns.ROOT, b"directory", directory=True)
    file, _ = add(tree, directory, b"file", directory=False)
    twin = Namespace.resume(CAPACITY, os.dup(tree.fd))
    assert twin is not None
    assert twin.resolve(b"directory/file") == file
    add(tree, directory, b"later", directory=False)
    assert [twin.name(child) for child in twin.children(directory)] == [b"file", b"later"]
    assert twin.replayed == 3
    twin.close()


def test_another_program_that_is_given_the_memory_file(tree: Namespace) -> None:
    directory, _ = add(tree, ns.ROOT, b"directory", directory=True)
    names = [b"file %d" % number for number in range(500)]
    nodeids = [add(tree, directory, name, directory=False)[0] for name in names]
    tree.serial[7] = 1 << 62 | 7
    tree.expect(1000)
    code = f"""
from famfs_server.volume.namespace import IDENTITY, Namespace
assert Namespace.identity_of({tree.fd}) == IDENTITY
assert Namespace.progress_of({tree.fd}) == (501, 1000)
assert Namespace.provisional_in({tree.fd}) == 1
tree = Namespace.resume({CAPACITY}, {tree.fd})
print([tree.lookup({directory}, b"file %d" % number) for number in range(501)])
"""
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code]
        done = subprocess.run(
            words, env={"PYTHONHASHSEED": seed}, pass_fds=[tree.fd], stdout=subprocess.PIPE, timeout=30
        )
        assert json.loads(done.stdout) == [*nodeids, 0]


def test_tree_that_is_laid_out_in_another_way(tree: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns, "IDENTITY", ns.IDENTITY + 1)
    assert Namespace.identity_of(tree.fd) != ns.IDENTITY
    assert Namespace.resume(CAPACITY, os.dup(tree.fd)) is None


def test_tree_that_was_not_complete_is_not_resumed() -> None:
    fd = os.memfd_create("state")
    tree = Namespace.create(CAPACITY, LOG_LENGTH, fd)
    assert Namespace.identity_of(fd) == 0
    assert Namespace.resume(CAPACITY, os.dup(fd)) is None
    tree.complete()
    twin = Namespace.resume(CAPACITY, os.dup(fd))
    assert twin is not None
    twin.close()
    tree.close()


def test_nodeids_are_functions_of_the_log_index() -> None:
    for index in (0, 1, 15419, 1 << 31):
        assert ns.index_of(ns.nodeid_of(index)) == index
    assert ns.nodeid_of(0) > ns.META_LOG
