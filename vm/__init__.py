# SPDX-License-Identifier: Apache-2.0
"""Virtual machines with real /dev/dax devices, for tests: `scripts/vm-test`. Needs nothing but Python.

The guest's root is this machine's root, read-only below an overlay in memory: the checkout and its virtual environment
work as they are, and whatever a command writes vanishes, but for the folder of results. The dax devices are ranges of
the guest's memory that it is told to regard as reserved for special use; several guests may have them in common. QEMU,
busybox and the guest's kernel come from Debian packages, found by way of this machine's own apt sources and unpacked
below a cache folder; nothing is installed. docs/testing.md tells how it works.
"""
