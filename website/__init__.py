# SPDX-License-Identifier: Apache-2.0
"""The documents and man pages as a static site: `scripts/docs DIRECTORY`."""
