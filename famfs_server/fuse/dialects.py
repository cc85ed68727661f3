# SPDX-License-Identifier: Apache-2.0
"""The generations of famfs kernels, one row each, and the decision which of them a kernel speaks.

famfs over FUSE was proposed several times and no two proposals agree on the wire (protocol 1.1). Everything
in which they differ is data here; a new generation is a new row and recorded bytes in a test. `decide` turns
an INIT request and what else is known about the kernel into a data path (protocol 1.4).
"""

import errno
import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Literal

from famfs_server.errors import NegotiationError, UsageError
from famfs_server.fuse import kernels
from famfs_server.fuse.abi import BACKING_MAP, InitFlag
from famfs_server.fuse.kernels import KernelFuse

MIB = 1 << 20

DEFAULT_PUSH_IOCTL = 0x4010E504
"""FUSE_DEV_IOC_DAXDEV_OPEN as _IOW(229, 4, 16 bytes): the obvious number, confirmed by nobody."""

Policy = Literal["require", "auto", "never"]


class ExtentKind(Enum):
    """How a map describes the bytes of a file."""

    SIMPLE = "simple"
    INTERLEAVED = "interleaved"


class Registration(Enum):
    """How the kernel comes to know the devices that maps refer to."""

    PULL = "the kernel asks with GET_DAXDEV"
    PUSH = "the server hands descriptors over by ioctl, before the first open"


class FetchPoint(Enum):
    """After which request the kernel asks for a map."""

    LOOKUP = "LOOKUP"
    OPEN = "OPEN"


@dataclass(frozen=True)
class Dialect:
    """One generation of the protocol. Sizes and alignments are in bytes."""

    name: str
    """What `-o dialect=` calls it."""
    title: str
    capability: InitFlag
    minors: range
    """Minor versions in which `capability` means famfs without further evidence."""
    get_fmap: int
    """Opcode."""
    get_daxdev: int | None
    """Opcode; None where devices are pushed."""
    get_fmap_request_size: int
    """Length of the body of GET_FMAP."""
    fetch: FetchPoint
    extent_kinds: frozenset[ExtentKind]
    max_extents: int
    max_strips: int
    alignment: int
    """Offsets and lengths of extents are multiples of this."""
    chunk_sizes: frozenset[int] | None
    """The only chunk sizes of interleaved extents; None: every multiple of `alignment` but 0."""
    max_devindex: int
    slots: int
    """Devices that one connection has room for."""
    size_probe: bool
    """A map that is too large for the kernel's buffer is announced by a header and asked for again."""
    max_reply: int
    registration: Registration
    push_ioctl: int | None = None
    refusal: str | None = None
    """Why this generation is recognised but not served."""


_BOTH_KINDS = frozenset(ExtentKind)
_FMAP_BUFSIZE_MAX = 16 * MIB
_SIMPLE_IN_16_MIB = (_FMAP_BUFSIZE_MAX - 32) // 24

RFC1 = Dialect(
    name="rfc1",
    title="first proposal of April 2025",
    capability=InitFlag(1 << 42),
    minors=range(42, 43),
    get_fmap=53,
    get_daxdev=54,
    get_fmap_request_size=0,
    fetch=FetchPoint.LOOKUP,
    extent_kinds=_BOTH_KINDS,
    max_extents=2,
    max_strips=16,
    alignment=2 * MIB,
    chunk_sizes=None,
    max_devindex=23,
    slots=24,
    size_probe=False,
    max_reply=4096,
    registration=Registration.PULL,
    refusal="asks by inode number at LOOKUP and opens files without a map when that fails",
)
RFC2 = replace(
    RFC1,
    name="rfc2",
    title="second proposal of July 2025",
    get_fmap_request_size=8,
    fetch=FetchPoint.OPEN,
    size_probe=True,
    max_reply=_FMAP_BUFSIZE_MAX,
    refusal="goes on without a map, as an ordinary FUSE file, when GET_FMAP fails",
)
PULL = Dialect(
    name="pull",
    title="proposals V3 to V10 of 2026, devices pulled",
    capability=InitFlag.DAX_FMAP,
    minors=range(46),
    get_fmap=54,
    get_daxdev=55,
    get_fmap_request_size=0,
    fetch=FetchPoint.OPEN,
    extent_kinds=_BOTH_KINDS,
    max_extents=32,
    max_strips=32,
    alignment=2 * MIB,
    chunk_sizes=None,
    max_devindex=0,
    slots=24,
    size_probe=False,
    max_reply=4096,
    registration=Registration.PULL,
)
PUSH = replace(
    PULL,
    name="push",
    title="kernels of June 2026 and later, devices pushed, simple extents only",
    get_daxdev=None,
    get_fmap_request_size=8,
    extent_kinds=frozenset({ExtentKind.SIMPLE}),
    max_extents=_SIMPLE_IN_16_MIB,
    max_strips=0,
    slots=64,
    size_probe=True,
    max_reply=_FMAP_BUFSIZE_MAX,
    registration=Registration.PUSH,
    push_ioctl=DEFAULT_PUSH_IOCTL,
)
PUSH_INTERLEAVE = replace(
    PUSH,
    name="push-interleave",
    title="kernels of June 2026 and later, devices pushed, interleaved extents and 4 KiB pages",
    extent_kinds=_BOTH_KINDS,
    max_strips=32,
    alignment=4096,
    chunk_sizes=frozenset({4096, 2 * MIB}),
    max_devindex=63,
)

