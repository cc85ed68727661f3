# SPDX-License-Identifier: Apache-2.0
"""What clients of the control socket send, checked: everything that is wrong with it is an HttpError."""

import json
import sys
from typing import Any
from uuid import UUID

from famfs_server.volume.space import Interleave
from famfs_server.volume.volume import NewFile

_LARGEST_SIZE = (1 << 63) - 1
_LARGEST_ID = (1 << 32) - 2


class HttpError(Exception):
    """A request that ends with an HTTP status before any of its work has begun."""

    def __init__(self, status: int, line: str, *, number: int = 22, allow: str = "") -> None:
        super().__init__(line)
        self.status = status
        self.number = number
        self.allow = allow


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HttpError(400, "the body is not a JSON object")
    return value


def no_more(row: dict[str, Any]) -> None:
    """Refuse members that nobody has asked for."""
    if row:
        raise HttpError(400, f"unknown member {sorted(row)[0][:50]!r}")


def number(row: dict[str, Any], key: str, smallest: int, largest: int) -> int:
    """Take a whole number out of an object."""
    value = row.pop(key, None)
    if type(value) is not int or not smallest <= value <= largest:
        raise HttpError(400, f"{key} must be a whole number of {smallest} to {largest}")
    return value


def path_of(row: dict[str, Any]) -> bytes:
    """Take the path out of an object."""
    value = row.pop("path", None)
    if not isinstance(value, str) or not value:
        raise HttpError(400, "path must be a string that is not empty")
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise HttpError(400, "path has characters that stand for no byte") from None


def uuid_of(row: dict[str, Any]) -> UUID:
    """Take the UUID out of an object."""
    try:
        return UUID(row.pop("uuid", None))
    except (ValueError, TypeError, AttributeError):
        raise HttpError(400, "uuid must be a UUID") from None


def mode_of(row: dict[str, Any]) -> int:
    """Take the mode out of an object."""
    return number(row, "mode", 0, 0o7777)


def id_of(row: dict[str, Any], key: str) -> int:
    """Take a uid or gid out of an object."""
    return number(row, key, 0, _LARGEST_ID)


def new_directory(row: Any) -> tuple[bytes, int, int, int]:
    """Path, mode, uid and gid of a directory to be made, as /mkdir describes it."""
    if not isinstance(row, dict):
        raise HttpError(400, "each directory must be an object")
    found = path_of(row), mode_of(row), id_of(row, "uid"), id_of(row, "gid")
    no_more(row)
    return found


def new_file(row: Any) -> NewFile:
    """A file to be made, as /create and /put describe it."""
    if not isinstance(row, dict):
        raise HttpError(400, "each file must be an object")
    path, size = path_of(row), number(row, "size", 1, _LARGEST_SIZE)
    mode, uid, gid = mode_of(row), id_of(row, "uid"), id_of(row, "gid")
    striping = row.pop("interleave", None)
    no_more(row)
    if striping is None:
        return NewFile(path, size, mode, uid, gid)
    if not isinstance(striping, dict):
        raise HttpError(400, "interleave must be an object")
    interleave = Interleave(*(number(striping, key, 0, sys.maxsize) for key in ("buckets", "strips", "chunk_size")))
    no_more(striping)
    return NewFile(path, size, mode, uid, gid, interleave)
