# SPDX-License-Identifier: Apache-2.0
"""How new files are striped when nobody says: the contents of an `.alloc.cfg` (docs/format.md 9).

```
interleaved_alloc:
  nbuckets: 8
  nstrips: 4
  chunk_size: 2M
```
"""

import re
from pathlib import Path
from typing import Any

from famfs_server.errors import UsageError
from famfs_server.omf import layout
from famfs_server.sizes import SUFFIXES
from famfs_server.volume.space import Interleave

_SECTION = "interleaved_alloc"
_KEYS = frozenset({"nbuckets", "nstrips", "chunk_size"})
_LARGEST_FILE = 1 << 16


def parse(text: str) -> Interleave | None:
    """The striping that `text` asks for; nothing where all of its numbers are 0, which means contiguous files.

    Raises UsageError, in words, for anything else than the one mapping and its three keys: the reference ignores such a
    file, and files that should have been striped are not.
    """
    import yaml

    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or document.keys() != {_SECTION} or not isinstance(document[_SECTION], dict):
        raise UsageError(f"must hold one mapping, {_SECTION}, and nothing else")
    section = document[_SECTION]
    unknown = sorted(str(key) for key in section.keys() - _KEYS)
    if unknown:
        raise UsageError(f"has the unknown key {unknown[0]}; {_SECTION} knows {', '.join(sorted(_KEYS))}")
    buckets, strips = _number(section, "nbuckets"), _number(section, "nstrips")
    chunk_size = _number(section, "chunk_size", layout.ALLOC_UNIT if buckets or strips else 0)
    if not (buckets or strips or chunk_size):
        return None
    return Interleave(buckets, strips, chunk_size)


def _number(section: dict[Any, Any], key: str, default: int = 0) -> int:
    """A whole number; that of bytes may have a suffix."""
    value = section.get(key, default)
    if type(value) is int and value >= 0:
        return value
    found = re.fullmatch(r"(\d+)([kKmMgG]?)", value) if isinstance(value, str) and key == "chunk_size" else None
    if found is None:
        raise UsageError(f"{key} must be a whole number{' such as 2M' if key == 'chunk_size' else ''}, not {value!r}")
    return int(found[1]) * SUFFIXES[found[2].lower()]


class AllocConfig:
    """The striping that a file asks for, read again whenever the file has changed."""

    def __init__(self, path: Path, device_size: int, alloc_unit: int) -> None:
        """Sizes in bytes; they bound what can be asked for."""
        self._path = path
        self._device_size = device_size
        self._alloc_unit = alloc_unit
        self._seen: tuple[int, int, int] | None = None
        self._interleave: Interleave | None = None

    def __call__(self) -> Interleave | None:
        """The striping of new files; nothing where there is no such file. Raises UsageError for a bad one."""
        try:
            status = self._path.stat()
            seen = status.st_mtime_ns, status.st_size, status.st_ino
            if seen != self._seen:
                self._interleave = self._read()
                self._seen = seen
        except FileNotFoundError:
            self._seen = self._interleave = None
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be read: {error.strerror}") from None
        return self._interleave

    def _read(self) -> Interleave | None:
        try:
            with self._path.open("rb") as file:
                data = file.read(_LARGEST_FILE + 1)
            if len(data) > _LARGEST_FILE:
                raise UsageError(f"has more than {_LARGEST_FILE} bytes")
            interleave = parse(data.decode())
            if interleave is not None:
                interleave.check(self._device_size, self._alloc_unit)
        except UnicodeDecodeError:
            raise UsageError(f"{self._path}: is not a text") from None
        except UsageError as error:
            raise UsageError(f"{self._path}: {error}") from None
        return interleave
