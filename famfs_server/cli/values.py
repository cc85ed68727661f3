# SPDX-License-Identifier: Apache-2.0
"""Values on command lines: sizes, modes, owners, seeds, thread counts. What is absurd is refused, never cut."""

import os
import re
from typing import Any
from uuid import UUID

import click

from famfs_server.sizes import SUFFIXES

_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)([kmg]?)", re.IGNORECASE | re.ASCII)
_LARGEST_SIZE = (1 << 63) - 1
_LARGEST_ID = (1 << 32) - 2
"""One below the number that chown takes for "leave it"."""
LARGEST_SEED = (1 << 32) - 1
LARGEST_THREADS = 256


def parse_size(text: str) -> int:
    """Bytes from a decimal, hexadecimal (0x) or octal (0) number and a suffix k, m or g. ValueError with the cause."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: use a number with k, m or g behind it, such as 8m or 0x800000")
    digits, suffix = match[1].lower(), match[2].lower()
    try:
        if digits.startswith("0x"):
            number = int(digits, 16)
        else:
            number = int(digits, 8 if len(digits) > 1 and digits[0] == "0" else 10)
    except ValueError:
        raise ValueError(f"{text!r} is not a size: a number that begins with 0 is octal") from None
    size = number * SUFFIXES[suffix]
    if size > _LARGEST_SIZE:
        raise ValueError(f"{text!r} is larger than any file can be")
    return size


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """A parameter type made of a function that raises ValueError."""

    def parse(self, text: str) -> Any:
        """The value, or ValueError with one line of cause."""
        raise NotImplementedError

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What click calls; defaults come through unchanged."""
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class SizeType(_Parsed):
    """Bytes."""

    name = "size"

    def parse(self, text: str) -> int:
        return parse_size(text)


class ModeType(_Parsed):
    """Permission bits in octal."""

    name = "mode"

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"[0-7]{1,5}", text, re.ASCII) or int(text, 8) > 0o7777:
            raise ValueError(f"{text!r} is not a mode: use octal digits, such as 0644")
        return int(text, 8)


class NumberType(_Parsed):
    """A whole number within limits."""

    def __init__(self, name: str, smallest: int, largest: int) -> None:
        self.name = name
        self._smallest, self._largest = smallest, largest

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"0x[0-9a-f]+|[0-9]+", text.strip().lower(), re.ASCII):
            raise ValueError(f"{text!r} is not a number of {self._smallest} to {self._largest}")
        text = text.strip().lower()
        number = int(text, 16 if text.startswith("0x") else 10)
        if not self._smallest <= number <= self._largest:
            raise ValueError(f"{text} is not within {self._smallest} to {self._largest}")
        return number


class UuidType(_Parsed):
    """A UUID in its usual text."""

    name = "uuid"

    def parse(self, text: str) -> UUID:
        try:
            return UUID(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a UUID") from None


SIZE = SizeType()
MODE = ModeType()
OWNER = NumberType("id", 0, _LARGEST_ID)
SEED = NumberType("seed", 1, LARGEST_SEED)
THREADS = NumberType("threads", 0, LARGEST_THREADS)
UUID_TEXT = UuidType()


def umask() -> int:
    """This process's umask."""
    current = os.umask(0o077)
    os.umask(current)
    return current
