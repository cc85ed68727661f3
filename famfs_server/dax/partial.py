# SPDX-License-Identifier: Apache-2.0
"""The memory of a device that only a kernel can map whole: superblock and log, through files that the kernel maps there
(docs/design.md 3, decisions 20)."""

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np

from famfs_server.dax.memory import Memory
from famfs_server.errors import DeviceError, UnreachableError

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_FAILED = ctypes.c_void_p(-1).value


class PartialMemory(Memory):
    """The first bytes of a device: what `files` show, one behind the other.

    Children do not inherit the mapping, and `release` gives it up while others still use it. No method sends a request
    to the server of the files, which may be this very process: their maps are with the kernel since they were opened.
    """

    def __init__(
        self, files: Sequence[tuple[int, int]], size: int, *, writable: Sequence[bool], flush: bool = True
    ) -> None:
        """Map (descriptor, length in bytes) of each of `files`, on a device of `size` bytes; those that are `writable`
        can be stored to. Raises DeviceError."""
        self._length = sum(length for _, length in files)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if any(writable) else 0)
        # One stretch of addresses for all of them, so that the rest of the program need not know of files.
        self._map = mmap.mmap(-1, self._length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, protection)
        self._address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        at = 0
        for (descriptor, length), stored in zip(files, writable, strict=True):
            self._place(at, length, descriptor, mmap.PROT_READ | (mmap.PROT_WRITE if stored else 0))
            at += length
        self._map.madvise(mmap.MADV_DONTFORK)
        super().__init__(memoryview(self._map), flush=flush)
        self.size = size

    def _place(self, at: int, length: int, descriptor: int, protection: int) -> None:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        found = _libc.mmap(self._address + at, length, protection, flags, descriptor, 0)
        if found == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise DeviceError(f"cannot map {length} bytes of a file of the own mount: {reason}")

    def release(self) -> None:
        """Let go of the files at once. Whoever touches the memory afterwards finds it gone, as after a failure of the
        device: DeviceFaultError."""
        nothing = os.memfd_create("famfs-released", os.MFD_CLOEXEC)
        try:
            self._place(0, self._length, nothing, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(nothing)

    def zero(self, offset: int, length: int) -> None:
        """Raises UnreachableError for file data: only the kernel can store there."""
        if offset + length > self.reach:
            raise UnreachableError(
                "no files can be made on a device in famfs mode: their space would have to be zeroed, and the kernel "
                "alone reaches it; make them while it is mounted in devdax mode"
            )
        super().zero(offset, length)
