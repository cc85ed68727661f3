# SPDX-License-Identifier: Apache-2.0
"""The memory of a device that only a kernel can map whole: superblock and log, and new space, through files that the
kernel maps there (docs/design.md 3 and 6, decisions 20)."""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Sequence

from sortedcontainers import SortedDict

from famfs_server.dax.memory import Memory
from famfs_server.errors import DeviceError

_MAP_FIXED = 0x10
_MADV_DONTFORK = 10
_PYBUF_READ, _PYBUF_WRITE = 0x100, 0x200
_FAILED = ctypes.c_void_p(-1).value
_ALIGNMENT = 2 << 20
"""Addresses are congruent to places on the device, so that the kernel can use pages of 2 MiB."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.restype = ctypes.py_object
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, length, protection, flags, descriptor, 0)
    if found == _FAILED:
        raise DeviceError(f"cannot map {length} bytes of a file of the own mount: {os.strerror(ctypes.get_errno())}")
    assert isinstance(found, int)
    return found


class PartialMemory(Memory):
    """A device of which `files` show the first bytes, one behind the other, and other files any later range for a time.

    One stretch of addresses stands for the whole device, so that the rest of the program need not know of files.
    Touching a range that nothing shows is DeviceFaultError, as after a failure of the device, and for system calls
    EFAULT. Children do not inherit any of it. No method sends a request to the server of the files, which may be this
    very process: their maps are with the kernel since they were opened.
    """

    def __init__(
        self, files: Sequence[tuple[int, int]], size: int, *, writable: Sequence[bool], flush: bool = True
    ) -> None:
        """Map (descriptor, length in bytes) of each of `files`, on a device of `size` bytes; those that are `writable`
        can be stored to. Raises DeviceError."""
        self._length = sum(length for _, length in files)
        self._nothing = os.memfd_create("famfs-nothing", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._nothing).atexit = False
        stored = any(writable)
        span = size + _ALIGNMENT
        # A file that ends before its first byte: its mapping takes no memory, whatever its length, and each access is
        # a fault.
        start = _map(None, span, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self._nothing)
        # Not when the interpreter ends: threads may still be at work.
        weakref.finalize(self, _libc.munmap, start, span).atexit = False
        _libc.madvise(start, span, _MADV_DONTFORK)
        self._address = -(-start // _ALIGNMENT) * _ALIGNMENT
        self._shown: SortedDict[int, int] = SortedDict()
        self._changing = threading.Lock()
        at = 0
        for (descriptor, length), one_is in zip(files, writable, strict=True):
            self._place(at, length, descriptor, mmap.PROT_READ | (mmap.PROT_WRITE if one_is else 0))
            at += length
        view = _view_of(self._address, size, _PYBUF_WRITE if stored else _PYBUF_READ)
        super().__init__(view, flush=flush)
        self.reach = self._length

    def _place(self, at: int, length: int, descriptor: int, protection: int) -> None:
        _map(self._address + at, length, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        _libc.madvise(self._address + at, length, _MADV_DONTFORK)

    def show(self, offset: int, length: int, descriptor: int) -> None:
        """Have a file that the kernel maps there show a range behind the first bytes, which nothing shows yet. The
        descriptor may be closed afterwards. Raises DeviceError."""
        with self._changing:
            self._place(offset, length, descriptor, mmap.PROT_READ | mmap.PROT_WRITE)
            self._shown[offset] = offset + length

    def hide(self, offset: int, length: int) -> None:
        """Let go, at once, of every file that shows any of a range behind the first bytes. Raises DeviceError."""
        with self._changing:
            for start in [start for start, end in self._shown.items() if start < offset + length and offset < end]:
                self._place(start, self._shown[start] - start, self._nothing, mmap.PROT_READ | mmap.PROT_WRITE)
                del self._shown[start]

    def hidden(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of a range behind the first bytes that nothing shows, as (offset, length), ascending."""
        end = offset + length
        gaps: list[tuple[int, int]] = []
        with self._changing:
            for start, behind in self._shown.items()[max(self._shown.bisect_right(offset) - 1, 0) :]:
                if start >= end:
                    break
                if start > offset:
                    gaps.append((offset, start - offset))
                offset = max(offset, behind)
        if offset < end:
            gaps.append((offset, end - offset))
        return gaps

    def shows(self, offset: int, length: int) -> bool:
        """Whether this process can read and store a whole range."""
        return offset + length <= self.reach or not self.hidden(offset, length)

    def release(self) -> None:
        """Let go of all files at once: those of the first bytes, and those that show ranges behind them. Whoever
        touches the memory afterwards finds it gone, as after a failure of the device: DeviceFaultError."""
        self._place(0, self._length, self._nothing, mmap.PROT_READ | mmap.PROT_WRITE)
        self.hide(self._length, len(self.view) - self._length)
