# SPDX-License-Identifier: Apache-2.0
"""The end of a soak, on one host: every file by its name, byte by byte.

Run as `verify.py MOUNT`; the outcome is JSON.
"""

import hashlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from load import content


def main() -> None:
    """Reads everything that the mount shows."""
    root = sys.argv[1]
    wrong, digests, names, size = [], {}, [], 0
    for folder, _, files in os.walk(root):
        for name in sorted(files):
            if folder.startswith(f"{root}/.meta"):
                continue
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found = file.read()
            size += len(found)
            relative = os.path.relpath(path, root)
            digests[relative] = hashlib.sha256(found).hexdigest()
            if name.startswith(("w-", "t-", "c-")):
                names.append(relative)
                wanted = content(name)
                # A file that had its size first may have been broken off by an outage.
                broken_off = name.startswith("t-") and len(found) == len(wanted)
                if found != wanted and not (broken_off and wanted.startswith(found.rstrip(b"\0"))):
                    wrong.append(relative)
    print(json.dumps({"wrong": wrong, "digests": digests, "names": names, "bytes": size}))


if __name__ == "__main__":
    main()
