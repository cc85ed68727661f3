# SPDX-License-Identifier: Apache-2.0
"""Man pages and completions, made from the table of programs and commands: `python -m famfs_server.cli.manual DIR`."""
