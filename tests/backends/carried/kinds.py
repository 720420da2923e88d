# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from sage_kv_connector.backends.carried.backend import CarriedBackend
from tests.backends.carried.this_machine import ThisMachineBackend
from tests.backends.kinds import Kind, forge_native
from tests.backends.tcp.kinds import stranger

BOUNDS = (("lanes", 0), ("chunk_bytes", 100), ("spin_us", 10**9), ("slots", 0))


def carried_kind(made: type[CarriedBackend]) -> Kind:
    """One socket, and one path over the library."""
    name = made.capabilities.name
    return Kind(
        name,
        made,
        f"{name}://127.0.0.1:0",
        mode=name,
        lanes=2,
        crosses_wire=True,
        bounds=BOUNDS,
        stranger=stranger,
        kernel_answers=True,
        forge=forge_native,
    )


KINDS = (carried_kind(ThisMachineBackend),)
