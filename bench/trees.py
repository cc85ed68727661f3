# SPDX-License-Identifier: Apache-2.0
"""The trees that metadata is measured on: the same names for every contender.

Directories `dNNNN` hold the files `fNNNNNNN` that are measured, the directory `w` others for warming up. The numbers of
the files go through all directories, so that the loop in constants.c can tell a file by its name alone.
"""

from dataclasses import dataclass

WARM_DIRECTORY = "w"
WARM_FILES = 400


@dataclass(frozen=True, slots=True)
class Tree:
    """`directories` directories with `files_each` files in each."""

    name: str
    directories: int
    files_each: int

    @property
    def files(self) -> int:
        """Files to be measured, without those for warming up."""
        return self.directories * self.files_each

    @property
    def directory_names(self) -> list[str]:
        """The directories that hold what is measured."""
        return [f"d{number:04}" for number in range(self.directories)]

    @property
    def file_names(self) -> list[str]:
        """The files that are measured, relative to the root."""
        each = self.files_each
        return [f"d{number // each:04}/f{number:07}" for number in range(self.files)]

    @property
    def warm_names(self) -> list[str]:
        """Files to warm up with: the server's code, not these measured names."""
        return [f"{WARM_DIRECTORY}/f{number:07}" for number in range(self.files, self.files + WARM_FILES)]
