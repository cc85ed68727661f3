# SPDX-License-Identifier: Apache-2.0
"""Who looks at the files that he lists: whether a listing should carry attributes.

The kernel asks for attributes with the beginning of each listing, and has no better guess to offer. Each file that it
is told of costs it an inode, which is well spent if somebody stats the files next, as `ls -l` does, and wasted if not,
as with `find -name`: then attributes are most of the work of a listing. A record without a nodeid spares the kernel the
inode, and makes it ask when somebody wants to know.

So the first regular file of each listing is left bare. Whoever looks at the files looks that one up too, and gets
attributes with his next directory; whoever does not gets names.
"""

from dataclasses import dataclass
from typing import Final

PROCESSES: Final = 64
"""How many are remembered; the one whose listing began longest ago is forgotten first."""


@dataclass(slots=True)
class _Lister:
    directory: int
    looks: bool = False


class Listers:
    """The processes that have listed directories lately."""

    def __init__(self) -> None:
        self._of_process: dict[int, _Lister] = {}
        self.listed: dict[int, _Lister] = {}
        """By directory: who listed it last, and nothing else since. Names looked up in others tell nothing."""

    def begins(self, process: int, directory: int) -> bool:
        """A process begins to list a directory; whether it wants attributes, by what it did with the last one."""
        before = forgotten = self._of_process.pop(process, None)
        if before is None and len(self._of_process) == PROCESSES:
            forgotten = self._of_process.pop(next(iter(self._of_process)))
        if forgotten is not None and self.listed.get(forgotten.directory) is forgotten:
            del self.listed[forgotten.directory]
        self.listed[directory] = self._of_process[process] = _Lister(directory)
        return before is None or before.looks

    def looked_up(self, directory: int) -> None:
        """Somebody looked up a regular file in a directory of `listed`."""
        self.listed[directory].looks = True
