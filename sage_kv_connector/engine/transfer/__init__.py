# SPDX-License-Identifier: Apache-2.0
"""Transfers: offers of the prefill side, subscriptions of the decode side, parts of converting ones."""
