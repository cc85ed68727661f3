# SPDX-License-Identifier: Apache-2.0
"""A mounted or opened file system as one object: superblock, log, namespace and space."""
