# SPDX-License-Identifier: Apache-2.0
"""Deaths at a line of the server's code, injected from outside: it runs in another process, which is traced."""

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def dies(act: Callable[[], object], place: int) -> bool:
    """Do something in another process that is killed before the `place`-th line of the server's code, and say whether
    it came to that."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal place
        if "/famfs_server/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            place -= 1
            if place < 0:
                os._exit(9)
        return trace

    pid = os.fork()
    if pid == 0:
        try:
            sys.settrace(trace)
            act()
            sys.settrace(None)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9
