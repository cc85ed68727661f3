# SPDX-License-Identifier: Apache-2.0
"""pcq: queues over two files, here ordinary ones; what is put comes out, in order, and damage is counted."""

import os
from pathlib import Path

import pytest

from commands import json_of, run
from schemas import conform

GEOMETRIES = ((12, 1), (64, 1024), (100, 7), (4096, 33), (1 << 20, 3))


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """A queue of 128 buckets."""
    name = tmp_path / "queue"
    assert run("pcq", "--create", "-b", "100", "-n", "128", name).status == 0
    return name


def moved(queue: Path, *options: str, status: int = 0) -> int:
    """Run the queue; what the status file says."""
    told = queue.with_name("status")
    outcome = run("pcq", *options, "-f", told, queue)
    assert outcome.status == status, outcome
    return int(told.read_text())


def test_the_counts_of_a_queue(queue: Path) -> None:
    assert "0 messages put" in run("pcq", "--info", queue).out
    assert moved(queue, "--drain") == 0
    assert moved(queue, "--producer", "-N", "128") == 128
    assert moved(queue, "--consumer", "-N", "64") == 64
    assert json_of(run("famfs", "pcq", "-i", "--json", queue)) == {
        "queue": str(queue), "bucket_size": 100, "buckets": 128, "put": 128, "taken": 64,
    }  # fmt: skip
    assert moved(queue, "--drain", "-N", "10") == 10
    assert moved(queue, "--drain") == 54
    assert moved(queue, "-p", "-c", "-N", "1000", "-S", "7") == 2000
    assert moved(queue, "-pc", "-t", "1") > 0


def test_a_full_queue_stops_the_producer(queue: Path) -> None:
    assert moved(queue, "-p", "-t", "1") == 128
    assert moved(queue, "-p", "-c", "-N", "200") == 400
    assert "128 waiting" in run("pcq", "-i", queue).out


@pytest.mark.parametrize(("bucket_size", "buckets"), GEOMETRIES)
def test_geometries(tmp_path: Path, bucket_size: int, buckets: int) -> None:
    name = tmp_path / "q"
    for _ in range(2):
        assert run("pcq", "-C", "-b", str(bucket_size), "-n", str(buckets), name).status == 0
        assert moved(name, "-p", "-N", str(buckets), "-S", "3") == buckets
    assert moved(name, "-d", "-S", "3") == buckets
    assert run("pcq", "-C", "-b", str(bucket_size), "-n", str(buckets + 64), name).status == 1


def test_damage_is_counted(queue: Path) -> None:
    moved(queue, "-p", "-N", "5", "-S", "3")
    assert moved(queue, "-c", "-N", "1", "-S", "4", status=1) == -1
    with queue.open("r+b") as file:
        for bucket, at in ((2, 0), (3, 50)):
            file.seek(4096 + bucket * 128 + at)
            file.write(b"\xff")
    outcome = run("pcq", "-d", queue)
    assert outcome.status == 2
    assert outcome.error == f"pcq: {queue}: 2 messages are wrong, first message 2: the bucket holds message 255"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("-i", "-C", "-b", "64", "-n", "4"),
        ("-d", "-p"),
        ("-p", "-N", "1", "-t", "1"),
        ("-C",),
        ("-C", "-b", "64"),
        ("-C", "-n", "64"),
        ("-C", "-b", "11", "-n", "64"),
        ("-p", "-P", "x"),
    ],
)
def test_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run("pcq", *arguments, tmp_path / "q").status == 2
    assert not (tmp_path / "q").exists()
    assert run("pcq", *arguments).status == 2


def test_what_is_no_queue(tmp_path: Path, queue: Path) -> None:
    assert run("pcq", "-i", tmp_path / "absent").status == 1
    plain = tmp_path / "plain"
    for content in (b"", bytes(9000)):
        plain.write_bytes(content)
        assert run("pcq", "-i", plain).error == f"pcq: {plain}: is not a queue; make it with --create"
    queue.with_name("queue.consumer").unlink()
    outcome = run("pcq", "-i", queue)
    assert outcome.status == 1
    assert outcome.error == f"pcq: {queue}: the queue's second file {queue}.consumer is missing; --create makes it"
    assert run("pcq", "-C", "-b", "100", "-n", "128", queue).status == 0
    assert run("pcq", "-i", queue).status == 0


def test_owner_and_permissions(tmp_path: Path, queue: Path) -> None:
    for letter, modes in (("p", (0o644, 0o444)), ("c", (0o444, 0o644)), ("b", (0o644,) * 2), ("n", (0o444,) * 2)):
        assert run("pcq", "-P", letter, queue).status == 0
        assert tuple(os.stat(f"{queue}{end}").st_mode & 0o777 for end in ("", ".consumer")) == modes
    if os.geteuid() == 0:
        run("pcq", "-C", "-b", "64", "-n", "4", "-u", "5", "-g", "6", tmp_path / "q")
        found = os.stat(tmp_path / "q.consumer")
        assert (found.st_uid, found.st_gid) == (5, 6)


def test_a_run_as_json(queue: Path) -> None:
    outcome = run("pcq", "-p", "-N", "5", "--json", "-f", queue.with_name("status"), queue)
    assert conform(outcome.out, "pcq-run")["sent"] == 5
    with queue.open("r+b") as file:
        file.seek(4096 + 20)
        file.write(b"\xff\xff")
    outcome = run("pcq", "-d", "--json", queue)
    assert outcome.status == 1
    found = conform(outcome.out, "pcq-run")
    assert (found["received"], found["errors"]) == (5, 1)
    assert "checksum" in found["first_error"]
