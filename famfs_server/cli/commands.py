# SPDX-License-Identifier: Apache-2.0
"""The one table of the programs and of the commands of `famfs`.

Help, completion and man pages come from it, and only the chosen module is ever imported.
"""

import importlib
from dataclasses import dataclass

import click


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: its name, one line of help, and the module in this package and its attribute that is the command."""

    name: str
    help: str
    module: str
    attribute: str = "command"

    def load(self) -> click.Command:
        """Import the command's module."""
        command: click.Command = getattr(importlib.import_module(f"famfs_server.cli.{self.module}"), self.attribute)
        return command


COMMANDS = {
    entry.name: entry
    for entry in (
        Entry("mount", "Mount a file system.", "mount"),
        Entry("upgrade", "Have a mount served by the version that is installed now.", "upgrade"),
        Entry("umount", "Unmount a file system, and wait until its server has gone.", "umount"),
        Entry("creat", "Create files of a given size, on request filled from a seed.", "creat"),
        Entry("mkdir", "Create directories.", "mkdir"),
        Entry("cp", "Copy files and directories into a file system.", "cp"),
        Entry("export", "Write a file system, or a part of it, as a tar archive.", "archive", "export_command"),
        Entry("import", "Put what is in a tar archive into a file system.", "archive", "import_command"),
        Entry("verify", "Compare files with the data that a seed stands for.", "verify"),
        Entry("check", "Compare what a mount shows with its log.", "check"),
        Entry("fsck", "Check a file system, show its figures, and mend what is safe to mend.", "fsck"),
        Entry("devadd", "Add a device to a file system. Experimental.", "devadd"),
        Entry("status", "Show the state of a mounted file system.", "status"),
        Entry("top", "Show the request rates of mounted file systems.", "top"),
        Entry("metrics", "Print the figures of mounted file systems for Prometheus.", "metrics"),
        Entry("list", "Show what is mounted, and which dax devices there are.", "listing"),
        Entry("doctor", "Find out what a mount lacks, and how to mend it.", "doctor"),
        Entry("loglevel", "Show or set how much the daemon of a mount logs.", "loglevel"),
        Entry("watch", "Tell what is created in a mounted file system, by this host and others.", "watch"),
        Entry("logplay", "Take in the log of a file system, or play it into a shadow tree.", "logplay"),
        Entry("getmap", "Show where the bytes of files lie.", "getmap"),
        Entry("map", "Draw what lies where: a file system, a device, or one file.", "map"),
        Entry("flush", "Write the cached data of files back to memory.", "flush"),
        Entry("chkread", "Compare reading and mapping of a superblock or log file.", "chkread"),
        Entry("mkmeta", "See that a mount has its meta files. Mounting makes them.", "mkmeta"),
        Entry("clone", "Not possible; says why.", "clone"),
        Entry("pcq", "Run a producer/consumer queue over two files.", "pcq"),
    )
}

PROGRAMS = {
    entry.name: entry
    for entry in (
        Entry("famfs", "Work with famfs, the file system in memory that several hosts share.", "famfs"),
        Entry("mkfs.famfs", "Make a famfs file system.", "mkfs"),
        Entry("mount.famfs", "Mount a famfs file system, for mount(8).", "mount", "helper"),
        Entry("umount.famfs", "Unmount a famfs file system, for umount(8).", "umount", "helper"),
        Entry("fsck.famfs", "Check a famfs file system, for fsck(8).", "fsck", "helper"),
        Entry("famfs-server", "Serve a famfs file system in the foreground.", "server"),
        Entry("famfs_fused", "Serve a famfs file system, with the reference server's arguments.", "fused"),
        Entry("pcq", "Run a producer/consumer queue over two files.", "pcq"),
    )
}
"""The programs that are installed; the first word of each is its file's name."""
