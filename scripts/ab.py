# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts.ab --suite quick --json``: what ``sage-kvt bench ab`` does, from a checkout."""

from __future__ import annotations

import typer

from sage_kv_connector.cli.bench_ab import ab
from sage_kv_connector.launch.process import unwind_on_sigterm

if __name__ == "__main__":
    unwind_on_sigterm()
    typer.run(ab)