GENERATIONS: tuple[Dialect, ...] = (RFC1, RFC2, PULL, PUSH, PUSH_INTERLEAVE)

EVIDENCE_SYMBOL = "famfs_fuse_iomap_begin"
"""A function that only kernels with famfs over FUSE have."""


@dataclass(frozen=True)
class InitRequest:
    """An INIT request, taken apart. `flags` holds bits 32 and up only if the request carries INIT_EXT."""

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


@dataclass(frozen=True)
class Evidence:
    """What is known about the kernel besides its INIT. None: not looked at, or not to be found out."""

    kallsyms: bool | None = None
    """The kernel has EVIDENCE_SYMBOL."""
    push_ioctl: bool | None = None
    """The kernel knows the ioctl that pushes devices (`probe_push_ioctl`)."""
    rawio: bool = True
    """The process that mounts holds CAP_SYS_RAWIO."""


@dataclass(frozen=True)
class Decision:
    """What INIT led to. `reason` is one sentence for the log and for `status`."""

    data_path: Literal["fmap", "server"]
    reason: str
    candidates: tuple[Dialect, ...] = field(default=())
    """The generations that the kernel can be; empty on the `server` path."""
    failed: bool = False
    """The policy asked for fmap and there is none: the mount has to be given up."""

    @property
    def explanation(self) -> str:
        """The reason, with the dialect that is spoken, or with those that are possible."""
        names = " or ".join(dialect.name for dialect in self.candidates)
        return f"{self.reason}, dialect {names}" if names else self.reason

    @property
    def dialect(self) -> Dialect | None:
        """The generation, if there is one and it is settled (else `settle` settles it)."""
        return self.candidates[0] if len(self.candidates) == 1 else None

    @property
    def capability(self) -> InitFlag:
        """The bit to put into the reply; none on the `server` path."""
        return self.candidates[0].capability if self.candidates else InitFlag(0)


def by_name(name: str) -> Dialect:
    """The generation that `-o dialect=NAME` means; UsageError for any other word."""
    for dialect in GENERATIONS:
        if dialect.name == name:
            return dialect
    names = ", ".join(dialect.name for dialect in GENERATIONS if dialect.refusal is None)
    raise UsageError(f"unknown dialect {name!r}: one of {names}")


def decide(
    request: InitRequest,
    *,
    policy: Policy,
    forced: str | None = None,
    evidence: Evidence | None = None,
    push_ioctl: int = DEFAULT_PUSH_IOCTL,
) -> Decision:
    """Choose the data path by protocol 1.4.

    `forced` is the operator's `-o dialect=`; it stands for evidence and narrows the candidates, but cannot
    replace the capability bit: a bit that the kernel did not offer is ignored in the reply (protocol 3.1).
    `push_ioctl` is the number that the push candidates come with.
    Raises UsageError if `forced` names no generation.
    """
    evidence = Evidence() if evidence is None else evidence
    wanted = None if forced is None else by_name(forced)
    if policy == "never":
        return Decision("server", "extent maps are turned off (fmap=never)")

    def without_maps(reason: str) -> Decision:
        return Decision("server", reason, failed=policy == "require")

    if wanted is not None and wanted.refusal is not None:
        return without_maps(f"dialect {wanted.name} ({wanted.title}) is not served: it {wanted.refusal}")
    minor = request.minor
    if not request.flags & InitFlag.DAX_FMAP:
        if request.flags & RFC1.capability and minor in RFC1.minors:
            return without_maps(
                f"the kernel speaks the famfs proposals of 2025 (bit 42, minor {minor}), which are not "
                "served: use a kernel with the protocol of 2026"
            )
        return without_maps(_not_offered(request, evidence))

    proof = _proof(minor, wanted, evidence)
    if proof is None:
        return without_maps(
            f"the kernel offers bit 43 with minor {minor}, where it stands for io_uring buffer pools, and "
            "nothing shows that it means famfs: say -o dialect=NAME if it does"
        )
    if wanted is not None and (problem := _spoken_otherwise(wanted, evidence)):
        return Decision("server", problem, failed=True)
    if wanted is not None:
        candidates: tuple[Dialect, ...] = (wanted,)
    elif evidence.push_ioctl is True:
        # The two push texts cannot be told apart; what the stricter takes, both take.
        candidates = (PUSH,)
    elif evidence.push_ioctl is False:
        candidates = (PULL,)
    else:
        candidates = (PULL, PUSH)
    candidates = tuple(replace(d, push_ioctl=push_ioctl) if d.push_ioctl else d for d in candidates)
    return Decision("fmap", f"the kernel offers FUSE_DAX_FMAP ({proof})", candidates)


