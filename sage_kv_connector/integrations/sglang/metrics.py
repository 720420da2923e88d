# SPDX-License-Identifier: Apache-2.0
"""The transport's numbers among SGLang's own: ``sglang:sage_kvt_*`` at its /metrics, where that is switched on.

SGLang's processes write their metrics into one folder ($PROMETHEUS_MULTIPROC_DIR), which its HTTP server reads. A
thread of each scheduler rank adds what grew after transfers ended or something failed, and once a second while
something is held; else it sleeps.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.engine import EngineCore
from sage_kv_connector.telemetry.reading.engine_metrics import EngineMetrics
from sage_kv_connector.telemetry.reading.growth import Growing
from sage_kv_connector.telemetry.recording.metrics import Kind

logger = logging.getLogger(__name__)

#: What happens within this time is added together.
GATHERED_S = 0.25
HELD_S = 1.0


class SchedulerMetrics:
    """Of one rank. ``labels``: SGLang's names of it, before ours."""

    def __init__(self, core: EngineCore, labels: Mapping[str, str]) -> None:
        # Only now: prometheus-client looks at $PROMETHEUS_MULTIPROC_DIR when it is imported.
        from prometheus_client import Counter, Gauge, Histogram

        self._core = core
        self._values = tuple(labels.values())
        make = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: Histogram}
        self._metrics = EngineMetrics(make, "sglang:", tuple(labels))
        self._metrics.begin(self._values, tuple(str(code) for code in FAILURE_KINDS))
        self._growing = Growing()
        self._changed = threading.Event()
        self._ends = threading.Event()
        core.recorder.on_changed = self._changed.set
        self._thread = threading.Thread(target=self._run, name="sage-kvt-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After what grew last was added."""
        self._ends.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        held = False
        while not self._ends.is_set():
            self._changed.wait(HELD_S if held else None)
            self._ends.wait(GATHERED_S)
            self._changed.clear()
            try:
                growth = self._growing.take(self._core.snapshot())
                self._metrics.add(self._values, growth)
                held = any(growth.held.get(f'["{name}"]') for name in ("offers", "subscriptions"))
            except Exception:
                logger.exception("SGLang's /metrics has no news of the transport")
                return


def scheduler_metrics(
    core: EngineCore, server_args: Any, rank: Mapping[str, object]
) -> SchedulerMetrics | None:
    """If SGLang shows metrics. ``rank``: what tells this rank from the others, such as ``tp_rank``."""
    if not getattr(server_args, "enable_metrics", False) or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    model = str(getattr(server_args, "served_model_name", "") or getattr(server_args, "model_path", ""))
    return SchedulerMetrics(core, {"model_name": model, **{name: str(value) for name, value in rank.items()}})
