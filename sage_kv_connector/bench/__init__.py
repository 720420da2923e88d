# SPDX-License-Identifier: Apache-2.0
"""Measurements: each module runs one comparison and returns its figures; the commands print them."""
