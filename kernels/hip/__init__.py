# SPDX-License-Identifier: Apache-2.0
"""HIP (ROCm, DCU): the CUDA sources through hipcc, launched through libamdhip64 or libgalaxyhip."""
