# SPDX-License-Identifier: Apache-2.0
"""What vendors share: C interfaces as data, loading a library, and a runtime over CUDA-like calls."""
