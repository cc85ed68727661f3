# SPDX-License-Identifier: Apache-2.0
"""The life of a mount: starting, supervising, telling the caller, ending."""
