# SPDX-License-Identifier: Apache-2.0
"""BANG C kernels of the wire formats for Cambricon's MLUs, compiled at first use."""
