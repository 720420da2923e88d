# SPDX-License-Identifier: Apache-2.0
"""Where this engine's workers listen: in prefill's answers, and at the bootstrap server."""

from __future__ import annotations

import logging
from typing import Any

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.engine import advertised_host, listen_host
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, ranks_of
from sage_kv_connector.integrations.vllm.bootstrap import BootstrapServer
from sage_kv_connector.integrations.vllm.metadata import SageKVHandshakeMetadata
from sage_kv_connector.integrations.vllm.parallel import data_parallel_rank

logger = logging.getLogger(__name__)


class ListeningRanks:
    """Known once vLLM collected it from the workers, and anew when they listen elsewhere after a sleep."""

    def __init__(self, engine_id: str, config: KVTransportConfig, parallel: Any) -> None:
        self._engine_id = engine_id
        self._config = config
        self._parallel = parallel
        self._ranks: dict[int, SageKVHandshakeMetadata] = {}
        self._bootstrap: BootstrapServer | None = None
        self._failed = False

    @property
    def known(self) -> bool:
        return bool(self._ranks)

    def set_ranks(self, ranks: dict[int, SageKVHandshakeMetadata]) -> None:
        """By tensor parallel rank. Starts the bootstrap server if one is asked for and does not run."""
        self._ranks = ranks
        if self._bootstrap is not None:
            self._bootstrap.describe(self._engine())
        elif self._config.bootstrap_port is not None:
            self._bootstrap = self._start(self._config.bootstrap_port)

    def params(self) -> dict[str, Any]:
        """Of prefill's answer, for decode to find it."""
        return {
            "remote_engine_id": self._engine_id,
            "remote_ranks": {str(rank): list(meta.addresses) for rank, meta in self._ranks.items()},
            "remote_node": self._node,
            "tp_size": int(self._parallel.tensor_parallel_size),
            "pp_size": int(self._parallel.pipeline_parallel_size),
        }

    def push_params(self) -> dict[str, Any]:
        """Of prefill's answer, for a router that remembers it and asks both servers at once from then on.

        Such a router passes nothing else on, so decode asks the bootstrap server for the rest. Empty where none runs
        and none may be started: on a port of the system's choice peers reach it only if they reach ranks on such.
        """
        config = self._config
        if not config.concurrent or not self._ranks:
            return {}
        if self._bootstrap is None and not (self._failed or config.port or config.advertise_port):
            try:
                self._bootstrap = self._start(0)
            except OSError as error:
                self._failed = True
                logger.warning("routers can't ask both servers at once: no bootstrap server (%s)", error)
        if self._bootstrap is None:
            return {}
        return {
            "transfer_mode": "push",
            "remote_host": advertised_host(config),
            "remote_port": self._bootstrap.port,
        }

    def close(self) -> None:
        if self._bootstrap is not None:
            self._bootstrap.close()
            self._bootstrap = None

    def _engine(self) -> PrefillEngine:
        addresses = {rank: meta.addresses for rank, meta in self._ranks.items()}
        ranks = ranks_of(self._engine_id, addresses, self._node)
        return PrefillEngine(ranks, int(self._parallel.pipeline_parallel_size), MetadataKind.FIRST_TOKEN)

    def _start(self, port: int) -> BootstrapServer:
        """Raises OSError where it can't listen."""
        host = listen_host(self._config, self._config.resolved_secret())
        started = BootstrapServer(host, port, self._engine(), data_parallel_rank(self._parallel))
        logger.info("sage_kvt answers routers at http://%s:%d/query", host, started.port)
        return started

    @property
    def _node(self) -> str:
        return next((meta.node for meta in self._ranks.values()), "")
