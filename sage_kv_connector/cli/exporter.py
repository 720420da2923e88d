# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt exporter``: what the engines of this machine count, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import emit, progress
from sage_kv_connector.contract.peer import bracket
from sage_kv_connector.telemetry.reading.token import TOKEN_ENV, reading_token

DEFAULT_PORT = 9464

TokenFile = Annotated[
    Path | None,
    typer.Option(
        help=f"File with the token. Else ${TOKEN_ENV}, else the token of the transport's secret, if set."
    ),
]


def exporter(
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = DEFAULT_PORT,
    token_file: TokenFile = None,
    print_token: Annotated[bool, typer.Option(help="Print the token, for Prometheus, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve /metrics, /snapshot, /healthz and the card of all engines of this user on this machine."""
    try:
        import uvicorn

        from sage_kv_connector.telemetry.reading.exporter import create_app
        from sage_kv_connector.telemetry.reading.readers import check_listens
        from sage_kv_connector.telemetry.reading.sources import local
    except ImportError as error:
        progress.print(f"sage-kvt exporter needs {error.name}: pip install 'sage_kv_connector[exporter]'")
        raise typer.Exit(2) from None
    try:
        token = reading_token(token_file)
        check_listens(host, token)
    except ValueError as error:
        progress.print(str(error), markup=False)
        raise typer.Exit(2) from None
    if print_token:
        emit({"token": token}, as_json=as_json, title="exporter", rows=[("token", token or "none is set")])
        return
    server = uvicorn.Server(
        uvicorn.Config(create_app(local, token), host=host, port=port, log_level="warning", access_log=False)
    )
    listening = server.config.bind_socket()
    listening.listen()  # whoever reads the line may connect
    url = f"http://{bracket(host)}:{listening.getsockname()[1]}"
    emit({"url": url, "token": bool(token)}, as_json=as_json, title="exporter", rows=[("url", url)])
    server.run(sockets=[listening])
