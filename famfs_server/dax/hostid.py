# SPDX-License-Identifier: Apache-2.0
"""Who this host is: the system UUID in a file, which decides who is master (docs/format.md 3)."""

import errno
import os
from pathlib import Path
from uuid import UUID, uuid4

from famfs_server.errors import DeviceError

DEFAULT_FILE = "/opt/famfs/system_uuid"
ENVIRONMENT = "FAMFS_SYSTEM_UUID_FILE"
_TEXT_LENGTH = 36


class HostIdError(DeviceError):
    """The system UUID cannot be read or made."""


def uuid_file() -> Path:
    """Where this host's UUID is kept."""
    return Path(os.environ.get(ENVIRONMENT) or DEFAULT_FILE)


def system_uuid() -> UUID:
    """This host's UUID, made on first need. Raises HostIdError with the cause."""
    path = uuid_file()
    try:
        if not path.is_file():
            _create(path)
        text = path.read_bytes().replace(b"\0", b" ").split()
    except OSError as error:
        raise HostIdError(f"cannot read the system UUID in {path}: {_reason(error)}") from error
    try:
        return UUID(text[0][:_TEXT_LENGTH].decode("ascii"))
    except (IndexError, ValueError) as error:
        raise HostIdError(
            f"{path} holds no UUID; write the one this host had before into it, or remove it to get a new one"
        ) from error


def _create(path: Path) -> None:
    """A new UUID in the file: 36 characters and a NUL, readable by all, complete or absent."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary.write_bytes(str(uuid4()).encode("ascii") + b"\0")
        temporary.chmod(0o444)
        try:
            os.link(temporary, path)
        except FileExistsError:
            if not path.is_file():
                raise HostIdError(f"{path} is not a regular file; move it away") from None
        finally:
            temporary.unlink()
    except OSError as error:
        raise HostIdError(f"cannot create the system UUID in {path}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)
