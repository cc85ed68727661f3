# SPDX-License-Identifier: Apache-2.0
"""A user-space FUSE server for famfs, the file system in memory that several hosts share."""

import os

__version__ = "0.1.0"

# numpy's linear algebra library starts a thread a core when it is imported; the daemon forks
# workers, and a process that owns threads must never fork (docs/design.md, "Processes").
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
