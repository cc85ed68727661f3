# SPDX-License-Identifier: Apache-2.0
"""Capabilities: those that mounting needs, and their end once the mount is up.

A famfs kernel offers extent maps only to a mounter that holds CAP_SYS_RAWIO in the initial user namespace,
and the detached mount needs CAP_SYS_ADMIN, so both are checked before anything is opened. Capabilities belong
to threads: dropping them comes before the first thread is started.
"""

import ctypes
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import prctl

from famfs_server.errors import PrivilegeError

_log = logging.getLogger(__name__)

CAP_SYS_ADMIN: int = prctl.CAP_SYS_ADMIN
CAP_SYS_RAWIO: int = prctl.CAP_SYS_RAWIO

INITIAL_USER_NAMESPACE = 4026531837
"""Inode of /proc/self/ns/user in the initial user namespace, fixed by the kernel."""

OOM_SCORE_ADJ = -900
"""Nearly the last to be killed for memory, but not exempt."""

# python-prctl does not know this call.
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4

_SECUREBITS: int = (
    prctl.SECBIT_NOROOT
    | prctl.SECBIT_NOROOT_LOCKED
    | prctl.SECBIT_NO_SETUID_FIXUP
    | prctl.SECBIT_NO_SETUID_FIXUP_LOCKED
    | prctl.SECBIT_KEEP_CAPS_LOCKED
)

_libc = ctypes.CDLL(None, use_errno=True)


def holds(capability: int) -> bool:
    """Is this capability effective in the calling thread?"""
    sets: dict[int, dict[int, bool]] = prctl.get_caps((capability, prctl.CAP_EFFECTIVE))
    return sets[prctl.CAP_EFFECTIVE][capability]


def require_mount_capabilities() -> None:
    """Check that this thread can mount famfs with extent maps. Opens nothing.

    Raises PrivilegeError with one line that names what is missing.
    """
    names = {CAP_SYS_ADMIN: "CAP_SYS_ADMIN", CAP_SYS_RAWIO: "CAP_SYS_RAWIO"}
    missing = [name for capability, name in names.items() if not holds(capability)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise PrivilegeError(
            f"{' and '.join(missing)} {verb} missing: a server that directs the kernel to raw memory must "
            "hold CAP_SYS_ADMIN and CAP_SYS_RAWIO; mount as root, or grant them (in a container: --cap-add)"
        )
    # The kernel asks for them in the initial namespace; root of another one holds both and is refused.
    if os.stat("/proc/self/ns/user").st_ino != INITIAL_USER_NAMESPACE:
        raise PrivilegeError(
            "this process is in a user namespace of its own, where CAP_SYS_ADMIN and CAP_SYS_RAWIO do not "
            "count: mount from the initial one"
        )


def drop_all() -> None:
    """Give up every capability of this process for good, and the means to regain any.

    Raises PrivilegeError if one is left, or if threads run that would keep theirs.
    """
    keep_only(())


def keep_only(capabilities: Iterable[int], *, for_successor: bool = False) -> None:
    """Give up every capability but these, which stay permitted and effective, for this process only.

    In this order: bounding set (emptied), ambient set, securebits, the capabilities themselves,
    no_new_privs; at last the process is made undumpable. Without CAP_SETPCAP the bounding set and the
    securebits stay as they are: no_new_privs keeps an exec from gaining anything by them.
    `for_successor` leaves `capabilities` inheritable, without which `pass_on` could not give them to another program;
    by itself that gives nothing to anybody.
    Raises PrivilegeError as `drop_all`, and if one of `capabilities` is not held.
    """
    kept = frozenset(capabilities)
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise PrivilegeError(f"capabilities must be dropped before threads start, and {threads} run")
    try:
        if for_successor and kept:
            # Not possible any more once the bounding set is empty.
            prctl.set_caps((list(kept), (prctl.CAP_INHERITABLE,), True))
        if holds(prctl.CAP_SETPCAP):
            for capability in range(_last_capability() + 1):
                prctl.capbset_drop(capability)
        else:
            _log.debug("bounding set and securebits left as they are: CAP_SETPCAP is missing")
        if _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        if holds(prctl.CAP_SETPCAP):
            prctl.set_securebits(_SECUREBITS)
        dropped = [c for c in prctl.ALL_CAPS if c not in kept]
        changes = [(dropped, prctl.ALL_FLAGS, False)]
        if kept:
            changes.append((list(kept), (prctl.CAP_INHERITABLE,), for_successor))
            changes.append((list(kept), (prctl.CAP_PERMITTED, prctl.CAP_EFFECTIVE), True))
        prctl.set_caps(*changes)
        prctl.set_no_new_privs(1)
        prctl.set_dumpable(0)
    except OSError as error:
        raise PrivilegeError(f"capabilities cannot be dropped: {error.strerror}") from None
    _verify(sum(1 << capability for capability in kept), inheritable=for_successor)


def pass_on(capabilities: Iterable[int]) -> None:
    """Let the program that this process executes next have these capabilities, which it holds and `keep_only` left
    inheritable `for_successor`. `keep_only` takes that back. Raises PrivilegeError."""
    try:
        for capability in capabilities:
            if _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
    except OSError as error:
        raise PrivilegeError(f"capabilities cannot be passed on: {error.strerror}") from None


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def _verify(kept: int, *, inheritable: bool) -> None:
    # The kernel may know capabilities that python-prctl does not: believe the kernel only.
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    expected = {"CapPrm": kept, "CapEff": kept, "CapInh": kept if inheritable else 0, "CapAmb": 0, "NoNewPrivs": 1}
    for name, value in expected.items():
        if (found := int(status[name], 16)) != value:
            raise PrivilegeError(f"capabilities were not dropped: {name} is {found:#x} and not {value:#x}")


def prefer_survival() -> None:
    """Ask the kernel to spare this process when memory is short: its own mount may be what frees memory.

    IO_FLUSHER and a lower OOM score need CAP_SYS_RESOURCE and are skipped where they are refused.
    """
    try:
        prctl.set_io_flusher(1)
    except OSError as error:
        _log.debug("IO_FLUSHER is not set: %s", error.strerror)
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError as error:
        _log.debug("the OOM score stays: %s", error.strerror)
