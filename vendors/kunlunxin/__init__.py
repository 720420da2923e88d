# SPDX-License-Identifier: Apache-2.0
"""Kunlunxin: XPUs through the XPU runtime (XRE)."""
