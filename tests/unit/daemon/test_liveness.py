# SPDX-License-Identifier: Apache-2.0
"""When a supervisor gives up on its workers, and when it takes one for dead; with real records."""

import os
import socket
from collections.abc import Iterator

import pytest

from famfs_server.daemon import liveness
from famfs_server.daemon.liveness import DOUBTFUL_DEATHS, HUNG_SECONDS, MAX_DEATHS, SOON_SECONDS, Deaths, Pulse
from famfs_server.fuse import abi
from famfs_server.fuse.session import Session


class Clock:
    """A time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What stands for the kernel, and for /dev/fuse."""
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, fuse:
        yield kernel, fuse


@pytest.fixture
def kernel(ends: tuple[socket.socket, socket.socket]) -> socket.socket:
    return ends[0]


@pytest.fixture
def session(ends: tuple[socket.socket, socket.socket]) -> Iterator[Session]:
    session = Session.create(ends[1].fileno())
    yield session
    os.close(session.record.fd)
    os.close(session.namespace)
    session.libfuse_end.close()
    session.our_end.close()


def take(session: Session, unique: int) -> None:
    """The worker reads a request."""
    header = abi.IN_HEADER.pack(abi.IN_HEADER.size, 3, unique, 1, 0, 0, 1, 0)
    session.record.buffer[: len(header)] = header


def serve(session: Session, unique: int) -> None:
    """The worker reads a request and answers it."""
    take(session, unique)
    session.record.done(unique)


# -- deaths -------------------------------------------------------------------------------------


