# SPDX-License-Identifier: Apache-2.0
"""What a service manager is told, and what it keeps for the next start: sd_notify(3) and the file descriptor store.

Messages are datagrams to a socket that the manager names in the environment. Only what has to do with the store waits
for the manager, and where there is none, nothing is sent.
"""

import array
import logging
import os
import select
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Self

log = logging.getLogger(__name__)

FIRST_FD = 3
"""Where the descriptors begin that a manager passes (sd_listen_fds(3))."""
_SEND_SECONDS = 5.0
_BARRIER_SECONDS = 10.0


class ServiceManager:
    """The manager that started this process, if there is one."""

    def __init__(self, address: str, watchdog: float = 0.0) -> None:
        """`address` is that of its socket; empty: nobody listens. `watchdog`: seconds within which it wants a sign of
        life, 0 for none."""
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = watchdog if address else 0.0

    @classmethod
    def of_process(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As the environment of this process says."""
        microseconds = environment.get("WATCHDOG_USEC", "")
        wanted = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()) and microseconds.isdigit()
        return cls(environment.get("NOTIFY_SOCKET", ""), int(microseconds) / 1e6 if wanted else 0.0)

    @property
    def present(self) -> bool:
        """Whether anybody listens."""
        return self._socket is not None

    def send(self, *lines: str, descriptors: Sequence[int] = (), wait: float = 0.0) -> bool:
        """Send assignments such as `READY=1`, with copies of descriptors; whether that worked.

        A manager that is gone, or does not take messages for `wait` seconds, must not end the service: that is a note
        in the log.
        """
        if self._socket is None:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._socket.settimeout(wait)
            self._socket.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)
        except OSError as error:
            log.debug("the service manager does not hear %s: %s", lines, error)
            return False
        return True

    def status(self, text: str) -> None:
        """Say in words what is going on."""
        self.send(f"STATUS={text}")

    def ready(self, text: str) -> None:
        """The service can be used. May be repeated."""
        self.send("READY=1", f"STATUS={text}")

    def be_patient(self, seconds: float) -> None:
        """Have the manager wait that long for the next sign of life, if it wants any, until `as_usual`."""
        if self.watchdog:
            self.send(f"WATCHDOG_USEC={int(1e6 * max(seconds, self.watchdog))}")

    def as_usual(self) -> None:
        """Have the manager expect signs of life as often as it has asked for."""
        if self.watchdog:
            self.send(f"WATCHDOG_USEC={int(1e6 * self.watchdog)}")

    def store(self, descriptors: Mapping[str, int]) -> bool:
        """Give descriptors into the manager's keeping, and say whether it has taken note of all of them."""
        sent = [
            self.send("FDSTORE=1", f"FDNAME={name}", descriptors=[descriptor], wait=_SEND_SECONDS)
            for name, descriptor in descriptors.items()
        ]
        return all(sent) and self.barrier()

    def discard(self, names: Sequence[str]) -> None:
        """Have the manager close what it keeps under these names."""
        for name in names:
            self.send("FDSTOREREMOVE=1", f"FDNAME={name}", wait=_SEND_SECONDS)

    def barrier(self) -> bool:
        """Wait until the manager has dealt with everything that was sent before; whether it has."""
        hear, speak = os.pipe()
        try:
            sent = self.send("BARRIER=1", descriptors=[speak], wait=_SEND_SECONDS)
        finally:
            os.close(speak)
        try:
            poll = select.poll()
            poll.register(hear, 0)
            return sent and bool(poll.poll(1000 * _BARRIER_SECONDS))
        finally:
            os.close(hear)


def take_passed(environment: MutableMapping[str, str] = os.environ) -> dict[str, int]:
    """The descriptors that a manager has passed to this process, by name. No later program finds them again.

    Of several with one name the last counts, as in the store, where each start may add some.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    passed: dict[str, int] = {}
    for descriptor, name in zip(range(FIRST_FD, FIRST_FD + int(count)), names, strict=False):
        os.set_inheritable(descriptor, False)
        if name in passed:
            os.close(passed[name])
        passed[name] = descriptor
    return passed
