# SPDX-License-Identifier: Apache-2.0
"""Cambricon: MLUs through CNRT."""
