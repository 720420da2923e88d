# SPDX-License-Identifier: Apache-2.0
"""The ways of sending KV that are compared: wire formats, mixed caches, controls, and formats that are considered."""

from __future__ import annotations

from evaluation.kv_change import KVChange
from evaluation.pair import Arm, has_fp8_cache

#: What all others are compared with.
BASE = "bf16"
FORMATS = (BASE, "fp8_e4m3", "int4")
#: vLLM keeps an fp8 cache on some CPUs only; elsewhere decode's KV is cast as such a cache has it.
MIXED = "bf16 to fp8 cache" if has_fp8_cache() else "bf16 to fp8 cache, emulated"
CONTROLS = ("zeroed", "2 bits")
#: Keys and values apart, more bits for keys or values, first and last two layers in fp8.
CONSIDERED = ("int4 keys", "int4 values", "fp8 keys, int4 values", "int4 keys, fp8 values", "int4, edges fp8")
EDGE_LAYERS = 2


def missing() -> dict[str, str]:
    """What this machine cannot run, and why."""
    if has_fp8_cache():
        return {}
    return {"bf16 to fp8 cache": "vLLM keeps an fp8 cache only on CPUs with AVX-512 or AMX: emulated instead"}


def arm(name: str, layers: int) -> Arm:
    """By its name, for a model of so many layers. Raises KeyError for another name."""
    sent = {
        "zeroed": ("zero", "zero", None),
        "2 bits": ("int2", "int2", None),
        "int4 keys": ("int4", "bf16", None),
        "int4 values": ("bf16", "int4", None),
        "fp8 keys, int4 values": ("fp8_e4m3", "int4", None),
        "int4 keys, fp8 values": ("int4", "fp8_e4m3", None),
        "int4, edges fp8": ("int4", "int4", "fp8_e4m3"),
    }
    if name in FORMATS:
        return Arm(name, target_dtype=name)
    if name == "bf16 to fp8 cache":
        return Arm(name, decode_cache="fp8")
    if name == "bf16 to fp8 cache, emulated":
        cast = KVChange("sent", "cast", "cast"), KVChange("written", "cast", "cast")
        return Arm(name, target_dtype=BASE, changes=cast)
    k, v, edge = sent[name]
    return Arm(
        name,
        target_dtype=BASE,
        changes=(KVChange("sent", k, v, edge, EDGE_LAYERS if edge else 0, layers), None),
    )
