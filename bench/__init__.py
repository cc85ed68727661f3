# SPDX-License-Identifier: Apache-2.0
"""Measures the server beside others in one run: `scripts/bench --help`. What the figures mean: docs/performance.md."""
