# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of the wire formats, compiled at first use; HIP uses the same sources."""
