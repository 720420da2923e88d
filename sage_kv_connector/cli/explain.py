# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt explain``: what the code of a failed transfer means, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import emit
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.failure_kind import FailureKind
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS


def explain(
    code: Annotated[
        str, typer.Argument(help="code from a log line or a metric; all of them if left out")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """What a failure code means, what causes it, and what to do. Exit status 2 for an unknown code."""
    if code and code not in FAILURE_KINDS:
        raise typer.BadParameter(f"code is {code!r}; allowed: {', '.join(FAILURE_KINDS)}")
    if not code:
        kinds = FAILURE_KINDS.values()
        rows = [(str(kind.code), kind.meaning) for kind in kinds]
        emit({"codes": [_facts(kind) for kind in kinds]}, as_json=as_json, title="failure codes", rows=rows)
        return
    facts = _facts(FAILURE_KINDS[Code(code)])
    emit(
        facts,
        as_json=as_json,
        title=code,
        rows=[(name, text) for name, text in facts.items() if name != "code"],
    )


def _facts(kind: FailureKind) -> dict[str, str]:
    return {
        "code": str(kind.code),
        "stage": str(kind.stage),
        "what is seen": kind.symptom.value,
        "meaning": kind.meaning,
        "cause": kind.cause,
        "what to do": kind.remedy,
    }
