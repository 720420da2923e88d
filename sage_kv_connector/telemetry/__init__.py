# SPDX-License-Identifier: Apache-2.0
"""What is counted while KV moves, and how others read it.

``recording`` stands below the engine: the table of metrics, what an engine writes down, the snapshot of it, and spans
of hand-overs for an OpenTelemetry collector.
``reading`` stands beside the integrations: snapshots of the processes of a machine, as Prometheus, JSON or a page.

Memory model: all of it is bounded. Lanes keep totals and histograms of fixed size (``csrc/measured.h``). The recorder
keeps one number a series, ``MAX_PEERS`` peers with series of their own, the last transfers and the hottest chunks.
"""
