# SPDX-License-Identifier: Apache-2.0
"""The on-media format alone: structures, checksums, the order of stores. No files, no devices, no clocks."""
