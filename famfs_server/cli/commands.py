# SPDX-License-Identifier: Apache-2.0
"""The one table of the commands of `famfs`. Help comes from it, and only the chosen module is ever imported."""

import importlib
from dataclasses import dataclass

import click


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: its name, one line of help, and the module in this package whose `command` it is."""

    name: str
    help: str
    module: str

    def load(self) -> click.Command:
        """Import the command's module."""
        command: click.Command = importlib.import_module(f"famfs_server.cli.{self.module}").command
        return command


COMMANDS = {
    entry.name: entry
    for entry in (
        Entry("mount", "Mount a file system.", "mount"),
        Entry("umount", "Unmount a file system, and wait until its server has gone.", "umount"),
        Entry("creat", "Create files of a given size, on request filled from a seed.", "creat"),
        Entry("mkdir", "Create directories.", "mkdir"),
        Entry("cp", "Copy files and directories into a file system.", "cp"),
        Entry("verify", "Compare files with the data that a seed stands for.", "verify"),
        Entry("fsck", "Check a file system and show its figures. Never changes anything.", "fsck"),
        Entry("status", "Show the state of a mounted file system.", "status"),
        Entry("logplay", "Take in the log of a file system, or play it into a shadow tree.", "logplay"),
        Entry("getmap", "Show where the bytes of files lie.", "getmap"),
        Entry("flush", "Write the cached data of files back to memory.", "flush"),
        Entry("chkread", "Compare reading and mapping of a superblock or log file.", "chkread"),
    )
}
