# SPDX-License-Identifier: Apache-2.0
"""NIXL's Python API (1.5.1): one agent, reads by descriptor lists."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import numpy as np

from sage_kv_connector.backends.carried.library import LibraryError, LibrarySettings, Rows

DEFAULT_PLUGIN = "UCX"
#: NIXL's own thread looks that often, in microseconds, when nothing wakes it. Its Python API sets 0, which takes a
#: whole core when nothing moves, and is slower than this where cores are few (seen with 1.5.1, UCX over tcp and cma).
PROGRESS_US = 100_000
#: NIXL's name of host memory.
HOST_MEMORY = "DRAM"
ENDED_WELL, UNDER_WAY = "DONE", "PROC"


class NixlLibrary:
    """``settings.transport`` is one of NIXL's plugins; it has no device to choose, its plugin's environment has."""

    def __init__(self, settings: LibrarySettings) -> None:
        if settings.device:
            raise LibraryError(
                f"library_device is {settings.device!r}, and NIXL takes none; UCX's is chosen by $UCX_NET_DEVICES"
            )
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        api = import_module("nixl._api")
        plugin = settings.transport or DEFAULT_PLUGIN
        try:
            self._agent = _agent(api, f"sage_kvt-{uuid4().hex}")
            if plugin not in self._agent.get_plugin_list():
                plugins = ", ".join(sorted(self._agent.get_plugin_list()))
                raise LibraryError(f"library_transport is {plugin!r}; allowed: {plugins}")
            self._agent.create_backend(plugin)
        except LibraryError:
            raise
        except Exception as error:
            raise LibraryError(f"NIXL does not start: {error}") from error
        self._registered: dict[tuple[int, int], Any] = {}
        self._names: dict[int, str] = {}

    @staticmethod
    def lacks() -> str:
        try:
            found = find_spec("nixl._api") is not None
        except ModuleNotFoundError:
            found = False
        return "" if found else "NIXL is not installed (pip install nixl)"

    def register(self, address: int, length: int) -> None:
        try:
            made = self._agent.register_memory([(address, length, 0, "")], HOST_MEMORY)
        except Exception as error:
            raise LibraryError(f"NIXL can't register {length} bytes: {error}") from error
        self._registered[address, length] = made

    def deregister(self, address: int, length: int) -> None:
        self._agent.deregister_memory(self._registered.pop((address, length)))

    def description(self) -> bytes:
        found: bytes = self._agent.get_agent_metadata()
        return found

    def meet(self, connection: int, description: bytes) -> None:
        try:
            name = self._agent.add_remote_agent(description)
            self._agent.make_connection(name)
        except Exception as error:
            raise LibraryError(f"NIXL can't reach the peer's agent: {error}") from error
        self._names[connection] = name.decode() if isinstance(name, bytes) else name

    def forget(self, connection: int) -> None:
        name = self._names.pop(connection, None)
        if name is not None and name not in self._names.values():
            self._agent.remove_remote_agent(name)

    def begin(self, connection: int, rows: Rows) -> object:
        name = self._names.get(connection)
        if name is None:
            raise LibraryError("the peer's agent is not known")
        here, there = np.zeros((2, len(rows), 3), dtype=np.uint64)  # address, bytes, number of the device
        here[:, :2], there[:, :2] = rows[:, [0, 2]], rows[:, [1, 2]]
        try:
            read = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(here, HOST_MEMORY),
                self._agent.get_xfer_descs(there, HOST_MEMORY),
                name,
            )
            state = self._agent.transfer(read)
        except Exception as error:
            raise LibraryError(f"NIXL can't read: {error}") from error
        return self._checked(read, state)

    def has_ended(self, read: Any) -> bool:
        if read is None:
            return True
        try:
            state = self._agent.check_xfer_state(read)
        except Exception as error:
            raise LibraryError(f"NIXL's read failed: {error}") from error
        return self._checked(read, state) is None

    def close(self) -> None:
        for connection in list(self._names):
            self.forget(connection)
        for made in self._registered.values():
            self._agent.deregister_memory(made)
        self._registered.clear()
        del self._agent

    def _checked(self, read: Any, state: str) -> Any:
        """The read, or None once it ended well."""
        if state == UNDER_WAY:
            return read
        self._agent.release_xfer_handle(read)
        if state != ENDED_WELL:
            raise LibraryError("NIXL's read failed")
        return None


def _agent(api: Any, name: str) -> Any:
    """One whose thread sleeps when nothing moves, and that any of our threads may call."""
    made = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
    bindings = import_module(made.agent.__class__.__module__)
    config = bindings.nixlAgentConfig()
    config.useProgThread, config.pthrDelay = True, PROGRESS_US
    config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
    made.agent = bindings.nixlAgent(name, config)
    return made
