# SPDX-License-Identifier: Apache-2.0
"""Mount options: the words behind `-o`, checked and turned into values before anything is opened."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast
from uuid import UUID

from famfs_server.dax.drivers import MODES
from famfs_server.errors import UsageError
from famfs_server.fuse import dialects, kernels, mountapi
from famfs_server.fuse.mountapi import DEFAULT_ATTRIBUTES, MountAttr

Cache = Literal["never", "auto", "always"]
Watchdog = Literal["serve", "eio"]

SYSLOG_LEVELS = (
    logging.CRITICAL,
    logging.CRITICAL,
    logging.CRITICAL,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.INFO,
    logging.DEBUG,
)
"""What each syslog priority, 0 to 7, means here; `/log_level` of the control socket counts in them as well."""

_LEVEL_NAMES = {"critical": 2, "error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}

_TOLERATED = frozenset(
    {"_netdev", "nofail", "auto", "noauto", "user", "nouser", "users", "owner", "group", "defaults", "loop"}
)
"""Words for mount(8), fstab or systemd that reach a helper now and then and mean nothing to it."""

_TOLERATED_PREFIXES = ("x-", "X-", "comment=", "helper=", "uhelper=")

_LARGEST_UID = (1 << 32) - 2
_LONGEST_SECONDS = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Everything that a mount can be asked for. Times are in seconds, paths absolute."""

    device: str
    mount_point: str
    fmap: dialects.Policy = "auto"
    kernel: kernels.Choice = "auto"
    """Which FUSE of the kernel serves the mount: its own, or that of the module famfs."""
    fastpath: bool = True
    """Hot requests are answered by the request plane; off: all of them by pyfuse3."""
    attributes: MountAttr = DEFAULT_ATTRIBUTES
    allow_other: bool = True
    default_permissions: bool = True
    timeout: float | None = None
    """How long the kernel caches entries and attributes of files; None: the server's default."""
    cache: Cache = "never"
    """Page cache on the `server` path: `never` opens files for direct I/O."""
    create: bool = True
    """Files and directories can be made by system calls; off (`nocreate`): by the tools only."""
    dialect: str | None = None
    daxmode: str | None = None
    """The mode that the device is switched to for the mount (`dax.drivers.MODES`); None: it is taken as it is."""
    no_open: bool = True
    """With extent maps the kernel is told never to send OPEN, so that opening a file again costs nothing."""
    watchdog: Watchdog = "serve"
    """What becomes of reads and writes that a kernel with extent maps should not have sent."""
    daxdevs: tuple[tuple[UUID, str], ...] = ()
    """Where the further devices of the volume are, by UUID."""
    require_all_daxdevs: bool = False
    poll: float = 1.0
    """Seconds between looks at the log that no request asked for; 0: none."""
    alloc_cfg: str | None = None
    """The file that says how new files are striped; None: they are contiguous."""
    control_uid: int = 0
    """The user who may use the control socket like root."""
    debug: bool = False
    log_level: int = SYSLOG_LEVELS[5]
    """As the module `logging` counts."""
    ignored: tuple[str, ...] = ()
    """Options that were accepted and have no effect, for a note in the log."""

    @property
    def read_only(self) -> bool:
        """Whether the mount refuses every change."""
        return bool(self.attributes & MountAttr.RDONLY)


def parse_options(device: str, mount_point: str, words: Iterable[str] = (), *, sloppy: bool = False) -> MountOptions:
    """The options of a mount of `device` at `mount_point`.

    `words` are the arguments of `-o`, each a list separated by commas; a later word wins over an earlier one.
    Raises UsageError with the word that is unknown (`sloppy`: ignored and noted) or that has no such value.
    """
    if not device or not mount_point:
        raise UsageError("a mount needs a device and a mount point, neither of them empty")
    if "\0" in device + mount_point:
        raise UsageError("a path cannot contain a NUL byte")
    options = MountOptions(os.path.abspath(device), os.path.abspath(mount_point))
    attributes: list[str] = []
    ignored: list[str] = []
    for word in (word for argument in words for word in argument.split(",") if word):
        key, equals, value = word.partition("=")
        if key in _VALUES and (equals or key not in _FLAGS):
            options = _VALUES[key](options, _required(key, value))
        elif word in _FLAGS:
            options = _FLAGS[word](options)
        elif word in mountapi.OPTION_ATTRIBUTES:
            attributes.append(word)
        elif key == "shadow":
            ignored.append(word)
        elif word in _TOLERATED or word.startswith(_TOLERATED_PREFIXES):
            continue
        elif sloppy:
            ignored.append(word)
        else:
            raise UsageError(f"unknown mount option {word!r}; -s ignores options that are not known")
    if options.allow_other and not options.default_permissions:
        raise UsageError(
            "nodefault_permissions lets every user read and write every file; it needs nouseraccess beside it"
        )
    return replace(
        options, attributes=mountapi.attributes_from_options(attributes), ignored=(*options.ignored, *ignored)
    )


