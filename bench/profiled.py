# SPDX-License-Identifier: Apache-2.0
"""A server whose request plane runs in the main thread under the sampler: `python -m bench.profiled IMAGE PLACE`.

Mount, kernel and request plane are the real ones; there is no libfuse behind, so that nothing but the plane is in the
profile, and what it does not answer is ENOSYS. With --replay it opens the volume and mounts nothing. Prints "ready"
once mounted, and the profile as JSON in the end. Samples are taken between SIGUSR1 and SIGUSR2.
"""

import errno
import json
import os
import signal
import sys

from bench.images import MASTER
from bench.sampling import Sampler
from famfs_server.dax.device import DaxDevice
from famfs_server.fuse import abi, negotiation
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.dialects import Decision
from famfs_server.fuse.filesystem import FileSystem, Settings
from famfs_server.fuse.mountapi import DetachedMount
from famfs_server.fuse.requests import RequestPlane
from famfs_server.fuse.session import Session
from famfs_server.volume.volume import Volume


def replay(image: str) -> None:
    """Open the volume under the sampler."""
    memory = DaxDevice.open(image).memory()
    sampler = Sampler()
    sampler.start()
    volume = Volume(memory, MASTER, image)
    sampler.stop()
    print(json.dumps({**sampler.as_json(), "done": volume.namespace.replayed, "what": "entry"}))


def serve(image: str, place: str) -> None:
    """Mount, and serve until the mount is gone."""
    volume = Volume(DaxDevice.open(image).memory(), MASTER, image)
    filesystem = FileSystem(volume, Settings(shadow=b"/"))
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    session = Session.create(fuse)
    record, buffer = session.record, session.record.buffer
    with DetachedMount.create(fuse, image) as mount:
        request = negotiation.parse_init_request(bytes(buffer[: os.readv(fuse, [buffer])]))
        # What libfuse would say: everything that it was offered, and no limits of its own.
        offered = abi.INIT_OUT.pack(7, 38, request.max_readahead, 0, 12, 9, session.max_write, 1, 0, 0, 0, 0, 0)
        answer = abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(offered), 0, request.unique) + offered
        decision = Decision("server", "profiling")
        os.write(fuse, negotiation.complete_reply(answer, request, decision, max_write=session.max_write))
        mount.attach(place)
    plane = RequestPlane(filesystem, session, fast=True)
    sampler = Sampler()
    answered: list[int] = []

    def begin(number: int, frame: object) -> None:
        answered.append(record.answered)
        sampler.start()

    def end(number: int, frame: object) -> None:
        sampler.stop()
        answered.append(record.answered)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    print("ready", flush=True)
    try:
        while True:
            length = os.readv(fuse, [buffer])
            if not plane.answer(length):
                _, opcode, unique, *_ = abi.IN_HEADER.unpack_from(buffer)
                if opcode != Opcode.DESTROY:
                    os.write(fuse, abi.error_reply(unique, errno.ENOSYS))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    print(json.dumps({**sampler.as_json(), "done": answered[1] - answered[0], "what": "request"}))


def main() -> None:
    """Profile what the arguments say."""
    if sys.argv[1] == "--replay":
        replay(sys.argv[2])
    else:
        serve(*sys.argv[1:])


main()
