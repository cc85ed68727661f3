# SPDX-License-Identifier: Apache-2.0
"""INIT as bytes: requests that no kernel sends, and replies that no libfuse gives.

Whatever they hold, the negotiation ends in an error in words or in a reply that a kernel takes: of the right length,
without a bit that was not offered or must never be set, and with extent maps only if they were decided for.
"""

import random
from collections import Counter
from pathlib import Path
from struct import Struct

from famfs_server.errors import FamfsError, NegotiationError
from famfs_server.fuse import abi
from famfs_server.fuse.abi import InitFlag
from famfs_server.fuse.dialects import GENERATIONS, Evidence, InitRequest, decide
from famfs_server.fuse.negotiation import FORBIDDEN, complete_reply, mask_for_libfuse, parse_init_request

_DATA = Path(__file__).parents[1] / "data"
_WORD = Struct("<I")
_VALUES = (0, 1, 7, 8, 30, 31, 36, 40, 42, 43, 45, 46, 56, 64, 80, 104, 4096, 1 << 20, 1 << 30, (1 << 32) - 1)


class Init:
    """Mutated negotiations."""

    def __init__(self) -> None:
        self._request = (_DATA / "init-6.18.bin").read_bytes()
        self._reply = (_DATA / "libfuse-3.14-init-reply.bin").read_bytes()

    def case(self, rng: random.Random) -> Counter[str]:
        """Some hundred negotiations."""
        counts: Counter[str] = Counter()
        for _ in range(200):
            counts["negotiations"] += 1
            data = self._mutated(rng, self._request)
            try:
                request = parse_init_request(data)
            except NegotiationError as error:
                counts["refused"] += 1
                _require_one_line(error)
                continue
            masked = mask_for_libfuse(data)
            assert len(masked) == len(data)
            assert not parse_init_request(masked).flags & FORBIDDEN
            self._answer(rng, request, counts)
        return counts

    def _answer(self, rng: random.Random, request: InitRequest, counts: Counter[str]) -> None:
        evidence = Evidence(rng.choice((None, True, False)), rng.choice((None, True, False)), rng.random() < 0.8)
        try:
            decision = decide(
                request,
                policy=rng.choice(("auto", "require", "never")),
                forced=rng.choice((None, None, "nonsense", *(dialect.name for dialect in GENERATIONS))),
                evidence=evidence,
            )
        except FamfsError as error:
            _require_one_line(error)
            return
        assert (decision.data_path == "fmap") == bool(decision.candidates)
        assert decision.reason.isprintable()
        reply = self._mutated(rng, self._reply)
        try:
            answer = complete_reply(reply, request, decision, max_write=rng.choice((4096, 1 << 17, 1 << 20)))
        except NegotiationError as error:
            _require_one_line(error)
            return
        counts["answered"] += 1
        assert abi.OUT_HEADER.unpack_from(answer) == (len(answer), 0, request.unique)
        fields = abi.INIT_OUT.unpack_from(answer, abi.OUT_HEADER.size)
        flags = InitFlag(fields[3] | fields[10] << 32)
        allowed = decision.capability
        assert not flags & FORBIDDEN & ~allowed
        assert not flags & ~request.flags
        assert bool(flags & InitFlag.DAX_FMAP) == bool(allowed & InitFlag.DAX_FMAP)
        if InitFlag.INIT_EXT not in flags:
            assert fields[10] == 0

    @staticmethod
    def _mutated(rng: random.Random, data: bytes) -> bytes:
        """A few words set to values that mean something, bits flipped, now and then another length."""
        found = bytearray(data)
        for _ in range(rng.choice((0, 1, 1, 2, 4, 12))):
            at = rng.randrange(len(found) // 4) * 4
            if rng.random() < 0.5:
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
            else:
                _WORD.pack_into(found, at, rng.choice((*_VALUES, rng.randrange(1 << 32))))
        if rng.random() < 0.1:
            del found[rng.randrange(len(found) + 1) :]
            if rng.random() < 0.5 and len(found) >= 4:
                _WORD.pack_into(found, 0, len(found))
        elif rng.random() < 0.05:
            found += rng.randbytes(rng.randrange(200))
        return bytes(found)

    def close(self) -> None:
        """Nothing is left."""


def _require_one_line(error: FamfsError) -> None:
    assert str(error).isprintable(), error
