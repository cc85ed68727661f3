# SPDX-License-Identifier: Apache-2.0
"""A client of the control socket: `python -m bench.control DIRECTORY`. Speaks with the bench as client.py does.

`dump` asks for the whole cache again and again until SIGTERM; `create` makes the files of the job in requests as large
as the server takes them.
"""

import json
import signal
import sys
import time

from famfs_server.daemon.control_client import CREATE_LIMIT, ControlClient, FileRequest
from famfs_server.errors import FamfsError

_stopped = False


def _stop(number: int, frame: object) -> None:
    global _stopped
    _stopped = True


def dump(control: ControlClient) -> int:
    """Ask until told to stop; the number of answers."""
    count = 0
    while not _stopped:
        control.request("GET", "/icache_dump")
        count += 1
    return count


def create(control: ControlClient, files: list[FileRequest]) -> int:
    """Make the files; their number."""
    return sum(len(control.create(files[at : at + CREATE_LIMIT])) for at in range(0, len(files), CREATE_LIMIT))


def main() -> None:
    """Do the job on standard input."""
    signal.signal(signal.SIGTERM, _stop)
    control = ControlClient(sys.argv[1])
    job = json.loads(sys.stdin.readline())
    files = [FileRequest(name.encode(), job["size"], 0o644, 0, 0) for name in job.get("names", ())]
    result: dict[str, object]
    try:
        print("ready", flush=True)
        sys.stdin.readline()
        start = time.monotonic_ns()
        count = create(control, files) if job["action"] == "create" else dump(control)
        result = {"count": count, "start": start, "end": time.monotonic_ns()}
    except FamfsError as error:
        result = {"error": str(error), "errno": error.errno}
    print(json.dumps(result), flush=True)


main()