def test_workers_that_serve_nothing_are_given_up(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    for _ in range(MAX_DEATHS - 1):
        clock.now += 1
        assert not deaths.another()
        deaths.begin()
    assert deaths.another()


def test_workers_that_serve_are_replaced_for_ever(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    for number in range(100):
        serve(session, 2 * number + 2)
        assert not deaths.another()
        deaths.begin()


def test_one_that_serves_makes_up_for_those_before(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    for number in range(5):
        for _ in range(MAX_DEATHS - 1):
            assert not deaths.another()
            deaths.begin()
        serve(session, 2 * number + 2)
        assert not deaths.another()
        deaths.begin()


def test_idle_worker_that_has_lived_does_not_count(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    for _ in range(3 * MAX_DEATHS):
        clock.now += SOON_SECONDS + 1
        assert not deaths.another()
        deaths.begin()


def test_killed_workers_that_had_begun_well_are_replaced_for_ever(session: Session, clock: Clock) -> None:
    """Nothing is in hand, so no request was the cause, whoever kills them and however soon."""
    deaths = Deaths(session.record)
    for _ in range(10 * MAX_DEATHS):
        session.record.beat()
        clock.now += 0.1
        assert not deaths.another(from_outside=True)
        deaths.begin()


def test_request_that_kills_two_becomes_poison(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    serve(session, 2)
    take(session, 4)
    assert not deaths.another()
    assert session.record.poison == 0
    deaths.begin()
    # Sent again, and in hand at the next death.
    take(session, 4 | abi.UNIQUE_RESEND)
    assert not deaths.another()
    assert session.record.poison == 4


def replace(session: Session, deaths: Deaths, *, from_outside: bool = False) -> bool:
    """A worker has died and the next one starts, as the supervisor does it; whether that was one death too many."""
    done = deaths.another(from_outside=from_outside)
    session.drain()
    session.record.taken_over()
    deaths.begin()
    return done


def recover(session: Session) -> None:
    """The next worker asks for what the last one had in hand."""
    session.record.forget_held()
    session.record.recovered()


def test_worker_that_dies_before_it_asks_is_not_killed_by_a_request(session: Session, clock: Clock) -> None:
    """Two deaths, the second one of a worker that had not read anything: the request has killed at most one."""
    deaths = Deaths(session.record)
    serve(session, 2)
    take(session, 4)
    assert not replace(session, deaths)
    assert not replace(session, deaths)
    assert session.record.poison == 0
    # The third one reads it, and dies of it, too.
    recover(session)
    take(session, 4 | abi.UNIQUE_RESEND)
    assert not replace(session, deaths)
    assert session.record.poison == 4


def test_request_is_not_blamed_for_what_somebody_else_has_done(session: Session, clock: Clock) -> None:
    """Workers are killed with the same request in hand: that may be chance, but not for ever."""
    deaths = Deaths(session.record)
    for _ in range(DOUBTFUL_DEATHS):
        assert session.record.poison == 0
        serve(session, 2)
        take(session, 4 | abi.UNIQUE_RESEND)
        assert not replace(session, deaths, from_outside=True)
        recover(session)
    assert session.record.poison == 4


def test_request_that_kills_libfuse_again_and_again_becomes_poison(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    for number in range(DOUBTFUL_DEATHS):
        assert session.record.poison == 0
        for unique in (4, 6 + 2 * number):
            take(session, unique | abi.UNIQUE_RESEND)
            session.record.relayed(unique | abi.UNIQUE_RESEND)
            session.record.done(unique | abi.UNIQUE_RESEND)
        assert not replace(session, deaths)
        recover(session)
    assert session.record.poison == 4


def test_different_requests_are_no_poison(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    for number in range(10):
        serve(session, 4 * number + 2)
        take(session, 4 * number + 4)
        assert not deaths.another()
        deaths.begin()
    assert session.record.poison == 0


def test_same_request_counts_even_if_others_are_answered(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    outcome = []
    for number in range(MAX_DEATHS + 1):
        serve(session, 100 + 2 * number)
        take(session, 4)
        outcome.append(deaths.another())
        deaths.begin()
    assert outcome == [False] * MAX_DEATHS + [True]


# -- pulse --------------------------------------------------------------------------------------


def pass_time(clock: Clock, pulse: Pulse, seconds: float) -> bool:
    """Look every second, as the supervisor does; whether the worker was lost at any time."""
    lost = False
    while seconds > 0:
        clock.now += 1
        seconds -= 1
        lost = pulse.lost() or lost
    return lost


def test_idle_worker_is_not_lost(session: Session, clock: Clock) -> None:
    assert not pass_time(clock, Pulse(session), 100)


def test_worker_that_leaves_requests_waiting_is_lost(session: Session, kernel: socket.socket, clock: Clock) -> None:
    pulse = Pulse(session)
    assert not pass_time(clock, pulse, 50)
    kernel.send(b"a request")
    assert not pass_time(clock, pulse, HUNG_SECONDS - 1)
    assert pass_time(clock, pulse, 3)


def test_worker_that_is_busy_is_not_lost(session: Session, kernel: socket.socket, clock: Clock) -> None:
    pulse = Pulse(session)
    kernel.send(b"there is always one more")
    for number in range(30):
        serve(session, 2 * number + 2)
        assert not pass_time(clock, pulse, HUNG_SECONDS - 1)


def test_request_that_is_never_answered_is_a_sign_of_death(session: Session, clock: Clock) -> None:
    pulse = Pulse(session)
    take(session, 2)
    assert not pass_time(clock, pulse, HUNG_SECONDS - 1)
    assert pass_time(clock, pulse, 3)


def test_answered_request_that_nobody_has_noted_ends_with_its_worker(session: Session, clock: Clock) -> None:
    """Killed between the answer and the note of it; nobody asks for anything afterwards, and nobody is replaced."""
    deaths = Deaths(session.record)
    serve(session, 2)
    take(session, 4)
    assert not replace(session, deaths)
    pulse = Pulse(session)
    recover(session)
    assert not pass_time(clock, pulse, 100)


def test_worker_that_never_asks_for_what_is_owed_is_lost(session: Session, clock: Clock) -> None:
    deaths = Deaths(session.record)
    take(session, 4)
    assert not replace(session, deaths)
    pulse = Pulse(session)
    assert not pass_time(clock, pulse, HUNG_SECONDS - 1)
    assert pass_time(clock, pulse, 3)


def test_request_that_libfuse_keeps(session: Session, clock: Clock) -> None:
    pulse = Pulse(session)
    session.record.relayed(2)
    # Its plane still beats: slow, but alive.
    for _ in range(20):
        session.record.beat()
        assert not pass_time(clock, pulse, 1)
    assert pass_time(clock, pulse, HUNG_SECONDS + 2)


def test_new_worker_has_its_time(session: Session, kernel: socket.socket, clock: Clock) -> None:
    pulse = Pulse(session)
    kernel.send(b"a request")
    assert pass_time(clock, pulse, HUNG_SECONDS + 2)
    pulse.begin()
    assert not pass_time(clock, pulse, HUNG_SECONDS - 1)
