# SPDX-License-Identifier: Apache-2.0
"""What a comparison that was killed left behind is found again."""

from __future__ import annotations

import os
import subprocess

from sage_kv_connector.bench.ab.links import left_over


def test_only_what_a_dead_process_made_is_left_over() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = os.getpid()
    shown = f"kvab{mine}p (id: 1)\nkvab{ended.pid}d\nkvab{ended.pid}p (id: 2)\nother{ended.pid}p\nkvabp\n"
    assert left_over(shown) == {f"kvab{ended.pid}"}
    assert left_over("") == set()
