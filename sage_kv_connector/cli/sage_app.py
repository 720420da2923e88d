# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``sage.cli.plugins``: ``sage transport …``, and ``--kv-transport`` on ``sage llm serve``.

isage-cli calls each plugin with its Typer app and swallows what one raises, so a failure is
said here, on stderr, every time.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

#: What could not be done, for ``sage transport doctor`` and for tests.
problems: list[str] = []


def register(app: Any) -> None:
    """Add our commands and options to SAGE's app. Never raises; what failed is said on stderr."""
    problems.clear()
    for what, add in (
        ("the commands `sage transport`", _add_commands),
        ("--kv-transport on `sage llm serve`", _add_option),
    ):
        try:
            add(app)
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
    for problem in problems:
        print(
            f"sage_kv_connector: WARNING: this isage-cli does not take {problem} (docs/sage.md)",
            file=sys.stderr,
            flush=True,
        )


def _add_commands(app: Any) -> None:
    from sage_kv_connector.cli.bench import bench
    from sage_kv_connector.cli.doctor import doctor
    from sage_kv_connector.cli.main import end_well
    from sage_kv_connector.cli.presets import presets
    from sage_kv_connector.cli.probe import probe

    transport = typer.Typer(help="KV cache transport between prefill and decode.", no_args_is_help=True)
    transport.callback()(end_well)
    transport.command()(probe)
    transport.command()(doctor)
    transport.add_typer(bench, name="bench")
    transport.add_typer(presets, name="presets")
    app.add_typer(transport, name="transport", help="🚚 KV cache transport: probe, bench, presets, doctor")


def _add_option(app: Any) -> None:
    from sage_kv_connector.cli.sage_serve import add_to_serve

    add_to_serve(app)
