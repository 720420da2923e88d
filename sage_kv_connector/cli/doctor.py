# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt doctor``: what works on this machine or between two servers, and why something does not."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import emit


def doctor(
    pair: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="PREFILL_URL DECODE_URL", help="check two running servers by one hand-over instead"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What works on this machine, and why something does not. Exit status 1 if something is broken."""
    if pair is None:
        from sage_kv_connector.doctor import examine

        findings = examine()
    else:
        from sage_kv_connector.doctor.pair import examine_pair

        findings = examine_pair(*pair)
    result = {"findings": [finding._asdict() for finding in findings]}
    rows = [(f"{f.name}: {f.state}", f.detail) for f in findings]
    emit(result, as_json=as_json, title="doctor", rows=rows)
    raise typer.Exit(int(any(f.state == "broken" for f in findings)))
