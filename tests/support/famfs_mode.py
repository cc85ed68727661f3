# SPDX-License-Identifier: Apache-2.0
"""A server whose device is in famfs mode, for a stock kernel: `famfs_mode.py DEVICE DIRECTORY RUN_DIRECTORY HOST`.

DEVICE is an emulated one that is said to be in famfs mode, so the server may not map it. A stock kernel takes no maps;
so, and in nothing else, the process that serves `.meta` before there is a volume differs from the real one: it also
answers READ, from the image, and what is read stays in the page cache. With `--as-it-is` it does not differ either.
"""

import logging
import os
import shutil
import sys
from pathlib import Path
from uuid import UUID

from famfs_server.daemon import bootstrap, worker
from famfs_server.daemon.locking import lock_for_mount
from famfs_server.daemon.options import parse_options
from famfs_server.daemon.supervisor import Supervisor, exit_process
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.errors import FamfsError
from famfs_server.fuse import abi, negotiation
from famfs_server.fuse.abi import Opcode
from famfs_server.fuse.dialects import PULL, Decision
from famfs_server.fuse.metaplane import MetaPlane
from famfs_server.fuse.session import BUFFER, Session
from famfs_server.omf import layout


class ReadingPlane(MetaPlane):
    """The plane of `.meta` for a kernel that reads."""

    image = -1

    def _payload(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        if opcode != Opcode.READ:
            return super()._payload(opcode, nodeid, body)
        _, offset, size, *_ = abi.READ_IN.unpack_from(body)
        start = {4: layout.SUPERBLOCK_OFFSET, 5: layout.LOG_OFFSET}[nodeid]
        return os.pread(self.image, min(size, self._attr(nodeid)[1] - offset), start + offset)


class OnStockKernel(Supervisor):
    """A supervisor whose first process agrees to the server path and answers reads."""

    def _serve_meta(self, session: Session, messages: int, lengths: int) -> int:
        data = os.read(session.fuse, BUFFER)
        request = negotiation.parse_init_request(data)
        decision = Decision("server", "a stock kernel, for a test")
        plane = ReadingPlane(Decision("fmap", "", (PULL,)), (self.device.path,), bootstrap.LogLength(lengths))
        plane.image = self.device.fd
        os.write(session.fuse, negotiation.own_reply(request, decision, max_write=session.max_write))
        worker.tell(messages, worker.ready_message(worker.Negotiated(data, decision)))
        return bootstrap.answer_until(lengths, session.fuse, plane)


def main(path: str, place: str, directory: str, host: str, *words: str) -> int:
    """Mount and serve until the end."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = DaxDevice.open(path)
    device.mode = Mode.FSDEV
    run_directory = Path(directory)
    run_directory.mkdir(parents=True)
    kind = Supervisor if "--as-it-is" in words else OnStockKernel
    try:
        lock_for_mount(device, UUID(host))
        # What has been read must stay: a page that the worker misses it would have to ask itself for.
        options = parse_options(path, place, ("cache=always",))
        kind(options, device, UUID(host), run_directory, ready=lambda: print("ready", flush=True)).run()
    except FamfsError as error:
        print(f"error: {error}", flush=True)
        return error.exit_status
    finally:
        shutil.rmtree(run_directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
