# SPDX-License-Identifier: Apache-2.0
"""What the runner says and ends with."""

import sys

STATUS_USAGE = 2
STATUS_TIMEOUT = 124
STATUS_UNAVAILABLE = 77  # a tier that cannot run here, for a reason outside of this checkout
STATUS_FAILED = 125  # no guest, or a guest that died; below this the status is the command's own


class RunnerError(Exception):
    """The runner cannot do its work; the message is one line: cause and what to do."""


def say(words: str) -> None:
    print(f"vm-test: {words}", file=sys.stderr, flush=True)
