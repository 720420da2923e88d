# SPDX-License-Identifier: Apache-2.0
"""Conversion kernels in Triton: the portable path for devices that have a Triton backend."""
