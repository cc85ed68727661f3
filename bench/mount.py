# SPDX-License-Identifier: Apache-2.0
"""Mounts an image as the mount command does: `python -m bench.mount IMAGE PLACE [OPTIONS]`."""

import sys

from famfs_server.daemon import lifecycle
from famfs_server.daemon.options import parse_options
from famfs_server.errors import FamfsError


def main() -> None:
    """Return when the mount is usable; the server goes on in the background."""
    image, place, *words = sys.argv[1:]
    try:
        lifecycle.mount(parse_options(image, place, words))
    except FamfsError as error:
        sys.exit(f"{place}: {error}")


main()
