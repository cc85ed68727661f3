# SPDX-License-Identifier: Apache-2.0
"""Warnings before log or space run out: neither comes back but by a new mkfs."""

import logging

from famfs_server.volume.volume import Volume

log = logging.getLogger(__name__)

LOG_PERCENT = (80, 95)
SPACE_PERCENT = (90,)


class Fullness:
    """Watches one volume; says each thing once."""

    def __init__(self) -> None:
        self._log_said = self._space_said = 0

    def look(self, volume: Volume) -> None:
        """Warn if another threshold has been passed. Cheap: to be called every second."""
        entries, capacity = volume.namespace.replayed, volume.last_index + 1
        passed = _passed(entries, capacity, LOG_PERCENT)
        if passed > self._log_said:
            log.warning(
                "%s: %d%% of the log is in use (%d of %d entries); what does not fit into it cannot be created, and "
                "only mkfs.famfs --loglen makes a larger one",
                volume.device,
                passed,
                entries,
                capacity,
            )
        self._log_said = max(self._log_said, passed)
        # After a takeover nobody may have needed the space map yet.
        if not volume.settled:
            return
        allocated, size = volume.space.allocated, sum(volume.space.sizes)
        passed = _passed(allocated, size, SPACE_PERCENT)
        if passed > self._space_said:
            log.warning(
                "%s: %d%% of the space is in use (%d of %d bytes); it comes back only by a new mkfs.famfs",
                volume.device,
                passed,
                allocated,
                size,
            )
        self._space_said = max(self._space_said, passed)


def _passed(used: int, whole: int, thresholds: tuple[int, ...]) -> int:
    """The highest of the thresholds, in percent, that `used` has reached; 0: none."""
    return max((percent for percent in thresholds if used * 100 >= whole * percent), default=0)
