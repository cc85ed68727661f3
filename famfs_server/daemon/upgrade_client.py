# SPDX-License-Identifier: Apache-2.0
"""Asking a mount's supervisor to hand the mount over to the program that is installed now."""

import json
import socket
from typing import Any

from famfs_server.daemon import local_socket
from famfs_server.errors import HandoverError

SUPERVISOR_SOCKET = "supervisor"
"""Beside the control socket, in the mount's run-time directory."""
ANSWER_SECONDS = 120.0
"""How long the answer may take: a check, and a replay where the tree is kept in another form."""
_LARGEST = 1 << 16


def ask(run_directory: str) -> dict[str, Any]:
    """Ask the supervisor of a mount for an upgrade; what came of it. Raises HandoverError, and nothing has changed then
    unless the line says so."""
    try:
        with (
            local_socket.address(run_directory, SUPERVISOR_SOCKET) as address,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection,
        ):
            connection.settimeout(ANSWER_SECONDS)
            # There is one thing to ask for here, so asking is to connect.
            connection.connect(address)
            answer = connection.recv(_LARGEST)
    except TimeoutError:
        raise HandoverError(f"the server did not answer within {ANSWER_SECONDS:.0f} seconds; see its log") from None
    except PermissionError:
        raise HandoverError("only root may have a mount served by another program: run this as root") from None
    except OSError as error:
        raise HandoverError(f"cannot reach the server's supervisor: {error.strerror}") from error
    if not answer:
        raise HandoverError("the server has ended, or refuses to talk to this user; see its log")
    result: dict[str, Any] = json.loads(answer)
    if "error" in result:
        raise HandoverError(result["error"])
    return result
