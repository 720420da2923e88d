# SPDX-License-Identifier: Apache-2.0
"""Who converts for a cache: the CPU's kernels, or the device's that it lies on."""

from __future__ import annotations

from collections.abc import Callable

from sage_kv_connector.backends.native import default_lanes
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.devices.runtime import DeviceMemory
from sage_kv_connector.engine.conversion.device_jobs import DeviceConversions
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.engine.conversion.jobs import Conversions, CpuConversions


def start_conversions(
    config: KVTransportConfig,
    schema: KVCacheSchema,
    device: DeviceMemory | None,
    register: Callable[[int, int], None],
) -> Conversions:
    """``register``: makes (address, length) of host memory usable in posts and windows."""
    threads = config.overlap_streams or default_lanes()
    if device is None:
        return CpuConversions(threads, config.staging_bytes, register)
    wire_dtypes = () if config.target_dtype == "auto" else (config.target_dtype,)
    return DeviceConversions(
        device.runtime,
        device.number,
        threads,
        config.staging_bytes,
        register,
        DeviceKernels(device.runtime, device.number, schema.dtype, wire_dtypes),
        whole_pages=not all(group.canonical for group in schema.groups),
    )
