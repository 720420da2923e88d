# SPDX-License-Identifier: Apache-2.0
"""``--kv-transport KEY=VALUE`` on ``sage llm serve``.

isage-cli has no public way to add an option to a command, so the function behind ``serve`` is
replaced by one that takes our options too, acts on them, and calls it. That needs of isage-cli only
that its app has a Typer group named ``llm`` with a command named ``serve``; ``add_to_serve``
raises where that is not so, and the plugin says it loudly.

The options become ``kv_transport.yaml``, and ``$SAGE_KVT_CONFIG_FILE`` names that file to
everything that is started from the process: the ``sage_kvt`` comm backend, engines, the gateway.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sage_kv_connector.config import CONFIG_FILE_ENV, KVTransportConfig, layered, options_of_words
from sage_kv_connector.console import progress

#: Names of our parameters; SAGE's own go on to SAGE.
OURS = ("kv_transport", "kv_transport_file", "kv_engine")


class Engine(StrEnum):
    """What ``--kv-engine`` starts behind the gateway."""

    none = "none"
    vllm = "vllm"


Words = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-transport",
        metavar="KEY=VALUE",
        help="option of the KV transport, such as preset=high-bw, backend=tcp, target-dtype=fp8_e4m3; "
        "may be repeated; without a backend the hardware decides",
    ),
]
File = Annotated[
    Path, typer.Option("--kv-transport-file", help="where --kv-transport is written, for engines and gateway")
]
StartedEngine = Annotated[
    Engine,
    typer.Option(
        "--kv-engine",
        help="vllm: start a prefill and a decode `vllm serve` with these options behind the gateway; "
        "none: engines are started elsewhere, as SGLang's must be",
    ),
]


class ServeNotFound(LookupError):
    """This isage-cli is built in another way than the one we know."""


def add_to_serve(app: Any) -> None:
    """Give ``sage llm serve`` our options, wherever ``llm`` is mounted. Raises ServeNotFound. Idempotent."""
    groups = {id(group.typer_instance): group.typer_instance for group in _groups_named(app, "llm")}
    commands = [
        command
        for group in groups.values()
        for command in group.registered_commands
        if (command.name or getattr(command.callback, "__name__", "")) == "serve"
    ]
    if not commands:
        found = sorted({str(group.name) for group in app.registered_groups})
        raise ServeNotFound(f"no group 'llm' with a command 'serve' among {', '.join(found)}")
    for command in commands:
        if not getattr(command.callback, "sage_kvt", False):
            command.callback = with_options(command.callback)


def with_options(serve: Callable[..., Any]) -> Callable[..., Any]:
    """``serve`` with our options behind its own."""
    hints = typing.get_type_hints(serve, include_extras=True)
    own = [
        parameter.replace(annotation=hints.get(name, parameter.annotation))
        for name, parameter in inspect.signature(serve).parameters.items()
    ]
    taken = sorted({parameter.name for parameter in own} & set(OURS))
    if taken:
        raise ServeNotFound(f"serve has parameters of its own named {', '.join(taken)}")
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("kv_transport", keyword, default=None, annotation=Words),
        inspect.Parameter("kv_transport_file", keyword, default=Path("kv_transport.yaml"), annotation=File),
        inspect.Parameter("kv_engine", keyword, default=Engine.none, annotation=StartedEngine),
    ]

    def wrapped(**given: Any) -> Any:
        words, path, engine = (given.pop(name) for name in OURS)
        if words or engine is not Engine.none:
            try:
                configure(words or [], path)
            except ValueError as error:
                progress.print(f"KV transport: {error}", markup=False, soft_wrap=True)
                raise typer.Exit(2) from error
        _card_in_gateway()
        with contextlib.ExitStack() as started:
            if engine is Engine.vllm:
                started.enter_context(_vllm_behind_gateway(given.get("model"), path))
            return serve(**given)

    wrapped.__name__, wrapped.__doc__ = serve.__name__, serve.__doc__
    wrapped.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in [*own, *added]}
    wrapped.sage_kvt = True  # type: ignore[attr-defined]
    return wrapped


def _card_in_gateway() -> None:
    """``serve`` runs the one app that the gateway's package has; whatever hinders the card does not hinder it."""
    try:
        from sagellm_gateway.server import app

        from sage_kv_connector.integrations.sage.gateway import PREFIX, mount_card
        from sage_kv_connector.telemetry.reading.token import TOKEN_ENV, reading_token

        mount_card(app)
        readers = (
            "whoever brings the token of `sage-kvt exporter --print-token`"
            if reading_token()
            else f"this machine alone; others need a token (${TOKEN_ENV} or the transport's secret)"
        )
    except Exception as error:
        progress.print(f"KV transport: no card: {error}", markup=False, soft_wrap=True)
    else:
        said = f"KV transport: its card is at {PREFIX}/ of the gateway, for {readers}"
        progress.print(said, markup=False, soft_wrap=True)


