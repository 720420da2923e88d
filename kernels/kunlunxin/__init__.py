# SPDX-License-Identifier: Apache-2.0
"""XPU C++ kernels of the wire formats for Kunlunxin's XPUs, compiled at first use."""
