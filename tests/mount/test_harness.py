# SPDX-License-Identifier: Apache-2.0
"""What tests of this folder rely on where other runs of them are at work on the same machine."""

import os
import subprocess
from pathlib import Path

from harness import MARK, Site, succeed, wait_for


def test_a_copy_of_the_mount_in_a_namespace_of_somebody_else_does_not_keep_it(site: Site) -> None:
    mount = site.attach(site.format())
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    stranger = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "60"], env=unmarked)
    try:
        assert wait_for(lambda: Path(f"/proc/{stranger.pid}/comm").read_text() == "sleep\n")
        succeed("umount", mount.path)
        assert mount.gone(seconds=2)
    finally:
        stranger.kill()
        stranger.wait()
