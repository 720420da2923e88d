# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt presets``: what ships, what it makes of the user's options, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import emit, progress

presets = typer.Typer(help="Named sets of options, and what they come to.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="a preset's name")]


@presets.command("list")
def list_command(as_json: AsJson = False) -> None:
    """The presets that ship with the package."""
    from sage_kv_connector.config import presets as shipped

    emit(
        shipped(),
        as_json=as_json,
        title="presets",
        rows=[(name, one["goal"]) for name, one in shipped().items()],
    )


@presets.command()
def show(
    name: Annotated[str | None, typer.Argument(help="a preset's name; else the file's, or none")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="kv_transport.yaml or config.yaml, on top of the preset")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value on top of both; may be repeated")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="write the result as kv_transport.yaml, or into a config.yaml")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """All options that a preset, a file and overrides come to, and where each comes from."""
    from sage_kv_connector.config import KVTransportConfig, layered, options_of_words

    try:
        given = options_of_words(overrides or [], "--set")
        if name is not None:
            given["preset"] = name
        if config_file is not None:
            given["config_file"] = config_file
        origins = layered(given, "--set").origins
        config = KVTransportConfig.load(given, "--set")
        if write is not None:
            config.to_file(write)
    except ValueError as error:
        raise _refused(error) from error
    values = config.model_dump(mode="json", exclude={"config_file"})
    rows = [(key, f"{value}  ({origins.get(key, 'default')})") for key, value in values.items()]
    result = {"options": values, "origins": {key: origins.get(key, "default") for key in values}}
    emit(result, as_json=as_json, title=f"preset {config.preset or 'none'}", rows=rows)


@presets.command()
def explain(name: Name, as_json: AsJson = False) -> None:
    """What a preset is for, on which hardware, what it sets and why."""
    from sage_kv_connector.config import KVTransportConfig
    from sage_kv_connector.config import presets as shipped

    if name not in shipped():
        raise _refused(ValueError(f"preset is {name!r}; allowed: {', '.join(sorted(shipped()))}"))
    one = shipped()[name]
    fields = KVTransportConfig.model_fields
    rows = [("goal", one["goal"]), ("hardware", "\n".join(one["hardware"])), ("why", one["why"])]
    rows += [(f"{key}={value}", fields[key].description or "") for key, value in one["settings"].items()]
    emit({name: one}, as_json=as_json, title=f"preset {name}", rows=rows)


def _refused(error: ValueError) -> typer.Exit:
    progress.print(str(error), markup=False, soft_wrap=True)
    return typer.Exit(2)
