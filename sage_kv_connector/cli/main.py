# SPDX-License-Identifier: Apache-2.0
"""The commands of ``sage-kvt``: each group has a module beside this one, which parses and prints."""

from __future__ import annotations

import platform

import typer

from sage_kv_connector import __version__
from sage_kv_connector.cli.bench import bench
from sage_kv_connector.cli.demo import demo
from sage_kv_connector.cli.doctor import doctor
from sage_kv_connector.cli.explain import explain
from sage_kv_connector.cli.exporter import exporter
from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.cli.presets import presets
from sage_kv_connector.cli.probe import probe
from sage_kv_connector.cli.store import store
from sage_kv_connector.cli.top import top
from sage_kv_connector.cli.trace import trace
from sage_kv_connector.console import emit
from sage_kv_connector.launch.process import unwind_on_sigterm

app = typer.Typer(help="KV cache transport between prefill and decode.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(presets, name="presets")
for command in (doctor, demo, explain, exporter, probe, store, top, trace):
    app.command()(command)


@app.callback()
def end_well() -> None:
    """KV cache transport between prefill and decode."""
    unwind_on_sigterm()


@app.command()
def version(as_json: AsJson = False) -> None:
    """Versions of the package and of Python."""
    result = {"sage_kv_connector": __version__, "python": platform.python_version()}
    emit(result, as_json=as_json, title="versions", rows=result.items())
