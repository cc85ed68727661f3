# SPDX-License-Identifier: Apache-2.0
"""Debian packages: where this machine gets them from, fetching and unpacking without installing."""

import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.report import RunnerError

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_SECONDS = 900


@dataclass(frozen=True)
class Source:
    """One archive and suite of an apt source list."""

    uri: str
    suite: str
    options: str

    def line(self) -> str:
        return f"deb [{self.options}] {self.uri} {self.suite} main\n"


def source(uri: str, suite: str, signed_by: str) -> Source:
    keyring = signed_by if signed_by.startswith("/") else str(DEBIAN_KEYRING)
    options = f"arch=amd64 signed-by={keyring}" if Path(keyring).exists() else "arch=amd64"
    return Source(uri.rstrip("/"), suite, options)


def read_deb822(text: str) -> Iterator[Source]:
    """The binary sources of a .sources file (section main, not disabled)."""
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields = {
            name.lower(): " ".join(value.split())
            for name, value in re.findall(r"(?m)^([\w-]+):((?:.*(?:\n[ \t].*)*))", stanza)
        }
        disabled = fields.get("enabled", "yes").lower() in ("no", "false")
        if disabled or "deb" not in fields.get("types", "").split():
            continue
        if "main" in fields.get("components", "").split():
            for uri in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield source(uri, suite, fields.get("signed-by", ""))


def read_one_line_style(text: str) -> Iterator[Source]:
    """The binary sources of a sources.list file (section main)."""
    line = r"(?m)^deb[ \t]+(?:\[(.*?)\][ \t]+)?(\S+)[ \t]+(\S+)[ \t]+(.*)$"
    for options, uri, suite, sections in re.findall(line, text):
        if "main" in sections.partition("#")[0].split():
            signed_by = re.search(r"signed-by=(\S+)", options)
            yield source(uri, suite, signed_by[1] if signed_by else "")


def machine_sources() -> list[Source]:
    """This machine's sources of its own Debian release, the base suite first."""
    release = platform.freedesktop_os_release()
    if not shutil.which("apt-get") or release.get("ID") != "debian":
        raise RunnerError("needs Debian and its apt-get to fetch QEMU and a kernel; this machine has none")
    folder = Path("/etc/apt/sources.list.d")
    found: list[Source] = []
    for path in [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list"))]:
        if path.exists():
            found += read_one_line_style(path.read_text())
    for path in sorted(folder.glob("*.sources")):
        found += read_deb822(path.read_text())
    codename = release.get("VERSION_CODENAME", "sid")
    bases = {codename, "stable", "oldstable", "testing", "unstable", "sid"}
    own = [one for one in found if re.sub(r"(-updates|-security|/updates)$", "", one.suite) in bases]
    own.sort(key=lambda one: one.suite not in bases)
    if not own or own[0].suite not in bases:
        raise RunnerError(f"the apt sources in /etc/apt name no Debian archive (suite {codename}, section main)")
    return own


def sources_of(suites: Sequence[str]) -> list[Source]:
    """This machine's archives, with other suites of them."""
    own = machine_sources()
    security = next((one for one in own if re.search(r"-security$|/updates$", one.suite)), None)
    chosen = []
    for suite in suites:
        archive = security if suite.endswith("-security") else own[0]
        if archive:
            chosen.append(Source(archive.uri, suite, archive.options))
    return chosen


class Apt:
    """apt with lists and downloads of its own: the machine's package state is read at most, never changed."""

    def __init__(self, folder: Path, sources: Sequence[Source], *, seen: Path) -> None:
        """seen: the dpkg status file that says what is installed already."""
        for name in ("lists/partial", "archives/partial", "parts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.archives = folder / "archives"
        (folder / "sources.list").write_text("".join(one.line() for one in sources))
        settings = {
            "Dir::State::Lists": folder / "lists",
            "Dir::State::status": seen,
            "Dir::Cache": folder,
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "parts",
            "Dir::Etc::preferences": folder / "parts" / "none",
            "Dir::Etc::preferencesparts": folder / "parts",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": 2,
            "Acquire::http::Timeout": 30,
            "Debug::NoLocking": "true",  # the folder is private, and so is its lock
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def _run(self, command: Sequence[str | Path], purpose: str, folder: Path | None = None) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                [command[0], *self._options, *command[1:]],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=APT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunnerError(f"{purpose}: no answer within {APT_SECONDS} s; is the network there?") from None
        if done.returncode:
            lines = [line[3:] for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
            raise RunnerError(f"{purpose} failed; is the network there? apt says: {(lines or ['nothing'])[0]}")
        return done.stdout

    def update(self) -> None:
        self._run(["apt-get", "-qq", "update", "--error-on=any"], "fetching Debian's package lists")

    def knows(self, package: str) -> bool:
        return bool(self._run(["apt-cache", "madison", package], f"looking for package {package}").strip())

    def version(self, package: str) -> str | None:
        """The newest version of a package that these sources have."""
        listing = self._run(["apt-cache", "madison", package], f"looking for package {package}")
        fields = listing.partition("\n")[0].split("|")
        return fields[1].strip() if len(fields) > 1 else None

    def dependency(self, package: str, pattern: str) -> str:
        """The first dependency of a package that matches the pattern."""
        listing = self._run(["apt-cache", "depends", package], f"looking for package {package}")
        match = re.search(rf"Depends: ({pattern})", listing)
        if not match:
            raise RunnerError(f"Debian's package {package} is not what it was: no dependency like {pattern}")
        return match[1]

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Fetch these packages, and no others."""
        self.clean()
        purpose = f"downloading {' '.join(packages)}"
        self._run(["apt-get", "-qq", "download", *packages], purpose, self.archives)
        return sorted(self.archives.glob("*.deb"))

    def download_missing(self, packages: Sequence[str], suite: str = "") -> list[Path]:
        """Fetch these packages and whatever they need that is not installed on this machine; what `suite` has comes
        from there.
        """
        self.clean()
        preference = ["-t", suite] if suite else []
        self._run(
            ["apt-get", *preference, "-qq", "-y", "--no-install-recommends", "--download-only", "install", *packages],
            f"downloading {' '.join(packages)}",
        )
        return sorted(self.archives.glob("*.deb"))

    def clean(self) -> None:
        for path in self.archives.glob("*.deb"):
            path.unlink()


def unpack(package: Path, destination: Path) -> None:
    command = ["dpkg-deb", "-x", str(package), str(destination)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunnerError(f"unpacking {package.name} failed: {done.stderr.strip()}")


def files_of(package: Path, pattern: re.Pattern[str]) -> dict[str, bytes]:
    """The package's plain files whose whole path matches, by path."""
    found = {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and pattern.fullmatch(member.name):
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    if process.returncode:
        raise RunnerError(f"unpacking {package.name} failed")
    return found
