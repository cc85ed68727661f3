# SPDX-License-Identifier: Apache-2.0
"""What the package under test says about itself in its log."""

import logging


class Complaints(logging.Handler):
    """Keeps the lines of errors that nobody foresaw: those with a traceback, though the request may be answered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        logger = logging.getLogger("famfs_server")
        logger.handlers[:] = [self]
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what must not be."""
        if record.exc_info:
            self.lines.append(logging.Formatter().format(record))
