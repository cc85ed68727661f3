# SPDX-License-Identifier: Apache-2.0
"""Capabilities, checked and dropped in processes of their own and read back from the kernel."""

import os
import shutil
import subprocess
import sys

import prctl
import pytest

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
ADMIN, RAWIO = "cap_sys_admin", "cap_sys_rawio"

STATUS = """
import ctypes, prctl
for line in open("/proc/thread-self/status"):
    if line.startswith(("Cap", "NoNewPrivs")):
        print(line.strip())
print("Dumpable:", int(prctl.get_dumpable()))
print("Securebits:", prctl.get_securebits())
"""


def run(code: str, *wrapper: str) -> subprocess.CompletedProcess[str]:
    command = [*wrapper, sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def status_after(code: str, *wrapper: str) -> dict[str, int]:
    done = run(f"from famfs_server import privileges\n{code}\n{STATUS}", *wrapper)
    assert done.returncode == 0, done.stderr
    lines = (line.split(":") for line in done.stdout.splitlines())
    return {name: int(value, 16 if name.startswith("Cap") else 10) for name, value in lines}


def require(*wrapper: str) -> str:
    """What `require_mount_capabilities` complains about in a process started by `wrapper`."""
    code = (
        "from famfs_server import privileges, errors\n"
        "try:\n    privileges.require_mount_capabilities()\n"
        "except errors.PrivilegeError as error:\n    print(error)\n"
    )
    done = run(code, *wrapper)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without(*capabilities: str) -> list[str]:
    """A command that runs another one without these capabilities."""
    minus = ",".join(f"-{name.removeprefix('cap_')}" for name in capabilities)
    return ["setpriv", f"--bounding-set={minus}"]


@ROOT
def test_root_may_mount() -> None:
    assert require() == ""


@ROOT
@pytest.mark.parametrize("names", [(RAWIO,), (ADMIN,), (ADMIN, RAWIO)])
def test_missing_capability_is_named(names: tuple[str, ...]) -> None:
    message = require(*without(*names))
    assert message.count("\n") == 1
    assert message.split(":")[0].split(" and ")[0].split()[0] == names[0].upper()
    cause = message.split(":")[0]
    assert {name for name in (ADMIN, RAWIO) if name.upper() in cause} == set(names)


@ROOT
def test_capsh_too() -> None:
    if shutil.which("capsh") is None:
        pytest.skip("capsh is not installed")
    code = "from famfs_server import privileges; privileges.require_mount_capabilities()"
    done = subprocess.run(
        ["capsh", f"--drop={RAWIO}", "--", "-c", f"exec {sys.executable} -c '{code}'"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "PrivilegeError: CAP_SYS_RAWIO is missing" in done.stderr


@ROOT
def test_root_of_another_user_namespace_may_not() -> None:
    if run("", "unshare", "--user", "--map-root-user").returncode != 0:
        pytest.skip("user namespaces cannot be made here")
    message = require("unshare", "--user", "--map-root-user")
    assert "user namespace" in message
    assert message.count("\n") == 1


@ROOT
def test_the_check_opens_no_device() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    code = "from famfs_server import privileges; privileges.require_mount_capabilities()"
    trace = ["strace", "-f", "-e", "trace=open,openat,openat2"]
    done = run(code, *without(RAWIO), *trace)
    assert "CAP_SYS_RAWIO is missing" in done.stderr
    assert "/dev/fuse" not in done.stderr
    assert "/dev/dax" not in done.stderr


@ROOT
def test_drop_all() -> None:
    status = status_after("privileges.drop_all()")
    assert {name: value for name, value in status.items() if name.startswith("Cap")} == {
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
        "CapBnd": 0,
        "CapAmb": 0,
    }
    assert status["NoNewPrivs"] == 1
    assert status["Dumpable"] == 0
    # NOROOT and NO_SETUID_FIXUP with their locks; KEEP_CAPS locked off.
    assert status["Securebits"] == 0b101111


@ROOT
def test_keep_only_one() -> None:
    status = status_after("privileges.keep_only([privileges.CAP_SYS_ADMIN])")
    assert status["CapPrm"] == status["CapEff"] == 1 << prctl.CAP_SYS_ADMIN
    assert status["CapInh"] == status["CapAmb"] == status["CapBnd"] == 0
    assert status["NoNewPrivs"] == 1


@ROOT
def test_dropping_twice() -> None:
    status = status_after("privileges.keep_only([privileges.CAP_SYS_ADMIN])\nprivileges.drop_all()")
    assert status["CapPrm"] == 0


@ROOT
def test_ambient_and_inheritable_capabilities_are_dropped() -> None:
    wrapper = ["setpriv", "--inh-caps=+sys_rawio", "--ambient-caps=+sys_rawio"]
    assert status_after("", *wrapper)["CapAmb"] == 1 << prctl.CAP_SYS_RAWIO
    status = status_after("privileges.drop_all()", *wrapper)
    assert status["CapAmb"] == status["CapInh"] == 0


@ROOT
def test_without_setpcap_the_capabilities_go_all_the_same() -> None:
    status = status_after("privileges.drop_all()", *without("cap_setpcap"))
    assert status["CapPrm"] == status["CapEff"] == 0
    assert status["CapBnd"] != 0
    assert status["NoNewPrivs"] == 1


@ROOT
def test_no_exec_regains_anything() -> None:
    code = (
        "import os, sys\nfrom famfs_server import privileges\nprivileges.drop_all()\n"
        "os.execvp('grep', ['grep', 'CapEff', '/proc/self/status'])"
    )
    for wrapper in ([], without("cap_setpcap")):
        done = run(code, *wrapper)
        assert done.stdout.split() == ["CapEff:", "0" * 16]


@ROOT
def test_threads_started_later_have_none() -> None:
    code = (
        "import threading\nfrom famfs_server import privileges\nprivileges.drop_all()\n"
        "show = lambda: print(*[l for l in open('/proc/thread-self/status') if l.startswith('CapEff')])\n"
        "thread = threading.Thread(target=show)\nthread.start()\nthread.join()"
    )
    assert run(code).stdout.split() == ["CapEff:", "0" * 16]


def test_dropping_beside_other_threads_is_refused() -> None:
    code = (
        "import threading\nfrom famfs_server import privileges\n"
        "end = threading.Event()\nthreading.Thread(target=end.wait, daemon=True).start()\n"
        "privileges.drop_all()"
    )
    done = run(code)
    assert done.returncode == 1
    assert "PrivilegeError: capabilities must be dropped before threads start, and 2 run" in done.stderr


@ROOT
def test_a_capability_that_is_not_held_cannot_be_kept() -> None:
    done = run(
        "from famfs_server import privileges\nprivileges.keep_only([privileges.CAP_SYS_RAWIO])",
        *without(RAWIO),
    )
    assert done.returncode == 1
    assert "PrivilegeError: capabilities cannot be dropped" in done.stderr


def test_unprivileged_processes_drop_nothing_without_complaint() -> None:
    wrapper = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if (
        subprocess.run(
            [*wrapper, sys.executable, "-c", "import famfs_server"], capture_output=True, check=False
        ).returncode
        != 0
    ):
        pytest.skip("another user cannot read this checkout, which lies in a folder closed to others")
    status = status_after("privileges.drop_all()", *wrapper)
    assert status["CapPrm"] == 0
    assert status["NoNewPrivs"] == 1


def test_prefer_survival() -> None:
    code = (
        "import logging, prctl\nfrom famfs_server import privileges\n"
        "logging.basicConfig(level=logging.DEBUG, format='%(levelname)s %(message)s')\n"
        "allowed = privileges.holds(prctl.CAP_SYS_RESOURCE)\n"
        "privileges.prefer_survival()\n"
        "print(allowed, allowed and prctl.get_io_flusher(), open('/proc/self/oom_score_adj').read().strip())"
    )
    for wrapper in ([], without("cap_sys_resource") if os.geteuid() == 0 else []):
        done = run(code, *wrapper)
        assert done.returncode == 0, done.stderr
        allowed, flusher, score = done.stdout.split()
        if allowed == "True":
            assert (flusher, score) == ("1", "-900")
        else:
            assert "DEBUG IO_FLUSHER is not set" in done.stderr
            assert "DEBUG the OOM score stays" in done.stderr
