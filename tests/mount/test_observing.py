# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a mount from outside: status, metrics, list, top, log level, stack dumps, warnings."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from famfs_server.cli.status import render
from harness import BIN, MIB, File, Mount, Site, client, populate, run, succeed, wait_for
from schemas import conform

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def mount(shared_site: Site) -> Iterator[Mount]:
    """A file system with a few files that have been looked at."""
    device = shared_site.format()
    populate(device, ["d"], [File(f"d/f{number}", size=MIB) for number in range(40)])
    with shared_site.mounted(device) as mount:
        client("for n in range(40): os.stat(arguments[0] + '/d/f%d' % n)", mount.path)
        yield mount


def famfs(*arguments: str | Path) -> str:
    """What a famfs command prints."""
    return succeed(BIN / "famfs", *arguments)


def test_status_is_what_the_schema_says(mount: Mount) -> None:
    status = conform(famfs("status", "--json", mount.path), "status")
    assert status["mount_point"] == str(mount.path)
    assert status["log"] == {"entries": 41, "capacity": 15420, "behind": 0}
    lookups = status["requests"]["opcodes"]["lookup"]
    assert lookups["count"] >= 40
    assert lookups["count"] // 16 <= lookups["samples"] <= lookups["count"] // 16 + 1
    assert sum(lookups["histogram"]) == lookups["samples"]
    assert 0 < lookups["p50"] <= lookups["p99"]
    assert status["processes"]["supervisor"] == mount.process("supervisor")
    # Others may have mounts on this machine, in any state.
    every = json.loads(run(BIN / "famfs", "status", "--json").stdout)
    assert str(mount.path) in [row["mount_point"] for row in every]


def test_status_for_people(mount: Mount) -> None:
    text = famfs("status", mount.path)
    assert f"{mount.device} on {mount.path}: role master, data path server" in text
    assert "log 41 of 15420 entries (0.3% used)" in text
    assert "  lookup " in text
    assert "role master" in famfs("status", mount.device)
    twice = famfs("status", "--watch", "-n", "2", mount.path)
    assert twice.count("role master") == 2
    before = json.loads(famfs("status", "--json", mount.path))
    client("for n in range(20): os.path.exists(arguments[0] + '/none%d' % n)", mount.path)
    now = json.loads(famfs("status", "--json", mount.path))
    rows = [line.split() for line in render(now, before)]
    assert ["request", "a", "second", "errors", "mean", "p50", "<", "p99", "<"] in rows
    (rate,) = (float(row[1]) for row in rows if row[0] == "lookup")
    assert rate == pytest.approx(20 / (now["taken_at"] - before["taken_at"]), abs=1)
    assert "requests a second" in famfs("top", "-n", "2", mount.path)
    looks = famfs("top", "--json", "-n", "2", mount.path).splitlines()
    [first], [second] = (conform(line, "top") for line in looks)
    assert first["requests_a_second"] is None
    assert second["requests_a_second"] >= 0
    for line in famfs("status", "--watch", "--json", "-n", "2", mount.path).splitlines():
        conform(line, "status")


