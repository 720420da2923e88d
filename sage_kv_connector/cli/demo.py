# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt demo``: a hand-over between two real servers, shown to people."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sage_kv_connector.cli.options import AsJson, BackendChoice
from sage_kv_connector.console import emit, progress


class Dispatch(StrEnum):
    sequential = "sequential"
    concurrent = "concurrent"


class Engine(StrEnum):
    vllm = "vllm"
    sglang = "sglang"


def demo(
    prompt_tokens: Annotated[int, typer.Option(min=16, max=32768, help="length of each prompt")] = 2048,
    dispatch: Annotated[
        Dispatch, typer.Option(help="sequential: prefill, then decode; concurrent: both at once")
    ] = Dispatch.sequential,
    backend: BackendChoice = "shm",
    engine: Annotated[
        Engine, typer.Option(help="whose servers and router; sglang's always dispatches at once")
    ] = Engine.vllm,
    as_json: AsJson = False,
) -> None:
    """Hand KV over between two real servers behind their router; prints what moved and how fast.

    Exit status 1 if token ids or KV bytes differ.
    """
    from sage_kv_connector.demo.result import demo_rows
    from sage_kv_connector.launch.process import ServerError

    try:
        if engine is Engine.sglang:
            from sage_kv_connector.demo.sglang import run_sglang_demo

            result = run_sglang_demo(prompt_tokens, backend)
        else:
            from sage_kv_connector.demo.vllm import run_demo

            result = run_demo(prompt_tokens, dispatch.value, backend)
    except (ServerError, ImportError) as error:
        progress.print(f"demo: {error}")
        raise typer.Exit(1) from error
    emit(result, as_json=as_json, title="hand-over", rows=demo_rows(result))
    raise typer.Exit(int(not (result["token_ids_equal"] and result["kv_bytes_equal"])))
