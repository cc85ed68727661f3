# SPDX-License-Identifier: Apache-2.0
"""Devices: real devdax, fsdev, the emulated file; their sysfs, their memory and the CPU caches before it."""
