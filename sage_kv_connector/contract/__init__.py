# SPDX-License-Identifier: Apache-2.0
"""The shared vocabulary: what KV cache is, what moves, and what came of it. No I/O, no torch."""
