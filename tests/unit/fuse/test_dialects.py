# SPDX-License-Identifier: Apache-2.0
"""Which data path an INIT request leads to: every minor version, every bit, every piece of evidence."""

import errno
import itertools
import os
from pathlib import Path

import pytest

from famfs_server.errors import NegotiationError, UsageError
from famfs_server.fuse import dialects, kernels
from famfs_server.fuse.abi import InitFlag
from famfs_server.fuse.dialects import Evidence, ExtentKind, InitRequest, Registration, decide

EVERYDAY = InitFlag(0x33FFFFFB)


def init(minor: int, *, extended: bool = True, bits: tuple[int, ...] = ()) -> InitRequest:
    """A request as `parse_init_request` gives it: no bits above 31 without bit 30."""
    flags = EVERYDAY
    if extended:
        flags |= InitFlag.INIT_EXT
        for bit in bits:
            flags |= InitFlag(1 << bit)
    return InitRequest(2, 7, minor, 131072, flags)


@pytest.mark.parametrize("rawio", [True, False])
@pytest.mark.parametrize("minor", range(31, 48))
def test_init_matrix(minor: int, rawio: bool) -> None:
    evidence = Evidence(rawio=rawio)
    for extended, bit42, bit43 in itertools.product((False, True), repeat=3):
        bits = tuple(bit for bit, on in ((42, bit42), (43, bit43)) if on)
        request = init(minor, extended=extended, bits=bits)
        decision = decide(request, policy="auto", evidence=evidence)
        required = decide(request, policy="require", evidence=evidence)
        assert "\n" not in decision.reason
        assert not decision.failed
        if extended and bit43 and minor <= 45:
            assert decision.data_path == "fmap"
            assert decision.candidates == (dialects.PULL, dialects.PUSH)
            assert decision.dialect is None
            assert decision.capability == 1 << 43
            assert not required.failed
            continue
        assert decision.data_path == "server"
        assert decision.candidates == ()
        assert decision.capability == 0
        assert required.failed
        assert required.reason == decision.reason
        if extended and bit43:
            assert "io_uring" in decision.reason
        elif extended and bit42 and minor == 42:
            assert "2025" in decision.reason
        else:
            assert "does not offer" in decision.reason
            assert ("CAP_SYS_RAWIO" in decision.reason) is not rawio


@pytest.mark.parametrize(
    ("forced", "evidence", "candidates"),
    [
        (None, Evidence(kallsyms=True), ["pull", "push"]),
        (None, Evidence(kallsyms=True, push_ioctl=False), ["pull"]),
        (None, Evidence(push_ioctl=True), ["push"]),
        ("pull", Evidence(), ["pull"]),
        ("push", Evidence(kallsyms=False, push_ioctl=True), ["push"]),
        ("push-interleave", Evidence(), ["push-interleave"]),
        (None, Evidence(kallsyms=False, push_ioctl=False), []),
        (None, Evidence(), []),
    ],
)
@pytest.mark.parametrize("minor", [46, 47])
def test_bit_43_of_newer_kernels_needs_evidence(
    minor: int, forced: str | None, evidence: Evidence, candidates: list[str]
) -> None:
    decision = decide(init(minor, bits=(41, 43)), policy="auto", forced=forced, evidence=evidence)
    assert [d.name for d in decision.candidates] == candidates
    assert decision.data_path == ("fmap" if candidates else "server")
    assert (decision.dialect is not None) is (len(candidates) == 1)


def test_the_ioctl_probe_tells_push_from_pull() -> None:
    request = init(45, bits=(43,))
    assert decide(request, policy="auto", evidence=Evidence(push_ioctl=True)).dialect == dialects.PUSH
    assert decide(request, policy="auto", evidence=Evidence(push_ioctl=False)).dialect == dialects.PULL


def test_a_configured_ioctl_number_comes_with_the_push_candidates() -> None:
    decision = decide(init(45, bits=(43,)), policy="auto", push_ioctl=0x4010E505)
    assert [d.push_ioctl for d in decision.candidates] == [None, 0x4010E505]


def test_never_asks_for_nothing_and_does_not_fail() -> None:
    decision = decide(init(45, bits=(43,)), policy="never", forced="pull")
    assert (decision.data_path, decision.failed, decision.candidates) == ("server", False, ())


@pytest.mark.parametrize("name", ["rfc1", "rfc2"])
def test_generations_of_2025_are_refused_in_words(name: str) -> None:
    decision = decide(init(42, bits=(42,)), policy="require", forced=name)
    assert decision.failed
    assert "not served" in decision.reason


def test_forcing_a_dialect_does_not_replace_the_capability_bit() -> None:
    decision = decide(init(46), policy="require", forced="push")
    assert decision.failed
    assert "does not offer" in decision.reason


