# SPDX-License-Identifier: Apache-2.0
"""A mount as its supervisor holds it, in a form that another program can go on with (design 8).

It is a document and descriptors that have names. A successor that another version of this program provides must be
able to tell from the document alone whether it understands all of it, before anything is changed.
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from famfs_server.daemon import options as mount_options
from famfs_server.daemon.bootstrap import OwnFiles
from famfs_server.daemon.devices import describe_open, reopened
from famfs_server.daemon.metafiles import MetaFiles
from famfs_server.daemon.options import MountOptions
from famfs_server.daemon.worker import Negotiated, negotiated, ready_message
from famfs_server.dax.device import DaxDevice, Mode
from famfs_server.errors import FamfsError, HandoverError
from famfs_server.fuse.session import RECORD_LAYOUT, Session, SessionRecord
from famfs_server.volume.namespace import IDENTITY, Namespace

VERSION = 1
"""Of the document. To be raised when an older program would misunderstand it."""

DOCUMENT = "document"
_LARGEST = 1 << 20
_NAMES = ("fuse", "record", "namespace", "libfuse", "channel", "device")
META_NAMES = ("meta.superblock", "meta.log", "meta.directory")
_RELEASE = ("meta.released", "meta.release")


@dataclass(frozen=True, slots=True)
class Held:
    """A mount that is served: everything that outlives a worker."""

    options: MountOptions
    device: DaxDevice
    host: UUID | None
    session: Session
    run_directory: Path
    agreed: Negotiated
    device_number: int | None
    """Of the file system, as in st_dev; nothing where somebody else has made the mount and takes it away."""
    background: bool
    """Whether standard input and output were given back."""
    meta: OwnFiles | None
    """The open superblock and log of a device in famfs mode."""
    further: dict[UUID, DaxDevice]
    """The devices beyond the first that are open."""

    @property
    def descriptors(self) -> dict[str, int]:
        """What a successor needs beside the document, by name."""
        session = self.session
        ends = session.libfuse_end.fileno(), session.our_end.fileno()
        numbers = (session.fuse, session.record.fd, session.namespace, *ends, self.device.fd)
        named = dict(zip(_NAMES, numbers, strict=True))
        if self.meta is not None:
            files = self.meta.files
            named |= zip(META_NAMES, (files.superblock, files.log, files.directory), strict=True)
        return named | {_device_name(uuid): device.fd for uuid, device in self.further.items()}

    @property
    def release(self) -> dict[str, int]:
        """What a successor in the same process needs besides, lest the worker lets go of the mount's own files."""
        if self.meta is None or self.meta.release < 0:
            return {}
        return dict(zip(_RELEASE, (self.meta.files.released, self.meta.release), strict=True))

    def document(self, **more: Any) -> dict[str, Any]:
        """The document; `more` is for whoever hands over to itself."""
        return {
            "version": VERSION,
            "layouts": {"record": RECORD_LAYOUT, "namespace": IDENTITY},
            "options": mount_options.encode(self.options),
            "device": describe_open(self.device),
            "further": {str(uuid): describe_open(device) for uuid, device in self.further.items()},
            "host": None if self.host is None else str(self.host),
            "max_write": self.session.max_write,
            "run_directory": os.fspath(self.run_directory),
            "agreed": ready_message(self.agreed),
            "device_number": self.device_number,
            "background": self.background,
            "meta": None
            if self.meta is None
            else {
                "log_length": self.meta.files.log_length,
                "writable": self.meta.files.writable,
                "names": META_NAMES,
            },
            **more,
        }

    @classmethod
    def restore(cls, document: dict[str, Any], descriptors: dict[str, int]) -> Self:
        """What the document and the descriptors stand for. Raises HandoverError."""
        check(document)
        if missing := sorted({*_NAMES} - descriptors.keys()):
            raise HandoverError(f"the predecessor's descriptors are not complete: {', '.join(missing)} is not there")
        fuse, record, namespace, libfuse, channel, device = (descriptors[name] for name in _NAMES)
        try:
            return cls(
                mount_options.decode(document["options"]),
                reopened(document["device"], device),
                None if document["host"] is None else UUID(document["host"]),
                Session(
                    fuse,
                    socket.socket(fileno=libfuse),
                    socket.socket(fileno=channel),
                    document["max_write"],
                    SessionRecord(record),
                    namespace,
                ),
                Path(document["run_directory"]),
                negotiated(document["agreed"]),
                document["device_number"],
                document["background"],
                _own_files(document["meta"], descriptors),
                {
                    UUID(uuid): reopened(facts, descriptors[_device_name(UUID(uuid))])
                    for uuid, facts in document["further"].items()
                },
            )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise HandoverError(f"the predecessor's state makes no sense: {error!r}") from error


def _device_name(uuid: UUID) -> str:
    return f"device.{uuid}"


def _own_files(described: dict[str, Any] | None, descriptors: dict[str, int]) -> OwnFiles | None:
    if described is None:
        return None
    superblock, log, directory = (descriptors[name] for name in META_NAMES)
    # Where no worker lives any more, there is none to be told, and a new pipe does.
    released, release = (descriptors[name] for name in _RELEASE) if _RELEASE[0] in descriptors else os.pipe()
    files = MetaFiles(superblock, log, directory, described["log_length"], described["writable"], released)
    return OwnFiles(files, release)


def check(document: dict[str, Any]) -> None:
    """Whether this program can go on with what the document describes. Changes nothing. Raises HandoverError."""
    version = document.get("version")
    if version != VERSION:
        raise HandoverError(f"the running server's state has version {version}, this program understands {VERSION}")
    try:
        if (layout := document["layouts"]["record"]) != RECORD_LAYOUT:
            raise HandoverError(f"the running server's session record has layout {layout}, not {RECORD_LAYOUT}")
        if document["layouts"]["namespace"] != IDENTITY and document.get("provisional", 0):
            raise HandoverError(
                f"the running server keeps the tree in another form, and {document['provisional']} files that system "
                "calls have made are known in it alone; try again when they are closed and the kernel has forgotten "
                "them (echo 2 > /proc/sys/vm/drop_caches), or unmount"
            )
        if document["meta"] is not None and tuple(document["meta"].get("names", ())) != META_NAMES:
            raise HandoverError("the running server holds other files of its mount than this program needs; unmount")
        mount_options.decode(document["options"])
        negotiated(document["agreed"])
        for facts in (document["device"], *document["further"].values()):
            Mode[facts["mode"]]
    except (KeyError, TypeError, ValueError) as error:
        raise HandoverError(f"the running server's state makes no sense here: {error!r}") from error
    except HandoverError:
        raise
    except FamfsError as error:
        raise HandoverError(f"the running server's state cannot be taken over: {error}") from error


def provisional_files(held: Held) -> int:
    """How many files only the namespace in memory knows; 0 where it has nothing yet."""
    if Namespace.identity_of(held.session.namespace) != IDENTITY:
        return 0
    return Namespace.provisional_in(held.session.namespace)


def write(document: dict[str, Any]) -> int:
    """The document in a memory file of its own; its descriptor."""
    descriptor = os.memfd_create("famfs-handover", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(json.dumps(document).encode())
    return descriptor


def read(descriptor: int) -> dict[str, Any]:
    """The document in a memory file. Raises HandoverError."""
    try:
        document = json.loads(os.pread(descriptor, _LARGEST, 0))
    except (OSError, ValueError) as error:
        raise HandoverError(f"the predecessor's state cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise HandoverError("the predecessor's state is no object")
    return document
