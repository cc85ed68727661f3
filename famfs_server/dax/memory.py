# SPDX-License-Identifier: Apache-2.0
"""The bytes of a device, as the rest of the package sees them: guarded, bounded, with cache maintenance.

Whoever maps a device (or a test, its stand-in) hands the mapping over as a memoryview and keeps owning it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from famfs_server.dax import cacheline
from famfs_server.errors import DeviceFaultError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_ZEROES = bytes(1 << 20)


def _fault(verb: str, offset: int, length: int) -> DeviceFaultError:
    return DeviceFaultError(
        f"cannot {verb} {length} bytes at offset {offset:#x} of the device: the memory is poisoned, "
        "truncated or no longer bound; see the kernel log"
    )


class Memory:
    """The memory of one device. Offsets and lengths are in bytes.

    Every method raises ValueError for a range outside of the memory and DeviceFaultError, naming the
    range, for memory that cannot be accessed. Stores into read-only memory raise BufferError.
    """

    def __init__(
        self, view: memoryview, *, flush: bool = True, punch: Callable[[int, int], bool] | None = None
    ) -> None:
        """Take `view`, the whole device as plain bytes (format `B`), otherwise ValueError.

        `flush` False leaves the cache alone: right where all users of the memory share one coherent
        cache, as with an emulated device. `punch` zeroes a range more quickly than storing, and says whether it did.
        """
        if view.format != "B" or view.ndim != 1 or not view.c_contiguous:
            raise ValueError("a memory is a contiguous view of plain bytes")
        #: The bytes themselves, for system calls that copy file data; touching them is not guarded.
        self.view = view
        self.size = view.nbytes
        #: The bytes from the start that this process reaches; the others it has no access to (`dax.partial`).
        self.reach = view.nbytes
        self.writable = not view.readonly
        #: How lines are written back (docs/format.md 5.4); `none` when they are not.
        self.mechanism = cacheline.MECHANISM if flush else "none"
        self._flush = flush
        #: Whether zeroing a large range costs no more than a small one.
        self.sparse = punch is not None
        self._punch = punch

    def read(self, offset: int, length: int) -> bytes:
        """A copy of a range, as this host's cache has it."""
        try:
            return cacheline.copy_from(self.view, offset, length)
        except OSError as error:
            raise _fault("read", offset, length) from error

    def read_fresh(self, offset: int, length: int) -> bytes:
        """A copy of a range as memory has it now, for what another host may have written."""
        self.invalidate(offset, length)
        return self.read(offset, length)

    def write(self, offset: int, data: "ReadableBuffer") -> None:
        """Store `data`. After a fault part of it may have been stored."""
        source = memoryview(data)
        try:
            cacheline.copy_into(self.view, offset, source, 0, source.nbytes)
        except OSError as error:
            raise _fault("write", offset, source.nbytes) from error

    def zero(self, offset: int, length: int) -> None:
        """Fill a range with zeroes and write them back, before anybody can be told that it is there."""
        if self._punch is not None and self._punch(offset, length):
            return
        for start in range(offset, offset + length, len(_ZEROES)):
            self.write(start, _ZEROES[: offset + length - start])
        self.write_back(offset, length)
        self.fence()

    def store_u64(self, offset: int, value: int) -> None:
        """Store `value` in 8 aligned bytes, little-endian; other readers see all of it or nothing."""
        try:
            cacheline.store_u64(self.view, offset, value)
        except OSError as error:
            raise _fault("write", offset, 8) from error

    def write_back(self, offset: int, length: int) -> None:
        """Begin to write the cache lines of a range to memory; done after `fence`."""
        if self._flush:
            try:
                cacheline.write_back(self.view, offset, length)
            except OSError as error:
                raise _fault("write back", offset, length) from error

    def invalidate(self, offset: int, length: int) -> None:
        """Drop the cache lines of a range, so that later reads see what other hosts have written."""
        if self._flush:
            try:
                cacheline.invalidate(self.view, offset, length)
            except OSError as error:
                raise _fault("invalidate", offset, length) from error

    def present(self, offset: int, length: int) -> None:
        """As `invalidate`, and have the pages of a range mapped, for a system call that reads them through `view`.

        Otherwise the call would map them, and that ends with an error where the process has been killed meanwhile.
        """
        if self.mechanism == "none":
            try:
                cacheline.touch(self.view, offset, length)
            except OSError as error:
                raise _fault("read", offset, length) from error
        else:
            # An instruction that drops a line has its page mapped, too.
            self.invalidate(offset, length)

    def fence(self) -> None:
        """Complete earlier stores and write-backs before any later one."""
        if self._flush:
            cacheline.fence()

    def close(self) -> None:
        """Let go of the view, so that its owner can unmap. Any use afterwards raises ValueError."""
        self.view.release()
