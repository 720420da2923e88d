# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt doctor --pair``: whether two running servers hand KV over, tried by one request as a router sends it.

vLLM: prefill is asked for one token and for its KV to be offered, decode for the rest with what prefill's answer names.
What came of it is read from decode's /metrics, where failures are counted by code. SGLang: both are asked at once, in
one bootstrap room; its decode answers with an error where no KV arrives.
"""

from __future__ import annotations

import json
import re
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from sage_kv_connector.contract.bootstrap_room import new_room
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.doctor.finding import Finding

ANSWER_S = 120.0
#: A server tells its numbers with a step: some more of them, until these are in.
STEPS, STEP_S = 5, 0.5
MAX_TOKENS = 4
#: Long enough for several pages; random, so that no cache has it.
PROMPT_WORDS = 200


class Unanswered(RuntimeError):
    """A server did not answer as it should; the message says which and how."""


class Server(NamedTuple):
    """One of the two, as it was found. ``engine``: vllm or sglang; ``model``: the name that requests carry."""

    url: str
    engine: str
    model: str
    info: dict[str, Any]


def examine_pair(prefill_url: str, decode_url: str) -> list[Finding]:
    """What was found; the last one says whether KV was handed over, and if not why."""
    findings: list[Finding] = []
    found: list[Server] = []
    for name, url in (("prefill", prefill_url), ("decode", decode_url)):
        try:
            server = _server(url)
        except Unanswered as error:
            return [*findings, Finding(name, "broken", str(error))]
        found.append(server)
        findings.append(Finding(name, "ok", f"{server.engine} at {server.url}, model {server.model}"))
    prefill, decode = found
    if prefill.engine != decode.engine:
        why = f"{prefill.engine} prefills and {decode.engine} decodes: ask through a router that knows both"
        return [*findings, Finding("hand-over", "broken", why)]
    check = _on_vllm if prefill.engine == "vllm" else _on_sglang
    try:
        return [*findings, check(prefill, decode)]
    except Unanswered as error:
        return [*findings, Finding("hand-over", "broken", str(error))]


def _on_vllm(prefill: Server, decode: Server) -> Finding:
    before = _counted(decode)
    if before is None:
        return _broken(
            "no_connector",
            "decode's /metrics has no vllm:sage_kvt_…: it was started without "
            "--kv-transfer-config sage_kvt, or with another connector",
        )
    prompt = _prompt()
    offered = _ask(
        prefill.url,
        "/v1/completions",
        {
            "model": prefill.model,
            "prompt": prompt,
            "max_tokens": 1,
            "kv_transfer_params": {"do_remote_decode": True},
        },
    )
    params = offered.get("kv_transfer_params")
    if not params:
        return _broken(
            "no_connector",
            "prefill offered nothing: it was started without --kv-transfer-config sage_kvt, "
            "or refused the request (its log says why)",
        )
    if "remote_ranks" not in params:
        return _broken(
            "no_connector", f"prefill's connector is another one: its parameters are {sorted(params)}"
        )
    begun = time.monotonic()
    body = {"model": decode.model, "prompt": prompt, "max_tokens": MAX_TOKENS, "kv_transfer_params": params}
    answer = _ask(decode.url, "/v1/completions", body)
    if not answer.get("choices"):
        raise Unanswered(f"{decode.url} answered without a completion")
    taken = time.monotonic() - begun
    for _ in range(STEPS):
        _ask(decode.url, "/v1/completions", {"model": decode.model, "prompt": "a", "max_tokens": 2})
        after = _counted(decode) or before
        grown = {
            code: after[code] - before.get(code, 0) for code in after if after[code] > before.get(code, 0)
        }
        failed = [code for code in grown if code not in ("ok", "bytes")]
        if failed:
            return _failed(failed[0], params)
        if grown.get("ok"):
            return Finding(
                "hand-over",
                "ok",
                f"{grown.get('bytes', 0):.0f} bytes of KV arrived; decode answered in {taken:.2f} s",
            )
        time.sleep(STEP_S)
    return _broken(
        "unasked",
        "decode answered and fetched nothing: it computed the prompt itself. Its log says why "
        "(it may have the prompt in its prefix cache)",
    )


def _on_sglang(prefill: Server, decode: Server) -> Finding:
    port = prefill.info.get("disaggregation_bootstrap_port")
    for server, role in ((prefill, "prefill"), (decode, "decode")):
        mode = server.info.get("disaggregation_mode")
        if mode != role:
            return _broken("wrong_role", f"{server.url} has --disaggregation-mode {mode}, must have {role}")
        backend = server.info.get("disaggregation_transfer_backend")
        if backend != "sage_kvt":
            return _broken(
                "no_connector",
                f"{server.url} has --disaggregation-transfer-backend {backend}, must have sage_kvt",
            )
    room = {
        "bootstrap_host": urllib.parse.urlsplit(prefill.url).hostname,
        "bootstrap_port": port,
        "bootstrap_room": new_room(),
    }
    body = {"text": _prompt(), "sampling_params": {"max_new_tokens": MAX_TOKENS, "temperature": 0}, **room}
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(_ask, server.url, "/generate", body) for server in (prefill, decode)]
        said = []
        for server, answer in zip((prefill, decode), answers, strict=True):
            try:
                reason = (answer.result().get("meta_info") or {}).get("finish_reason") or {}
                if reason.get("type") == "abort":
                    said.append(f"{server.url}: {reason.get('message', reason)}")
            except Unanswered as error:
                said.append(str(error))
    text = "; ".join(said)
    if not said:
        return Finding(
            "hand-over", "ok", f"decode answered from prefill's KV in {time.monotonic() - begun:.2f} s"
        )
    code = next((str(code) for code in FAILURE_KINDS if re.search(rf"\b{code}\b", text)), "")
    return _failed(code, {}, text) if code else _broken("failed", text)


def _failed(code: str, params: dict[str, Any], said: str = "") -> Finding:
    kind = FAILURE_KINDS.get(Code(code)) if code in set(Code) else None
    explained = f"{kind.meaning} {kind.cause} {kind.remedy}" if kind else "decode's log says more"
    named = params.get("remote_ranks")
    where = f" Prefill says that it listens on {named}." if named else ""
    return _broken(code, f"{explained}{where}{f' ({said})' if said else ''}")


def _broken(cause: str, text: str) -> Finding:
    return Finding("hand-over", "broken", f"{cause}: {text}")


def _server(url: str) -> Server:
    """What answers there. Raises Unanswered."""
    if not url.startswith(("http://", "https://")):
        raise Unanswered(f"{url!r} must begin with http:// or https://")
    url = url.rstrip("/")
    models = _get(url, "/v1/models").get("data") or []
    if not models:
        raise Unanswered(f"{url} serves no model")
    try:
        info = _get(url, "/get_server_info")
    except Unanswered:
        info = {}
    engine = "sglang" if "disaggregation_mode" in info else "vllm"
    return Server(url, engine, str(models[0].get("id")), info)


def _counted(decode: Server) -> dict[str, float] | None:
    """Transfers that ended well (``ok``), their ``bytes``, and failed requests by code; None without our metrics."""
    text = _read(urllib.request.Request(f"{decode.url}/metrics")).decode(errors="replace")
    if "vllm:sage_kvt_" not in text:
        return None
    sums: dict[str, float] = {}

    def add(pattern: str, name: Callable[[str], str]) -> None:
        for labels, value in re.findall(rf"^vllm:sage_kvt_{pattern}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
            if (key := name(labels)) is not None:
                sums[key] = sums.get(key, 0.0) + float(value)

    def code_of(labels: str) -> str:
        found = re.search(r'code="([^"]*)"', labels)
        return found[1] if found else "other"

    add("failed_loads_total", code_of)
    add("transferred_bytes_total", lambda labels: "bytes" if 'side="decode"' in labels else "")
    add("transfers_total", lambda labels: "ok" if 'code="ok"' in labels and 'side="decode"' in labels else "")
    sums.pop("", None)
    return sums


def _prompt() -> str:
    return " ".join(["Check of the KV transport:", *(secrets.token_hex(3) for _ in range(PROMPT_WORDS))])


def _get(url: str, path: str) -> dict[str, Any]:
    return _object(url, _read(urllib.request.Request(f"{url}{path}")))


def _ask(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(body).encode()
    return _object(
        url, _read(urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"}))
    )


def _read(request: urllib.request.Request) -> bytes:
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise Unanswered(f"{request.full_url} answered {error.code}: {said}") from error
    except OSError as error:
        raise Unanswered(f"{request.full_url}: {getattr(error, 'reason', error)}") from error


def _object(url: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Unanswered(f"{url} answered no JSON: {data[:200]!r}") from error
    if not isinstance(found, dict):
        raise Unanswered(f"{url} answered {type(found).__name__}, must be an object")
    return found