def _spoken_otherwise(wanted: Dialect, evidence: Evidence) -> str:
    """Why the kernel cannot speak the dialect that the operator has named, or nothing."""
    pushes = wanted.registration is Registration.PUSH
    if evidence.push_ioctl is None or pushes == evidence.push_ioctl:
        return ""
    how = "registers devices by ioctl" if evidence.push_ioctl else "has no ioctl to register devices"
    other = PUSH if evidence.push_ioctl else PULL
    return f"dialect={wanted.name} cannot be: the kernel {how}; mount with dialect={other.name}"


def _proof(minor: int, wanted: Dialect | None, evidence: Evidence) -> str | None:
    if minor in PULL.minors:
        return f"bit 43, minor {minor}"
    if wanted is not None:
        return f"bit 43, minor {minor}, by option dialect={wanted.name}"
    if evidence.kallsyms:
        return f"bit 43, minor {minor}, and the symbol {EVIDENCE_SYMBOL}"
    if evidence.push_ioctl:
        return f"bit 43, minor {minor}, and the ioctl that registers devices"
    return None


def _not_offered(request: InitRequest, evidence: Evidence) -> str:
    what = f"the kernel (FUSE 7.{request.minor}) does not offer FUSE_DAX_FMAP"
    if not evidence.rawio:
        return f"{what}, and would not without CAP_SYS_RAWIO, which this process lacks: mount with it"
    if not request.flags & InitFlag.INIT_EXT:
        return f"{what}: it is older than extended INIT flags"
    return f"{what}: it has no famfs"


def with_interleave(decision: Decision) -> Decision:
    """A decision for PUSH, when the kernel has taken an interleaved map."""
    (push,) = decision.candidates
    return replace(decision, candidates=(replace(PUSH_INTERLEAVE, push_ioctl=push.push_ioctl),))


def settle(candidates: Sequence[Dialect], result: int) -> Dialect:
    """The generation among `candidates`, by the first attempt to push a device after INIT (protocol 1.4).

    `result` is what the ioctl returned, or -errno. Raises NegotiationError where the kernel took the ioctl
    and refused the device, since the slot is lost for this connection.
    """
    pull = [d for d in candidates if d.registration is Registration.PULL]
    push = [d for d in candidates if d.registration is Registration.PUSH]
    if result == -errno.ENOTTY:
        if pull:
            return pull[0]
        raise NegotiationError("the kernel has no such ioctl to register devices: mount with dialect=pull")
    if not push:
        raise NegotiationError("the kernel registers devices by ioctl: mount with dialect=push")
    if result >= 0:
        return push[0]
    number = -result
    causes = {
        errno.EPERM: "this process may not register devices (CAP_SYS_RAWIO)",
        errno.EBUSY: "another mount holds the device",
        errno.EOPNOTSUPP: "the device is not bound to fsdev_dax, or FUSE_DAX_FMAP is not active",
        errno.EIO: "an earlier attempt on this connection failed",
    }
    cause = causes.get(number, errno.errorcode.get(number, f"error {number}"))
    raise NegotiationError(f"the kernel refused the device: {cause}")


def probe_push_ioctl(fuse_fd: int, number: int = DEFAULT_PUSH_IOCTL) -> bool:
    """Does the kernel know the ioctl that pushes devices? To be asked before INIT is answered.

    The call carries no device (descriptor -1), so that no slot can be spoiled by it, and cannot succeed: a
    kernel without the ioctl says ENOTTY, one with it anything else. `fuse_fd` must be part of a mount.
    """
    try:
        fcntl.ioctl(fuse_fd, number, BACKING_MAP.pack(-1, 0, 0))
    except OSError as error:
        return error.errno != errno.ENOTTY
    return True


_SYMBOL_LINE = re.compile(rb"\s" + EVIDENCE_SYMBOL.encode() + rb"(?:\.\S+)?(?:\s+\[(\w+)\])?\s*$")


def kallsyms_evidence(kernel: KernelFuse, path: Path = Path("/proc/kallsyms")) -> bool | None:
    """Has this FUSE of the kernel the function that only one with famfs has? None if the symbols cannot be read.

    The module's function says nothing of the kernel's own FUSE, nor the other way round.
    """
    try:
        with path.open("rb") as symbols:
            found = [match for line in symbols if (match := _SYMBOL_LINE.search(line))]
    except OSError:
        return None
    in_module = kernel is kernels.MODULE
    return any((match[1] == kernels.MODULE.name.encode()) == in_module for match in found)
