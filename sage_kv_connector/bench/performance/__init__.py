# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md: which commands its figures come from, their tables, and what was promised of them.

``sections`` names the commands, ``scripts/performance.py`` runs them and keeps their JSON, ``page`` writes tables
between marks of the page. ``transport``, ``servers``, ``interpreter`` and ``devices`` make the tables.
"""
