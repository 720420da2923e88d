# SPDX-License-Identifier: Apache-2.0
"""What kernels of several vendors share: their argument, launches over a group's pages, compiling once a machine."""
