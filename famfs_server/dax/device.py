# SPDX-License-Identifier: Apache-2.0
"""Dax devices: a real one under the devdax driver, one bound for famfs, and a regular file that stands for one.

All three open, lock and map alike. The emulated device keeps the real one's rules, so that what works on it works on
hardware: nothing but shared mappings whose offset and length are multiples of 2 MiB, and no reading or writing.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import struct
import time
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from famfs_server.dax import sysfs
from famfs_server.dax.memory import Memory
from famfs_server.errors import DeviceBusyError, DeviceError, DeviceModeError

EMULATED_ALIGN = 0x200000
_FLOCK = struct.Struct("hhqqi4x")
_LOCK_RETRY_SECONDS = 0.05
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Mode(Enum):
    """What a device is bound to; the value is the word that users know."""

    DEVDAX = "devdax"
    FSDEV = "famfs (fsdev_dax)"
    EMULATED = "emulated (regular file)"


class Lock(Enum):
    """What a lock on the device protects (docs/design.md, "Locks")."""

    WRITER = 0
    """Exclusive: the only writer of the log on this host."""
    MOUNTED = 1
    """Shared: somebody has the file system open. Exclusive: it is being made or repaired."""
    KERNEL = 1 << 57
    """Exclusive: a mount has given the device to this kernel (famfs mode), which takes it once. Beyond every byte of
    `lock_host`."""


class DaxDevice:
    """An open dax device. Sizes are in bytes. Use it as a context manager, or call `close`."""

    def __init__(self, path: str, fd: int, mode: Mode, size: int, align: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.mode = mode
        self.size = size
        self.align = align
        self.writable = writable
        self._map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: str, *, writable: bool = True, sysfs_root: Path = sysfs.SYSFS) -> "DaxDevice":
        """Open the device at `path`.

        Raises DeviceError when it is absent or not a dax device, DeviceModeError when its driver makes it useless
        here: none bound, or system-ram.
        """
        try:
            status = os.stat(path)
        except OSError as error:
            raise DeviceError(f"{path}: {os.strerror(error.errno or errno.EIO)}") from error
        if stat.S_ISREG(status.st_mode):
            if status.st_size == 0 or status.st_size % EMULATED_ALIGN:
                raise DeviceError(
                    f"{path}: a file that stands for a dax device must have a size that is a multiple of 2 MiB, "
                    f"not {status.st_size}"
                )
            return cls(path, _open(path, writable), Mode.EMULATED, status.st_size, EMULATED_ALIGN, writable=writable)
        if not stat.S_ISCHR(status.st_mode):
            raise DeviceError(f"{path} is not a dax device (a character device such as /dev/dax0.0)")
        found = sysfs.attributes(status.st_rdev, path, sysfs_root)
        match found.driver:
            case "device_dax":
                mode = Mode.DEVDAX
            case "fsdev_dax":
                mode = Mode.FSDEV
            case "kmem":
                raise DeviceModeError(
                    f"{path} is in system-ram mode; run: daxctl reconfigure-device -m devdax {found.name}"
                )
            case "":
                if not sysfs.has_driver("device_dax", sysfs_root):
                    raise DeviceModeError(
                        f"{path} has no driver bound, and device_dax is not loaded; run: modprobe device_dax "
                        f"&& daxctl enable-device {found.name}"
                    )
                raise DeviceModeError(
                    f"{path} has no driver bound; run: echo {found.name} > /sys/bus/dax/drivers/device_dax/bind "
                    f"(or .../new_id), or daxctl enable-device {found.name}"
                )
            case other:
                raise DeviceModeError(f"{path} is bound to the unknown driver {other}")
        return cls(path, _open(path, writable), mode, found.size, found.align, writable=writable)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close; locks end when the last copy of the descriptor is gone."""
        self.unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def unmap(self) -> None:
        """Let go of the mapping that `memory` made. Locks and descriptor stay."""
        if self._map is not None:
            mapping, self._map = self._map, None
            # While somebody still looks at the bytes, the mapping stays; it goes with the last view.
            with contextlib.suppress(BufferError):
                mapping.close()

    def memory(self, *, flush: bool | None = None) -> Memory:
        """Map the whole device and hand out its bytes.

        `flush` says whether CPU caches are written back and invalidated around accesses; by default they are, except
        on the emulated device, whose users share one coherent cache. Raises DeviceModeError where user space cannot
        map the device.
        """
        if self._map is None:
            self._map = self.map(0, self.size // self.align * self.align)
        needs_flush = self.mode is not Mode.EMULATED if flush is None else flush
        punch = self._punch if self.mode is Mode.EMULATED else None
        return Memory(memoryview(self._map), flush=needs_flush, punch=punch)

    def _punch(self, offset: int, length: int) -> bool:
        """Zero a range of the file that stands for a device without filling it: a sparse one stays sparse."""
        if offset % mmap.PAGESIZE or length % mmap.PAGESIZE:
            return False
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        result: int = _libc.fallocate(self.fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length))
        return result == 0

    def map(self, offset: int, length: int) -> mmap.mmap:
        """A shared mapping of a part of the device; offset and length must be multiples of `align`, as on devdax."""
        if self.mode is Mode.FSDEV:
            raise DeviceModeError(
                f"{self.path} is in famfs mode (driver fsdev_dax), which only a famfs kernel can use; "
                f"for access from user space run: daxctl reconfigure-device -m devdax {os.path.basename(self.path)}"
            )
        if length <= 0 or offset < 0 or offset % self.align or length % self.align or offset + length > self.size:
            raise DeviceError(
                f"{self.path}: cannot map {length} bytes at {offset}: both must be multiples of {self.align} "
                f"within the {self.size} bytes of the device"
            )
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
        try:
            return mmap.mmap(self.fd, length, mmap.MAP_SHARED, protection, offset=offset)
        except ValueError as error:
            raise DeviceError(f"{self.path} has become shorter than its {self.size} bytes") from error
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise DeviceModeError(f"{self.path} was switched to famfs mode (fsdev_dax) meanwhile") from error
            if error.errno == errno.ENXIO:
                raise DeviceModeError(f"{self.path} has lost its driver; bind it again") from error
            raise DeviceError(f"{self.path}: cannot map {length} bytes: {os.strerror(error.errno or 0)}") from error

    def lock(self, lock: Lock, *, exclusive: bool, wait: float = 0.0) -> bool:
        """Take a lock, waiting up to `wait` seconds for it, and say whether that worked.

        The lock belongs to this open device and to all that inherit its descriptor, and ends with the last of them.
        """
        return self._lock(lock.value, exclusive, wait)

    def lock_host(self, host: UUID, *, wait: float = 0.0) -> bool:
        """Take the exclusive lock that says: the host `host` has this device mounted."""
        # All of the UUID counts: those of hosts that one machine or one hand made are alike in most of their bits.
        digest = hashlib.sha256(host.bytes).digest()
        return self._lock(2 + int.from_bytes(digest[:7], "big"), True, wait)

    def unlock(self, lock: Lock) -> None:
        """Give a lock back."""
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, lock.value, 1, 0))

    def require_lock(self, lock: Lock, *, exclusive: bool, wait: float = 0.0, why: str) -> None:
        """`lock`, or DeviceBusyError with `why`."""
        if not self.lock(lock, exclusive=exclusive, wait=wait):
            raise DeviceBusyError(f"{self.path}: {why}")

    def _lock(self, byte: int, exclusive: bool, wait: float) -> bool:
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        if not self.writable and exclusive:
            raise DeviceError(f"{self.path} is open for reading only and cannot be locked")
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, request)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            else:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_RETRY_SECONDS)


def _open(path: str, writable: bool) -> int:
    try:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            # A driver is bound, says sysfs. The kernel forgets such a device when its last user from before closes it.
            name = os.path.basename(path)
            raise DeviceModeError(
                f"{path} does not open any more, because its driver was unbound while it was in use; bind it anew: "
                f"daxctl disable-device {name} && daxctl enable-device {name}"
            ) from error
        raise DeviceError(f"{path}: cannot open it: {os.strerror(error.errno or errno.EIO)}") from error