def encode(options: MountOptions) -> dict[str, Any]:
    """The options as JSON knows them, for `decode` of another program."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return values | {
        "attributes": int(options.attributes),
        "daxdevs": [[str(uuid), path] for uuid, path in options.daxdevs],
        "ignored": list(options.ignored),
    }


def decode(values: dict[str, Any]) -> MountOptions:
    """The options that `encode` wrote, also in an older version: what that did not know has its default.

    Raises UsageError for options that only a newer version knows, and KeyError, TypeError or ValueError for nonsense.
    """
    if unknown := values.keys() - {field.name for field in fields(MountOptions)}:
        raise UsageError(f"mount option {min(unknown)!r} is not known here")
    return MountOptions(
        **values
        | {
            "attributes": MountAttr(values["attributes"]),
            "daxdevs": tuple((UUID(uuid), path) for uuid, path in values["daxdevs"]),
            "ignored": tuple(values["ignored"]),
        }
    )


def syslog_level(text: str) -> int:
    """The syslog priority, 0 to 7, that a number or a word such as `warning` means. Raises UsageError."""
    text = text.strip().lower()
    if text in _LEVEL_NAMES:
        return _LEVEL_NAMES[text]
    if len(text) == 1 and text in "01234567":
        return int(text)
    raise UsageError(f"{text!r} is no log level: use 0 to 7, or one of {', '.join(_LEVEL_NAMES)}")


def _required(key: str, value: str) -> str:
    if not value:
        raise UsageError(f"mount option {key!r} needs a value: {key}=…")
    return value


def _choice(key: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"mount option {key}={value}: use one of {', '.join(choices)}")
    return value


def _seconds(key: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST_SECONDS:
        raise UsageError(f"mount option {key}={value}: use a number of seconds, 0 or more")
    return seconds


def _fmap(options: MountOptions, value: str) -> MountOptions:
    return replace(options, fmap=cast("dialects.Policy", _choice("fmap", value, ("require", "auto", "never"))))


def _kernel(options: MountOptions, value: str) -> MountOptions:
    return replace(options, kernel=cast("kernels.Choice", _choice("kernel", value, ("auto", "fuse", "famfs"))))


def _fastpath(options: MountOptions, value: str) -> MountOptions:
    return replace(options, fastpath=_choice("fastpath", value, ("on", "off")) == "on")


def _daxmode(options: MountOptions, value: str) -> MountOptions:
    return replace(options, daxmode=_choice("daxmode", value, tuple(MODES)))


def _no_open(options: MountOptions, value: str) -> MountOptions:
    return replace(options, no_open=_choice("no_open", value, ("on", "off")) == "on")


def _watchdog(options: MountOptions, value: str) -> MountOptions:
    return replace(options, watchdog=cast("Watchdog", _choice("watchdog", value, ("serve", "eio"))))


def _cache(options: MountOptions, value: str) -> MountOptions:
    return replace(options, cache=cast("Cache", _choice("cache", value, ("never", "auto", "always"))))


def _timeout(options: MountOptions, value: str) -> MountOptions:
    return replace(options, timeout=_seconds("timeout", value))


def _poll(options: MountOptions, value: str) -> MountOptions:
    return replace(options, poll=_seconds("poll", value))


def _alloc_cfg(options: MountOptions, value: str) -> MountOptions:
    if not value.startswith("/"):
        raise UsageError(f"mount option alloc_cfg={value}: the path must be absolute")
    return replace(options, alloc_cfg=value)


def _control_uid(options: MountOptions, value: str) -> MountOptions:
    if not (value.isascii() and value.isdigit() and len(value) < 11 and int(value) <= _LARGEST_UID):
        raise UsageError(f"mount option control_uid={value}: use the number of a user")
    return replace(options, control_uid=int(value))


def _dialect(options: MountOptions, value: str) -> MountOptions:
    return replace(options, dialect=dialects.by_name(value).name)


def _daxdev(options: MountOptions, value: str) -> MountOptions:
    text, _, path = value.partition("=")
    try:
        uuid = UUID(text)
    except ValueError:
        uuid = None
    if uuid is None or not path:
        raise UsageError(f"mount option daxdev={value}: write daxdev=UUID=PATH")
    if not path.startswith("/"):
        raise UsageError(f"mount option daxdev={value}: the path must be absolute")
    known = dict(options.daxdevs)
    if known.get(uuid, path) != path:
        raise UsageError(f"mount option daxdev names two paths for {uuid}: {known[uuid]} and {path}")
    return replace(options, daxdevs=tuple({**known, uuid: path}.items()))


def _level(key: str, value: str) -> int:
    try:
        return SYSLOG_LEVELS[syslog_level(value)]
    except UsageError as error:
        raise UsageError(f"mount option {key}: {error}") from None


def _log_level(options: MountOptions, value: str) -> MountOptions:
    return replace(options, log_level=_level("loglevel", value))


def _debug(options: MountOptions, value: str) -> MountOptions:
    level = _level("debug", value)
    return replace(options, debug=level == logging.DEBUG, log_level=level)


_VALUES: dict[str, Callable[[MountOptions, str], MountOptions]] = {
    "fmap": _fmap,
    "kernel": _kernel,
    "fastpath": _fastpath,
    "daxmode": _daxmode,
    "no_open": _no_open,
    "watchdog": _watchdog,
    "cache": _cache,
    "timeout": _timeout,
    "poll": _poll,
    "alloc_cfg": _alloc_cfg,
    "control_uid": _control_uid,
    "dialect": _dialect,
    "daxdev": _daxdev,
    "loglevel": _log_level,
    "debug": _debug,
}

_FLAGS: dict[str, Callable[[MountOptions], MountOptions]] = {
    "allow_other": lambda options: replace(options, allow_other=True),
    "nouseraccess": lambda options: replace(options, allow_other=False),
    "default_permissions": lambda options: replace(options, default_permissions=True),
    "nodefault_permissions": lambda options: replace(options, default_permissions=False),
    "create": lambda options: replace(options, create=True),
    "nocreate": lambda options: replace(options, create=False),
    "require_all_daxdevs": lambda options: replace(options, require_all_daxdevs=True),
    "debug": lambda options: replace(options, debug=True, log_level=logging.DEBUG),
}
