# SPDX-License-Identifier: Apache-2.0
"""The kernels of an engine's device: compiled and loaded when it starts, so that no transfer waits for a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.devices.runtime import DeviceError, DeviceRuntime
from sage_kv_connector.engine.conversion.kernel_trial import KernelTrial
from sage_kv_connector.format.converter import ConvertedPlane
from sage_kv_connector.kernels.registry import GroupKernels, KernelsUnavailable, PagedGroup, kernel_sources

log = logging.getLogger(__name__)

#: Wire dtypes that a peer is likely to ask for, beside that of the cache and the configured one.
LIKELY = ("fp8_e4m3", "int4")


class DeviceKernels:
    """``lacks`` says why there are none, "" where there are; they are for ``architecture``, and were tried out.

    ``dtype``: of the pages; ``wire_dtypes``: what is compiled. Planes of others go the CPU's way.
    """

    def __init__(self, runtime: DeviceRuntime, device: int, dtype: str, wire_dtypes: Iterable[str]) -> None:
        self._functions: dict[tuple[str, str, str], int] = {}
        self._refused: set[str] = set()
        self._api = runtime.api
        self.lacks = self.architecture = ""
        if dtype not in CONVERTIBLE_DTYPES:
            self.lacks = f"pages of {dtype} go as they are"
            return
        try:
            if not runtime.features.kernels:
                raise KernelsUnavailable(f"{runtime.api} launches no kernels")
            self._sources = sources = kernel_sources(runtime.vendor)
            self.architecture = runtime.architecture(device)
            log.info("kernels of %s for %s are compiled, once a machine", runtime.api, self.architecture)
            wires = tuple(dict.fromkeys((dtype, *wire_dtypes, *LIKELY)))
            for wire in wires:
                code = sources.compiled(dtype, wire, self.architecture)
                for verb in ("encode", "decode"):
                    name = f"kv_{verb}_{dtype}_{wire}"
                    self._functions[verb, dtype, wire] = runtime.load_function(device, code, name)
            self._try_out(runtime, device, dtype, wires)
        except (KernelsUnavailable, DeviceError) as error:
            self.give_up(str(error))

    def give_up(self, why: str) -> None:
        """From now on the CPU converts; before the first group is made."""
        self.lacks = why
        log.warning("KV on %s is converted by the CPU: %s", self._api, why)

    def group(self, dtype: str, view: GroupView, planes: Sequence[ConvertedPlane]) -> GroupKernels | None:
        """None where these pages go the CPU's way; the reason is logged once."""
        if self.lacks:
            return None
        try:
            return self._sources.group(
                PagedGroup(dtype, view.page_size, view.pages, view.heads, planes), self._function
            )
        except ValueError as error:
            if str(error) not in self._refused:
                self._refused.add(str(error))
                log.warning("a group of pages is converted by the CPU: %s", error)
            return None

    def of_peer(self, group: PagedGroup) -> GroupKernels:
        """Kernels over a peer's pages, whose bases come with each launch. Raises ValueError naming what they lack."""
        if self.lacks:
            raise ValueError(self.lacks)
        return self._sources.group(group, self._function)

    def _try_out(self, runtime: DeviceRuntime, device: int, dtype: str, wires: Sequence[str]) -> None:
        """Keep those that make what the CPU makes."""
        trial = KernelTrial(runtime, device, dtype)
        try:
            for wire in wires:
                try:
                    differs = trial.differs(self._sources, self._function, wire)
                except ValueError as error:
                    differs = str(error)
                if differs:
                    log.error("kernels for %s to %s are not used, they differ: %s", dtype, wire, differs)
                    for verb in ("encode", "decode"):
                        del self._functions[verb, dtype, wire]
        finally:
            trial.close()

    def _function(self, verb: str, dtype: str, wire: str) -> int:
        found = self._functions.get((verb, dtype, wire))
        if found is None:
            raise ValueError(
                f"there is no kernel of {dtype} to {wire}: none was compiled, or it failed its trial"
            )
        return found