@pytest.mark.parametrize(
    ("forced", "has_ioctl", "other"),
    [("push", False, "pull"), ("push-interleave", False, "pull"), ("pull", True, "push")],
)
def test_a_dialect_that_the_kernel_cannot_speak(forced: str, has_ioctl: bool, other: str) -> None:
    """The mount fails also with fmap=auto: whoever names a dialect wants extent maps."""
    decision = decide(init(45, bits=(43,)), policy="auto", forced=forced, evidence=Evidence(push_ioctl=has_ioctl))
    assert decision.failed
    assert f"mount with dialect={other}" in decision.reason


def test_unknown_dialect() -> None:
    with pytest.raises(UsageError, match="pull, push, push-interleave"):
        decide(init(45), policy="auto", forced="g5")


def test_rows_agree_with_the_protocol() -> None:
    rows = {d.name: d for d in dialects.GENERATIONS}
    assert len(rows) == len(dialects.GENERATIONS)
    assert {name for name, d in rows.items() if d.refusal} == {"rfc1", "rfc2"}
    assert {name: (d.get_fmap, d.get_daxdev, d.get_fmap_request_size) for name, d in rows.items()} == {
        "rfc1": (53, 54, 0),
        "rfc2": (53, 54, 8),
        "pull": (54, 55, 0),
        "push": (54, None, 8),
        "push-interleave": (54, None, 8),
    }
    assert {name: (d.max_extents, d.max_strips, d.alignment) for name, d in rows.items() if not d.refusal} == {
        "pull": (32, 32, 2 << 20),
        "push": (699049, 0, 2 << 20),
        "push-interleave": (699049, 32, 4096),
    }
    for d in rows.values():
        assert (d.registration is Registration.PUSH) == (d.push_ioctl is not None) == (d.get_daxdev is None)
        assert ExtentKind.SIMPLE in d.extent_kinds
        assert (ExtentKind.INTERLEAVED in d.extent_kinds) == (d.max_strips > 0)
        assert d.max_devindex < d.slots


def test_the_largest_simple_map_fits_the_reply() -> None:
    assert 32 + 24 * dialects.PUSH.max_extents <= dialects.PUSH.max_reply < 32 + 24 * (dialects.PUSH.max_extents + 1)
    assert 32 + 24 * dialects.PULL.max_extents <= dialects.PULL.max_reply


BOTH = (dialects.PULL, dialects.PUSH)


def test_settle() -> None:
    assert dialects.settle(BOTH, -errno.ENOTTY) is dialects.PULL
    assert dialects.settle(BOTH, 0) is dialects.PUSH
    assert dialects.settle(BOTH, 1) is dialects.PUSH


@pytest.mark.parametrize(
    ("candidates", "result", "words"),
    [
        (BOTH, -errno.EOPNOTSUPP, "fsdev_dax"),
        (BOTH, -errno.EBUSY, "another mount"),
        (BOTH, -errno.EPERM, "CAP_SYS_RAWIO"),
        (BOTH, -errno.EIO, "earlier attempt"),
        (BOTH, -errno.EINVAL, "EINVAL"),
        ((dialects.PUSH,), -errno.ENOTTY, "dialect=pull"),
        ((dialects.PULL,), 0, "dialect=push"),
    ],
)
def test_settle_fails_in_words(candidates: tuple[dialects.Dialect, ...], result: int, words: str) -> None:
    with pytest.raises(NegotiationError, match=words):
        dialects.settle(candidates, result)


def test_probe_of_a_descriptor_without_the_ioctl() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        assert dialects.probe_push_ioctl(fd) is False
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"0000000000000000 t famfs_fuse_iomap_begin\t[fuse]\n", True),
        (b"0000000000000000 t famfs_fuse_iomap_begin\n", True),
        (b"0000000000000000 t famfs_fuse_iomap_begin.cold\t[fuse]\n", True),
        (b"0000000000000000 t famfs_fuse_iomap_beginning\t[fuse]\n", False),
        (b"0000000000000000 t not_famfs_fuse_iomap_begin\n", False),
        (b"", False),
    ],
)
def test_kallsyms(tmp_path: Path, text: bytes, found: bool) -> None:
    path = tmp_path / "kallsyms"
    path.write_bytes(b"0000000000000000 T fuse_dev_open\t[fuse]\n" + text)
    assert dialects.kallsyms_evidence(kernels.SYSTEM, path) is found


def test_kallsyms_of_the_module_and_of_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "kallsyms"
    path.write_bytes(b"0000000000000000 t famfs_fuse_iomap_begin\t[famfs]\n")
    assert dialects.kallsyms_evidence(kernels.MODULE, path) is True
    assert dialects.kallsyms_evidence(kernels.SYSTEM, path) is False
    path.write_bytes(b"0000000000000000 t famfs_fuse_iomap_begin\n")
    assert dialects.kallsyms_evidence(kernels.MODULE, path) is False


def test_kallsyms_unreadable(tmp_path: Path) -> None:
    assert dialects.kallsyms_evidence(kernels.SYSTEM, tmp_path / "absent") is None
