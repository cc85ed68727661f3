# SPDX-License-Identifier: Apache-2.0
"""The kernel side: wire format, dialects, the mount calls, negotiation and the two planes that answer requests."""
