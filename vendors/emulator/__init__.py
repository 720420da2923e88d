# SPDX-License-Identifier: Apache-2.0
"""Vendors' libraries emulated over host memory: for tests and for trying things without a card.

Nothing here says anything about a vendor's speed, and little about its correctness: what ran
on it is called "emulated".
"""

from sage_kv_connector.vendors.emulator.settings import EmulatorSettings

__all__ = ["EmulatorSettings"]
