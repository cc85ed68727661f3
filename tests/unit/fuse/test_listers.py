# SPDX-License-Identifier: Apache-2.0
"""Tests of who is given attributes with a listing."""

from famfs_server.fuse.listers import PROCESSES, Listers


def test_who_is_new_gets_attributes() -> None:
    listers = Listers()
    assert listers.begins(10, 1)
    assert listers.begins(11, 1)


def test_attributes_follow_what_was_done_with_the_last_directory() -> None:
    listers = Listers()
    listers.begins(10, 1)
    assert not listers.begins(10, 2)
    assert not listers.begins(10, 3)
    listers.looked_up(3)
    assert listers.begins(10, 4)
    assert not listers.begins(10, 5)


def test_processes_do_not_disturb_each_other() -> None:
    listers = Listers()
    for directory in range(100, 120, 2):
        listers.begins(10, directory)
        wanted = listers.begins(11, directory + 1)
        listers.looked_up(directory + 1)
        assert wanted
    assert not listers.begins(10, 120)


def test_the_last_one_in_a_directory_counts() -> None:
    listers = Listers()
    listers.begins(10, 1)
    listers.begins(11, 1)
    listers.looked_up(1)
    assert listers.begins(11, 2)
    assert not listers.begins(10, 2)
    # What one forgets of a directory that somebody else has listed since is not the other's.
    listers.begins(11, 3)
    assert set(listers.listed) == {2, 3}


def test_few_processes_are_remembered() -> None:
    listers = Listers()
    for process in range(PROCESSES + 1):
        listers.begins(process, 1000 + process)
    assert len(listers.listed) == PROCESSES
    assert not listers.begins(PROCESSES, 1)
    assert listers.begins(0, 2)
