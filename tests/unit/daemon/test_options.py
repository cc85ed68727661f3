# SPDX-License-Identifier: Apache-2.0
"""Mount options: defaults, every word, what is tolerated, what is refused and in which words."""

import logging
from uuid import UUID

import pytest

from famfs_server.daemon.options import MountOptions, parse_options, syslog_level
from famfs_server.errors import UsageError
from famfs_server.fuse.mountapi import DEFAULT_ATTRIBUTES, MountAttr

FIRST = UUID("a0a1a2a3-a4a5-46a7-a8a9-aaabacad0003")
SECOND = UUID("a0a1a2a3-a4a5-46a7-a8a9-aaabacad0004")


def parse(*words: str, sloppy: bool = False) -> MountOptions:
    return parse_options("/dev/dax0.0", "/mnt/famfs", words, sloppy=sloppy)


def test_defaults_are_the_safe_ones() -> None:
    options = parse()
    assert (options.device, options.mount_point) == ("/dev/dax0.0", "/mnt/famfs")
    assert options.fmap == "auto"
    assert options.fastpath
    assert options.create
    assert options.cache == "never"
    assert options.no_open
    assert options.daxmode is None
    assert options.watchdog == "serve"
    assert options.timeout is None
    assert options.allow_other
    assert options.default_permissions
    assert options.attributes == DEFAULT_ATTRIBUTES == MountAttr.NOSUID | MountAttr.NODEV
    assert not options.read_only
    assert options.daxdevs == ()
    assert options.log_level == logging.INFO
    assert not options.debug


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("fmap=require", "fmap", "require"),
        ("fmap=never", "fmap", "never"),
        ("fmap=never,fmap=auto", "fmap", "auto"),
        ("fastpath=off", "fastpath", False),
        ("fastpath=off,fastpath=on", "fastpath", True),
        ("cache=always", "cache", "always"),
        ("no_open=off", "no_open", False),
        ("daxmode=famfs", "daxmode", "famfs"),
        ("daxmode=devdax", "daxmode", "devdax"),
        ("no_open=on", "no_open", True),
        ("watchdog=eio", "watchdog", "eio"),
        ("watchdog=eio,watchdog=serve", "watchdog", "serve"),
        ("timeout=0", "timeout", 0.0),
        ("timeout=2.5", "timeout", 2.5),
        ("poll=0", "poll", 0.0),
        ("control_uid=1000", "control_uid", 1000),
        ("nocreate", "create", False),
        ("nocreate,create", "create", True),
        ("dialect=push", "dialect", "push"),
        ("require_all_daxdevs", "require_all_daxdevs", True),
        ("nouseraccess", "allow_other", False),
        ("nouseraccess,allow_other", "allow_other", True),
        ("nouseraccess,nodefault_permissions", "default_permissions", False),
        ("loglevel=7", "log_level", logging.DEBUG),
        ("loglevel=Warning", "log_level", logging.WARNING),
        ("debug", "debug", True),
        ("debug", "log_level", logging.DEBUG),
        ("debug=7", "debug", True),
        ("debug=3", "log_level", logging.ERROR),
        ("ro", "read_only", True),
        ("ro,rw", "read_only", False),
        ("suid,dev", "attributes", MountAttr(0)),
        ("noexec,noatime", "attributes", DEFAULT_ATTRIBUTES | MountAttr.NOEXEC | MountAttr.NOATIME),
        ("noatime,strictatime", "attributes", DEFAULT_ATTRIBUTES | MountAttr.STRICTATIME),
        (",,ro,", "read_only", True),
    ],
)
def test_a_word_sets_its_field(words: str, field: str, value: object) -> None:
    assert getattr(parse(words), field) == value


def test_several_lists_add_up_in_order() -> None:
    options = parse("ro,fmap=never", "rw", "noexec")
    assert not options.read_only
    assert options.fmap == "never"
    assert options.attributes & MountAttr.NOEXEC


def test_every_daxdev_is_kept() -> None:
    options = parse(f"daxdev={FIRST}=/dev/dax1.0", f"daxdev={SECOND}=/dev/dax2.0,daxdev={FIRST}=/dev/dax1.0")
    assert options.daxdevs == ((FIRST, "/dev/dax1.0"), (SECOND, "/dev/dax2.0"))


@pytest.mark.parametrize(
    "words",
    [
        "_netdev,nofail,auto,noauto,user,users,nouser,owner,group,defaults",
        "x-systemd.requires=foo.service,x-gvfs-hide,comment=for=the=record",
    ],
)
def test_words_for_others_are_tolerated(words: str) -> None:
    assert parse(words) == parse()


def test_the_shadow_of_the_reference_is_noted_and_ignored() -> None:
    assert parse("shadow=/tmp/shadow").ignored == ("shadow=/tmp/shadow",)


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    options = parse_options("image", "mnt/../there")
    assert options.device == f"{tmp_path}/image"
    assert options.mount_point == f"{tmp_path}/there"


@pytest.mark.parametrize(
    "word",
    [
        "bogus",
        "bogus=1",
        "fmap",
        "fmap=",
        "fmap=sometimes",
        "fastpath=yes",
        "cache=normal",
        "no_open",
        "no_open=never",
        "daxmode=system-ram",
        "watchdog=bark",
        "timeout=-1",
        "timeout=nan",
        "timeout=inf",
        "timeout=1e99",
        "timeout=soon",
        "poll=",
        "dialect=klingon",
        "daxdev=/dev/dax1.0",
        "daxdev=nonsense=/dev/dax1.0",
        f"daxdev={FIRST}=",
        f"daxdev={FIRST}=dax1.0",
        f"daxdev={FIRST}=/dev/dax1.0,daxdev={FIRST}=/dev/dax2.0",
        "loglevel=8",
        "loglevel=loud",
        "debug=-1",
        "nodefault_permissions",
        "nocreate=1",
        "RO",
    ],
)
def test_what_means_nothing_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(word)
    message = str(caught.value)
    assert "\n" not in message
    assert word.split("=", 1)[0] in message
    assert caught.value.exit_status == 2


def test_sloppy_tolerates_unknown_words_but_no_wrong_values() -> None:
    options = parse("bogus,other=1,ro", sloppy=True)
    assert options.ignored == ("bogus", "other=1")
    assert options.read_only
    with pytest.raises(UsageError):
        parse("fmap=sometimes", sloppy=True)


@pytest.mark.parametrize(("device", "mount_point"), [("", "/mnt"), ("/dev/dax0.0", ""), ("/dev/dax\0", "/mnt")])
def test_a_mount_needs_both_paths(device: str, mount_point: str) -> None:
    with pytest.raises(UsageError):
        parse_options(device, mount_point)


def test_log_levels_are_numbers_or_words() -> None:
    assert [syslog_level(text) for text in ("0", " 7\n", "debug", "ERROR")] == [0, 7, 7, 3]
    with pytest.raises(UsageError):
        syslog_level("77")
