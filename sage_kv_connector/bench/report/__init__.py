# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench report``: docs/report.md from the JSON of benchmarks. ``goals`` compares what was measured with what
was promised, ``plots`` draws it, ``document`` writes it.
"""
