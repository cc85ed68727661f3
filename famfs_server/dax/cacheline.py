# SPDX-License-Identifier: Apache-2.0
"""Cache maintenance (format 5.4, 10.10) and guarded copies for mapped device memory.

The caches of two hosts that share memory know nothing of each other. A writer stores, then calls
`write_back` and `fence` before it stores anything that tells others to look; a reader calls `invalidate`
before it loads what another host may have written.

* `write_back(buffer, offset, length)` begins to write every cache line that the range touches to memory.
  It has no fence inside: any number of ranges can be followed by one `fence()`, which completes them.
* `invalidate(buffer, offset, length)` drops the lines; later loads read memory. A dirty line is written
  back first, which is why a range that this host writes at the same time must not be invalidated by guess.
* `touch(buffer, offset, length)` has every page of the range mapped in this process.
* `fence()` orders stores and write-backs, `full_fence()` also loads.
* `copy_from(buffer, offset, length)` gives bytes, and
  `copy_into(destination, destination_offset, source, source_offset, length)` copies either way. The
  interpreter lock is free during long copies. After a fault part may have been copied.
* `store_u64(buffer, offset, value)` is one aligned, little-endian store: others see all of it or nothing.

Memory that cannot be accessed (poisoned, beyond the end of a truncated file, unbound) raises
OSError(EFAULT); a range outside of the buffer, a misaligned store or a negative number ValueError; a
read-only destination BufferError.

The guard is a handler of SIGBUS that is installed on import and passes on whatever is not its own. Code
that takes SIGBUS over later (`faulthandler.enable`, `signal.signal`) disarms it.

`MECHANISM` names the instruction that writes lines back, chosen by what the processor has: `clwb`,
`clflushopt`, `clflush`, `dc cvac`, or `none` where cache lines cannot be maintained: `write_back` and
`invalidate` then do nothing, and sharing memory with other hosts is not safe.
"""

from famfs_server.dax._cacheline import (
    MECHANISM,
    copy_from,
    copy_into,
    fence,
    full_fence,
    invalidate,
    store_u64,
    touch,
    write_back,
)

__all__ = [
    "MECHANISM",
    "copy_from",
    "copy_into",
    "fence",
    "full_fence",
    "invalidate",
    "store_u64",
    "touch",
    "write_back",
]
