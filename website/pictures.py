# SPDX-License-Identifier: Apache-2.0
"""`python -m website.pictures DIRECTORY`: what the commands draw and print, as pictures for the documents.

Run by scripts/pictures, in a mount namespace of its own: it puts a folder over /dev, and mounts on /mnt.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from famfs_server.omf import layout

BIN = Path(sys.executable).parent
DEVICE, MOUNT = "/dev/dax0.0", "/mnt/famfs"
UUID = "e7b5aa46-db76-4e23-852f-0517437beb15"
COLUMNS = 110
NODES = ("null", "zero", "full", "random", "urandom", "fuse")
STRIPES = ("-B", "16", "-N", "8")
FOLDERS = ("config", "weights", "shards", "runs")
FILES = (
    *((f"config/part{number:03d}", "2m", ()) for number in range(390)),
    ("weights/llama-weights.bin", "3g", ()),
    ("weights/embedding", "860m", ()),
    ("shards/table-a", "2g", STRIPES),
    *((f"runs/step{number}", "400m", ()) for number in range(4)),
    ("shards/table-b", "600m", STRIPES),
    ("runs/step4", "880m", ()),
    ("runs/lost", "400m", ()),
    ("runs/gone", "400m", ()),
)
DAMAGED = ("runs/lost", "runs/gone")
"""Files whose entries name an older file afterwards: the space is claimed, and nothing is shown."""
FAMFS = str(BIN / "famfs")


def main(directory: Path) -> None:
    """Draw all pictures into `directory`."""
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="famfs-pictures-", dir="/dev/shm") as work:
        os.environ |= {
            "FAMFS_RUN_DIR": f"{work}/run",
            "FAMFS_SYSTEM_UUID_FILE": f"{work}/uuid",
            "COLUMNS": str(COLUMNS),
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
        }
        own_places(Path(work))
        fill()
        run(FAMFS, "mount", DEVICE, MOUNT)
        try:
            with load():
                looks = run(FAMFS, "top", "-n", "2", "-d", "3", MOUNT)
            screen(directory / "top.svg", "famfs top", looks[looks.rindex(f"{MOUNT} (") :])
            screen(directory / "status.svg", f"famfs status {MOUNT}", run(FAMFS, "status", MOUNT))
            screen(directory / "doctor.svg", f"famfs doctor {DEVICE}", run(FAMFS, "doctor", DEVICE))
        finally:
            run(FAMFS, "umount", MOUNT)
        damage()
        run(FAMFS, "map", DEVICE, "-o", str(directory / "map.svg"))
        run(FAMFS, "map", DEVICE, "-o", str(directory / "map.png"))
        run(FAMFS, "map", "--daxdev", DEVICE, "shards/table-a", "-o", str(directory / "map-file.svg"))
        screen(directory / "map-terminal.svg", f"famfs map {DEVICE}", at_terminal(FAMFS, "map", DEVICE))
        screen(directory / "fsck.svg", f"famfs fsck -h {DEVICE}", run(FAMFS, "fsck", "-h", DEVICE))


def run(*words: str) -> str:
    """What a program prints. Raises CalledProcessError where it fails."""
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout


def at_terminal(*words: str) -> str:
    """What it prints on a terminal, with its colours."""
    return run("script", "-qec", " ".join(words), "/dev/null").replace("\r\n", "\n")


def own_places(work: Path) -> None:
    """A /dev with a sparse file that stands for a device, and an empty /mnt."""
    dev = work / "dev"
    dev.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755", "dev", str(dev))
    for name in NODES:
        (dev / name).touch()
        run("mount", "--bind", f"/dev/{name}", str(dev / name))
    (dev / "shm").mkdir()
    run("mount", "--bind", "/dev/shm", str(dev / "shm"))
    (dev / "pts").mkdir()
    run("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", str(dev / "pts"))
    (dev / "ptmx").symlink_to("pts/ptmx")
    (dev / "dax0.0").touch()
    os.truncate(dev / "dax0.0", 32 << 30)
    run("mount", "--move", str(dev), "/dev")
    run("mount", "-t", "tmpfs", "mnt", "/mnt")
    Path(MOUNT).mkdir()


def fill() -> None:
    """A file system with files of all sizes."""
    run(str(BIN / "mkfs.famfs"), "-U", UUID, DEVICE)
    run(FAMFS, "mkdir", "--daxdev", DEVICE, *FOLDERS)
    small = [word for name, size, more in FILES if not more and size == "2m" for word in ("-M", f"{name},{size}")]
    run(FAMFS, "creat", "--daxdev", DEVICE, *small)
    for name, size, more in FILES:
        if more or size != "2m":
            run(FAMFS, "creat", "--daxdev", DEVICE, "-s", size, *more, name)


def damage() -> None:
    """What another host's mistake would look like: entries with a path that an older file has."""
    path = FILES[-len(DAMAGED) - 1][0].encode()
    with open(DEVICE, "r+b") as image:
        for row in range(len(FILES) + len(FOLDERS)):
            at = layout.LOG_OFFSET + layout.LOG_HEADER_SIZE + row * layout.LOG_ENTRY_SIZE
            image.seek(at)
            entry = bytearray(image.read(layout.LOG_ENTRY_SIZE))
            for name in DAMAGED:
                if (place := entry.find(name.encode() + b"\0")) >= 0:
                    entry[place : place + layout.PATH_FIELD] = path.ljust(layout.PATH_FIELD, b"\0")
                    span = layout.LOG_ENTRY_CRC_SPAN
                    entry[span : span + 4] = layout.crc(bytes(entry[:span])).to_bytes(4, "little")
                    image.seek(at)
                    image.write(entry)


@contextmanager
def load() -> Iterator[None]:
    """Somebody who looks at files and reads them."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            for folder, _, names in os.walk(MOUNT):
                for name in names[:40]:
                    with open(os.path.join(folder, name), "rb", buffering=0) as file:
                        file.read(1 << 20)
                    if stopped.wait(0.0002):
                        return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def screen(path: Path, title: str, text: str) -> None:
    """Text as a picture of a terminal."""
    # The kernel's version as its makers count, without what builders add.
    text = re.sub(r"(kernel:? \d+\.\d+)[^\s,]*", r"\1", text)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(text.rstrip("\n")))
    svg = console.export_svg(title=title, unique_id=path.stem)
    # The picture loads nothing: no font from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    path.write_text(svg.replace("Fira Code", "DejaVu Sans Mono"), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m website.pictures DIRECTORY")
    main(Path(sys.argv[1]))
