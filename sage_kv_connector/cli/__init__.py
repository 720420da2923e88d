# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt``: demo, benchmarks, and what works on this machine."""
