# SPDX-License-Identifier: Apache-2.0
"""Hygon: DCUs through DTK's HIP."""
