# SPDX-License-Identifier: Apache-2.0
"""Sizes as people read and write them."""

_UNITS = "KMGTPE"
SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
"""What may stand behind the number of a size, in lower case, and its factor."""


def human_size(size: int) -> str:
    """A size in bytes, without a blank in it: 4.00G."""
    if size < 1024:
        return str(size)
    exponent = min((size.bit_length() - 1) // 10, len(_UNITS))
    return f"{size / (1 << 10 * exponent):.2f}{_UNITS[exponent - 1]}"
