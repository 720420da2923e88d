# SPDX-License-Identifier: Apache-2.0
"""Conversion kernels by device, and the golden vectors that they share."""
