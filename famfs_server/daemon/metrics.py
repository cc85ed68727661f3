# SPDX-License-Identifier: Apache-2.0
"""The status of mounts as Prometheus reads it: for the control socket's `/metrics` and for `famfs metrics`."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_MOUNT = ("mount",)
_PATHS = ("mount_point", "device")

_GAUGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("mounted_since_seconds", "When the file system was mounted, in seconds since 1970", ("mounted_since",)),
    ("log_entries", "Entries of the log that this host has read", ("log", "entries")),
    ("log_capacity_entries", "Entries that the log has room for", ("log", "capacity")),
    ("log_behind_entries", "Entries of the log that this host has not read yet", ("log", "behind")),
    ("files", "Files that are shown", ("files",)),
    ("directories", "Directories that are shown", ("directories",)),
    ("space_bytes", "Bytes of the devices", ("space", "capacity")),
    ("space_free_bytes", "Bytes that no file has", ("space", "free")),
    ("lagging", "Whether another host's last entry is only half visible", ("lagging",)),
    ("foreign_writer", "Whether another host has written to the log of this master", ("foreign_writer",)),
    ("files_not_logged_yet", "Files that programs on this host are making", ("not_logged_yet",)),
    ("requests_at_libfuse", "Requests that the control plane has in hand", ("requests", "at_libfuse")),
)
_COUNTERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("answered_requests", "Requests that the request plane has dealt with", ("requests", "answered")),
    ("unmapped_requests", "READ and WRITE for files that the kernel should have mapped", ("requests", "unmapped")),
    ("takeovers", "Workers that took the place of one that died", ("takeovers",)),
    ("failed_at_takeover", "Requests that ended with EIO because their worker died", ("failed_at_takeover",)),
)


def exposition(statuses: Sequence[Mapping[str, Any]]) -> bytes:
    """The text for all these mounts, each as `/status` describes it. A mount that is told of twice is in it once."""
    mounts = list({status["mount_point"]: status for status in statuses}.values())

    class Once(Collector):
        def collect(self) -> Iterable[Metric]:
            return _families([{**status, **{key: _text(status[key]) for key in _PATHS}} for status in mounts])

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry)


def _text(path: str) -> str:
    """A path in UTF-8, which the format demands; other bytes as `\\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _families(statuses: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    facts = ("device", "uuid", "role", "data_path", "version", "kernel")
    info = GaugeMetricFamily("famfs_mount_info", "What is mounted", labels=[*_MOUNT, *facts])
    damaged = GaugeMetricFamily("famfs_damaged", "Whether an entry has ended the replay of the log", labels=_MOUNT)
    skipped = GaugeMetricFamily("famfs_skipped_entries", "Entries that are not shown", labels=[*_MOUNT, "fault"])
    for status in statuses:
        mount = status["mount_point"]
        info.add_metric([mount, *(str(status[fact]) for fact in facts)], 1)
        damaged.add_metric([mount], float(status["damage"] is not None))
        for fault, count in status["skipped"].items():
            skipped.add_metric([mount, fault], count)
    yield from (info, damaged, skipped)
    for name, text, path in _GAUGES:
        gauge = GaugeMetricFamily(f"famfs_{name}", text, labels=_MOUNT)
        for status in statuses:
            if (value := _at(status, path)) is not None:
                gauge.add_metric([status["mount_point"]], float(value))
        yield gauge
    for name, text, path in _COUNTERS:
        counter = CounterMetricFamily(f"famfs_{name}", text, labels=_MOUNT)
        for status in statuses:
            counter.add_metric([status["mount_point"]], float(_at(status, path)))
        yield counter
    yield from _requests(statuses)


def _requests(statuses: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    labels = [*_MOUNT, "opcode"]
    count = CounterMetricFamily("famfs_requests", "Requests of the kernel", labels=labels)
    errors = CounterMetricFamily("famfs_request_errors", "Requests that failed in their handler", labels=labels)
    seconds = HistogramMetricFamily(
        "famfs_request_seconds", "Time to answer a request, of one in sixteen", labels=labels
    )
    for status in statuses:
        bounds = status["requests"]["bounds"]
        for opcode, figures in status["requests"]["opcodes"].items():
            values = [status["mount_point"], opcode]
            count.add_metric(values, figures["count"])
            errors.add_metric(values, figures["errors"])
            buckets, total = [], 0
            for bound, found in zip(bounds, figures["histogram"], strict=True):
                total += found
                buckets.append((repr(bound), float(total)))
            # The last bucket holds all that took longer, too.
            buckets[-1] = ("+Inf", float(total))
            seconds.add_metric(values, buckets, figures["sampled_seconds"])
    yield from (count, errors, seconds)


def _at(status: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = status
    for key in path:
        value = value[key]
    return value
