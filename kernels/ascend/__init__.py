# SPDX-License-Identifier: Apache-2.0
"""Ascend C kernels of the wire formats for Huawei's NPUs, compiled at first use."""
