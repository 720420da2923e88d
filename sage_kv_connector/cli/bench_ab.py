# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench ab``: the same engine with our connector and with its peers'; ``report``: a page of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sage_kv_connector.cli.bench_failure import said_of
from sage_kv_connector.cli.options import AsJson, lengths, words
from sage_kv_connector.console import emit


def ab(
    suite: Annotated[
        str,
        typer.Option(
            help="ci, quick (a quarter of an hour), carriers (over the peers' libraries) or full (hours)"
        ),
    ] = "quick",
    arms: Annotated[str, typer.Option(help="other than the suite's, separated by commas")] = "",
    links: Annotated[str, typer.Option(help="only these of node,10g,1g,100m")] = "",
    tokens: Annotated[str, typer.Option(help="only prompts of these lengths, separated by commas")] = "",
    loads: Annotated[str, typer.Option(help="only these of the suite's loads, such as closed-4,rag")] = "",
    dispatches: Annotated[str, typer.Option(help="only these of sequential,concurrent")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="other than the suite's")] = None,
    seed: Annotated[str, typer.Option(help="of prompts, arrivals and the order of arms")] = "0",
    state: Annotated[Path | None, typer.Option(help="a file of what is done: a run goes on from it")] = None,
    out: Annotated[Path | None, typer.Option(help="a file for the JSON, besides what is printed")] = None,
    as_json: AsJson = False,
) -> None:
    """Real vLLM servers over links and loads: throughput, TTFT, TPOT, link, CPU and memory of ours and the peers."""
    from sage_kv_connector.bench.ab.arms import ARMS
    from sage_kv_connector.bench.ab.links import LINKS, LinkError
    from sage_kv_connector.bench.ab.run import ab_rows, bench_ab
    from sage_kv_connector.bench.ab.suites import DISPATCHES, SUITES, Only
    from sage_kv_connector.launch.process import ServerError

    if suite not in SUITES:
        raise typer.BadParameter(f"--suite {suite!r}: allowed are {', '.join(SUITES)}")
    only = Only(
        links=words(links, "--links", tuple(LINKS)) if links else (),
        tokens=lengths(tokens) if tokens else (),
        loads=loads.split(",") if loads else (),
        dispatches=words(dispatches, "--dispatches", DISPATCHES) if dispatches else (),
        arms=words(arms, "--arms", tuple(ARMS)) if arms else (),
        rounds=rounds,
    )
    with said_of(ServerError, LinkError, ValueError):
        result = bench_ab(suite, only=only, seed=seed, state=state)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    emit(result, as_json=as_json, title="ab", rows=ab_rows(result))
    ours = [case for case in result["cases"] if case["arm"].startswith("ours")]
    raise typer.Exit(int(any(case["failed"] or case["wrong"] for case in ours)))


def report(
    results: Annotated[Path, typer.Option(help="folder of the JSON that `bench ab --out` writes")] = Path(
        "docs/results"
    ),
    out: Annotated[Path, typer.Option(help="the page; pictures go into images beside it")] = Path(
        "docs/report.md"
    ),
    as_json: AsJson = False,
) -> None:
    """Rebuild docs/report.md from the JSON of comparisons: what was promised, plots, tables, where peers are better."""
    from sage_kv_connector.bench.report.document import ReportError, write_report

    with said_of(ReportError, ImportError, OSError):
        result = write_report(results, out)
    words_of = {True: "met", False: "missed", None: "not measured"}
    rows = ((goal, words_of[met]) for goal, met in result["goals"].items())
    emit(result, as_json=as_json, title="report", rows=rows)


def stable(
    arm: Annotated[str, typer.Option(help="one of the arms of bench ab")] = "ours-bf16",
    link: Annotated[str, typer.Option(help="node, 10g, 1g or 100m")] = "1g",
    tokens: Annotated[int, typer.Option(min=256, max=131072, help="of a prompt")] = 32768,
    minutes: Annotated[float, typer.Option(min=1, help="how long requests arrive")] = 120,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="of saturation")] = 0.8,
    kv_gib: Annotated[int, typer.Option(min=1, help="KV cache of each server")] = 4,
    out: Annotated[Path | None, typer.Option(help="a file for the JSON, besides what is printed")] = None,
    as_json: AsJson = False,
) -> None:
    """One pair for hours at a share of its saturation: whether TTFT, memory or descriptors grow, and what failed."""
    from sage_kv_connector.bench.ab.arms import ARMS
    from sage_kv_connector.bench.ab.links import LINKS, LinkError
    from sage_kv_connector.bench.ab.run import about
    from sage_kv_connector.bench.ab.stable import bench_stable, stable_rows
    from sage_kv_connector.launch.process import ServerError

    (chosen_arm,), (chosen_link,) = words(arm, "--arm", tuple(ARMS)), words(link, "--link", tuple(LINKS))
    with said_of(ServerError, LinkError):
        result = bench_stable(chosen_arm, chosen_link, tokens, minutes * 60, share=share, kv_gib=kv_gib)
    result |= about()
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    emit(result, as_json=as_json, title="stable", rows=stable_rows(result))
    raise typer.Exit(int(bool(result["failed"] or result["wrong"])))