def test_metrics_are_what_prometheus_reads(mount: Mount, tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    output = tmp_path / "famfs.prom"
    famfs("metrics", "-o", output, mount.path)
    nothing = tmp_path / "nothing"
    nothing.symlink_to("/dev/null")
    famfs("metrics", "-o", nothing, mount.path)
    assert nothing.is_symlink()
    directory = os.fsdecode(os.getxattr(mount.path, "user.famfs.shadow"))
    by_socket = succeed("curl", "-s", "--unix-socket", f"{directory}/sock", "http://localhost/metrics")
    for text in (famfs("metrics", mount.path), output.read_text(), by_socket):
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        here = ("mount", str(mount.path))
        assert samples["famfs_log_entries", (here,)] == 41
        assert samples["famfs_requests_total", (here, ("opcode", "lookup"))] >= 40
        count = samples["famfs_request_seconds_count", (here, ("opcode", "lookup"))]
        assert samples["famfs_request_seconds_bucket", (("le", "+Inf"), here, ("opcode", "lookup"))] == count > 0


def test_metrics_of_a_mount_are_told_once_and_in_utf8(site: Site) -> None:
    """However often it is bound elsewhere, and whatever the bytes of its path are; Prometheus refuses anything else."""
    from prometheus_client.parser import text_string_to_metric_families

    odd = site.attach(site.format("other"), name="odd-\udce9")
    bound = site.place("bound")
    succeed("mount", "--bind", odd.path, bound)
    try:
        # Other tests' mounts may be there, too.
        lines = [line for line in famfs("metrics").splitlines() if "odd-" in line]
        twice = famfs("metrics", odd.path, bound)
    finally:
        succeed("umount", bound)
        odd.unmount()
    for text in (lines, [line for line in twice.splitlines() if "odd-" in line]):
        samples = [sample.partition("}")[0] for sample in text]
        assert len(samples) == len(set(samples)) > 100
    families = text_string_to_metric_families(twice)
    labels = {sample.labels["mount"] for family in families for sample in family.samples}
    assert labels == {str(odd.path).replace("\udce9", "\\xe9")}


def test_list(mount: Mount) -> None:
    found = conform(famfs("list", "--json"), "list")
    (row,) = (row for row in found["mounts"] if row["mount_point"] == str(mount.path))
    assert (row["role"], row["data_path"], row["state"]) == ("master", "server", "serving")
    assert f"{mount.device} on {mount.path}: master, server, {row['uuid']}" in famfs("list")


def test_other_readers_say_what_their_schemas_say(mount: Mount) -> None:
    assert conform(famfs("fsck", "--json", "-B", "2", mount.path), "fsck")["clean"]
    conform(famfs("getmap", "--json", mount / "d/f1"), "getmap")
    conform(famfs("check", "--json", mount.path), "check")
    famfs("pcq", "-C", "-b", "64", "-n", "4", mount / "q")
    conform(famfs("pcq", "-i", "--json", mount / "q"), "pcq")


def test_the_log_level_at_run_time(mount: Mount) -> None:
    assert famfs("loglevel", mount.path) == "6\n"
    assert famfs("loglevel", mount.path, "debug") == "7\n"
    assert famfs("loglevel", mount.path) == "7\n"
    assert famfs("loglevel", mount.path, "6") == "6\n"
    done = run(BIN / "famfs", "loglevel", mount.path, "loud")
    assert done.returncode != 0
    assert "no log level" in done.stderr


@pytest.mark.parametrize("process", ["supervisor", "worker"])
def test_a_signal_dumps_the_stacks(mount: Mount, process: str) -> None:
    (file,) = mount.host.run_directory.glob("*/stacks")
    before = len(file.read_text())
    os.kill(mount.process(process), signal.SIGUSR1)
    place = "supervisor.py" if process == "supervisor" else "channel.py"
    assert wait_for(lambda: place in file.read_text()[before:])
    assert client("result = os.stat(arguments[0]).st_size", mount / "d/f1") == MIB


def test_counts_survive_a_takeover_and_errors_are_kept(site: Site) -> None:
    device = site.format()
    populate(device, ["d"], [File(f"d/f{number}", size=4096) for number in range(40)])
    with site.mounted(device) as mount:
        client("for n in range(40): os.stat(arguments[0] + '/d/f%d' % n)", mount.path)
        os.kill(mount.process("worker"), signal.SIGKILL)
        client("result = os.stat(arguments[0] + '/d/f1').st_size", mount.path)
        status = conform(famfs("status", "--json", mount.path), "status")
        assert status["requests"]["opcodes"]["lookup"]["count"] >= 32
        assert status["takeovers"] == 1
        assert any("takes over" in line["message"] for line in status["recent"])
        assert "takes over" in famfs("status", mount.path)


def test_metrics_that_cannot_be_written_leave_nothing_behind(mount: Mount, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    (taken / "full").mkdir(parents=True)
    done = run(BIN / "famfs", "metrics", "-o", taken, mount.path)
    assert (done.returncode, done.stderr) == (1, f"famfs metrics: {taken}: Is a directory\n")
    assert list(tmp_path.iterdir()) == [taken]


def test_a_full_disk_is_named(mount: Mount) -> None:
    done = run(BIN / "famfs", "export", mount.path, "-o", "/dev/full")
    assert (done.returncode, done.stderr) == (1, "famfs export: /dev/full: No space left on device\n")