def configure(words: Sequence[str], path: Path) -> KVTransportConfig:
    """Options of ``words``, written to ``path`` and made known to what this process starts.

    Where neither words, preset nor file name a backend, this machine's hardware is probed for one:
    ``pcie``, or ``tcp`` where this release has no ``pcie``, on WSL2 and on machines with PCIe alone.
    Raises ValueError naming field, value and what is allowed.
    """
    from sage_kv_connector.hardware.report.run import run_probe

    options = options_of_words(words, "--kv-transport")
    # What an earlier `serve` wrote must not come back as a layer under what is asked for now.
    os.environ.pop(CONFIG_FILE_ENV, None)
    KVTransportConfig.load(options, "--kv-transport")  # while it is known which layer a bad one comes from
    if "backend" not in layered(options).options:
        try:
            recommendation = run_probe().recommendation
        except ValueError as error:
            progress.print(f"hardware probe: {error}; backend=auto", markup=False, soft_wrap=True)
        else:
            assert recommendation is not None
            options["backend"] = recommendation.backend
            progress.print(
                f"KV transport: backend={recommendation.backend}: {recommendation.reasons[0]}",
                markup=False,
                soft_wrap=True,
            )
    # The file that was named as a layer is read now; ours holds what came of all layers.
    merged = layered(options).options
    merged.pop("config_file", None)
    config = KVTransportConfig.load(merged)
    config.to_file(path)
    os.environ[CONFIG_FILE_ENV] = str(path.resolve())
    progress.print(f"KV transport: options written to {path.resolve()}", markup=False, soft_wrap=True)
    return config


def _groups_named(app: Any, name: str) -> Iterator[Any]:
    """Groups of that name in ``app`` and in the groups below it."""
    for group in app.registered_groups:
        if group.name == name:
            yield group
        elif group.typer_instance is not None:
            yield from _groups_named(group.typer_instance, name)


@contextlib.contextmanager
def _vllm_behind_gateway(model: str | None, path: Path) -> Iterator[None]:
    """A prefill and a decode server and their router, which the gateway is told of by its own variables."""
    import tempfile

    from sage_kv_connector.launch.process import ServerError, core_halves, running, unwind_on_sigterm
    from sage_kv_connector.launch.vllm import VllmOptions, router, vllm_server

    if model is None:
        progress.print("--kv-engine vllm needs --model, a name or a path that vLLM can load")
        raise typer.Exit(2)
    unwind_on_sigterm()  # uvicorn raises the signal that ended it again
    word = f"sage_kvt:config_file={path.resolve()}"
    with tempfile.TemporaryDirectory(prefix="sage-kvt-serve-") as logs:
        halves = core_halves()
        # The servers of our demo are small and offline; a user's have what the environment says.
        mine = {"HF_HUB_OFFLINE": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        env = {name: os.environ.get(name, default) for name, default in mine.items()}
        options = VllmOptions(Path(model), Path(logs), max_model_len=None, env=env, served_model_name=model)
        prefill = vllm_server("prefill", options, word, halves[0])
        decode = vllm_server("decode", options, word, halves[1])
        front = router(prefill, decode, Path(logs))
        try:
            with running(prefill, decode), running(front):
                os.environ |= {
                    "SAGELLM_ENGINE_ID": "vllm-sage-kvt",
                    "SAGELLM_ENGINE_MODEL": model,
                    "SAGELLM_ENGINE_HOST": "127.0.0.1",
                    "SAGELLM_ENGINE_PORT": str(front.port),
                }
                yield
        except ServerError as error:
            progress.print(f"--kv-engine vllm: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
