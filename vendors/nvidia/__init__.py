# SPDX-License-Identifier: Apache-2.0
"""NVIDIA: GPUs through the CUDA driver."""
