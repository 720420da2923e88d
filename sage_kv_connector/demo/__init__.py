# SPDX-License-Identifier: Apache-2.0
"""The hand-over that users see first: two real servers, their router, a small built-in model."""
