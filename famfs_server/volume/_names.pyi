# SPDX-License-Identifier: Apache-2.0
from _typeshed import WriteableBuffer

def name_hash(key: bytes, parent: int, name: bytes, /) -> int: ...

class Index:
    def __new__(
        cls,
        key: bytes,
        slots: WriteableBuffer,
        parents: WriteableBuffer,
        name_offsets: WriteableBuffer,
        name_lengths: WriteableBuffer,
        next_siblings: WriteableBuffer,
        first_children: WriteableBuffer,
        last_children: WriteableBuffer,
        modes: WriteableBuffer,
        text: WriteableBuffer,
        /,
    ) -> Index: ...
    def find(self, parent: int, name: bytes, /) -> int: ...
    def dirents(self, nodeid: int, size: int, lead: int, /) -> bytes: ...
    def link(self, nodeid: int, parent: int, name: bytes, /) -> bool: ...
