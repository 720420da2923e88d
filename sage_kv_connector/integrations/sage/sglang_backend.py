# SPDX-License-Identifier: Apache-2.0
"""SGLang behind ``InferenceBackend``: an ``sglang.Engine`` of this process with our transfer backend.

A SGLang engine has one role, so there are two of them, ``role="prefill"`` and ``role="decode"``. SGLang's
prefill answers when its KV was fetched; ``prefill`` hands the request over and returns. SGLang runs
requests on an event loop, which has a thread here, so that prompts are computed between calls.

SGLang allows one Engine a process, and ends every child of the process when it is shut down.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from sage_kv_connector.config import (
    PREVIOUS_SECRET_ENV,
    PREVIOUS_SECRET_FILE_ENV,
    SECRET_ENV,
    SECRET_FIELDS,
    SECRET_FILE_ENV,
    KVTransportConfig,
)
from sage_kv_connector.contract.bootstrap_room import new_room, parse_room
from sage_kv_connector.contract.peer import RegisteredKV
from sage_kv_connector.contract.plan import TransportPlan
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.integrations.sage.inference_backend import (
    BackendUnavailable,
    Decoded,
    HandoverError,
    Prefilled,
    plan_between,
)

logger = logging.getLogger(__name__)

ROLES = ("prefill", "decode")
#: What the adapter decides itself.
_OURS = ("disaggregation_mode", "disaggregation_transfer_backend")
#: SGLang refuses a request within the first steps of its loop, or computes it; then nobody waits.
_REFUSAL_S = 0.1
_CLOSE_S = 10.0


class SglangBackend:
    """One ``sglang.Engine``. ``options`` go to it: ``device``, ``dtype``, ``page_size``, ``host`` and so on.

    ``host`` (default 127.0.0.1) is where prefill's bootstrap server listens; decode is sent to the
    transport's ``advertise_host``, else to ``host``. Raises BackendUnavailable without sglang, ValueError
    for a wrong option.
    """

    def __init__(self, model: str, config: KVTransportConfig, *, role: str = "", **options: Any) -> None:
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; allowed for sglang: {', '.join(ROLES)}")
        if taken := sorted(set(_OURS) & set(options)):
            raise ValueError(f"option {taken[0]} follows from role; allowed: role={' or '.join(ROLES)}")
        if importlib.util.find_spec("sglang") is None:
            raise BackendUnavailable("sglang is not installed in this environment (pip install sglang)")
        self._role, self._config = role, config
        self._registered: list[RegisteredKV] = []
        self._pending: set[asyncio.Task[Any]] = set()
        if role == "prefill":
            options.setdefault("disaggregation_bootstrap_port", free_port())
            self._bootstrap = {
                "bootstrap_host": _reachable(options.get("host", "127.0.0.1"), config),
                "bootstrap_port": int(options["disaggregation_bootstrap_port"]),
            }
        self._directory = Path(tempfile.mkdtemp(prefix="sage-kvt-sglang-"))
        try:
            with _environment(config, self._directory):
                self._engine: Any = _engine(model, role, options)
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sage-kvt-sglang", daemon=True)
        self._thread.start()

    def register_kv(self) -> list[RegisteredKV]:
        """Of the ranks on this node; SGLang registered them when it started. Raises RuntimeError if one is missing."""
        from sage_kv_connector.integrations.sglang.registered import read_ranks

        self._open()
        if not self._registered:
            found = read_ranks(self._directory)
            args = self._engine.server_args
            expected = int(args.tp_size) * int(args.pp_size) // int(args.nnodes)
            if len(found) != expected:
                raise RuntimeError(f"{len(found)} of {expected} ranks registered their KV cache")
            self._registered = found
        return list(self._registered)

    def prefill(self, request_id: str, prompt: Sequence[int]) -> Prefilled:
        """As the protocol says; ``first_token`` is None. A failure that shows later is logged, and decode fails."""
        self._must_be("prefill")
        if not prompt:
            raise ValueError("prompt is empty; it must hold at least one token id")
        room = new_room()
        handover = self._bootstrap | {"bootstrap_room": room}
        self._run(self._submit(request_id, list(prompt), handover))
        return Prefilled(request_id, tuple(prompt), None, handover)

    def decode(self, prefilled: Prefilled, max_tokens: int) -> Decoded:
        """As the protocol says, but SGLang computes no prompt again: what does not come is a HandoverError."""
        self._must_be("decode")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; allowed: 1 or more")
        handover = _bootstrap_fields(prefilled.handover)
        answer = self._run(self._generate(list(prefilled.prompt), max_tokens, handover))
        return Decoded(prefilled.request_id, tuple(answer["output_ids"]))

    def transport_plan(self, peer: RegisteredKV) -> TransportPlan:
        self._must_be("decode")
        return plan_between(self.register_kv()[0].schema, peer, self._config)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._cancel_pending(), self._loop).result(_CLOSE_S)
        try:
            engine.shutdown()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
            shutil.rmtree(self._directory, ignore_errors=True)

    # -- on the loop

    async def _submit(self, request_id: str, prompt: list[int], handover: dict[str, Any]) -> None:
        """Returns when SGLang took the request. Raises what it says against it."""
        task = asyncio.create_task(self._generate(prompt, 1, handover))
        done, _ = await asyncio.wait({task}, timeout=_REFUSAL_S)
        if done:
            task.result()
            return
        self._pending.add(task)

        def ended(task: asyncio.Task[Any]) -> None:
            self._pending.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("prefill of %s failed, its decode will, too: %s", request_id, error)

        task.add_done_callback(ended)

    async def _generate(self, prompt: list[int], max_tokens: int, handover: dict[str, Any]) -> Any:
        from fastapi import HTTPException

        sampling = {"temperature": 0, "max_new_tokens": max_tokens}
        try:
            answer = await self._engine.async_generate(input_ids=prompt, sampling_params=sampling, **handover)
        except HTTPException as error:  # SGLang's word for a request that failed under way
            raise HandoverError(str(error.detail)) from error
        reason = answer["meta_info"]["finish_reason"] or {}
        if reason.get("type") == "abort":
            raise HandoverError(str(reason.get("message") or "SGLang aborted the request"))
        return answer

    async def _cancel_pending(self) -> None:
        """SGLang aborts what it computes when its task is cancelled."""
        pending = list(self._pending)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    # -- inside

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _must_be(self, role: str) -> None:
        self._open()
        if self._role != role:
            raise ValueError(f"role is {self._role!r}; allowed for this method: {role}")

    def _open(self) -> None:
        if self._engine is None:
            raise RuntimeError("this backend was closed")


def _engine(model: str, role: str, options: dict[str, Any]) -> Any:
    from sglang import Engine

    from sage_kv_connector.integrations.sglang.given_options import NAME
    from sage_kv_connector.integrations.sglang.plugin import registered

    if why := registered():
        raise BackendUnavailable(f"SGLang does not take the transfer backend {NAME}: {why}")
    return Engine(model_path=model, disaggregation_mode=role, disaggregation_transfer_backend=NAME, **options)


@contextlib.contextmanager
def _environment(config: KVTransportConfig, directory: Path) -> Iterator[None]:
    """What SGLang's scheduler processes find while they are started: our options, and where to say what they hold."""
    from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
    from sage_kv_connector.integrations.sglang.registered import DIRECTORY_ENV

    given = config.model_dump(exclude_unset=True, exclude={"config_file", *SECRET_FIELDS})
    path = directory / "kv_transport.yaml"
    KVTransportConfig.load(given).to_file(path)
    wanted = {CONFIG_ENV: f"config_file={path}", DIRECTORY_ENV: str(directory)}
    variables = {
        "secret": (SECRET_ENV, SECRET_FILE_ENV),
        "previous_secret": (PREVIOUS_SECRET_ENV, PREVIOUS_SECRET_FILE_ENV),
    }
    names = [*wanted, *(name for pair in variables.values() for name in pair)]
    before = {name: os.environ.get(name) for name in names}
    for name, secret in config.given_secrets().items():
        # Who lists a process's environment must not find it there.
        variable, file_variable = variables[name]
        secret_file = directory / name
        secret_file.touch(mode=0o600)
        secret_file.write_text(secret.get_secret_value())
        os.environ.pop(variable, None)
        wanted[file_variable] = str(secret_file)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _bootstrap_fields(handover: dict[str, Any]) -> dict[str, Any]:
    """The three fields, checked. Raises ValueError naming the one that is wrong."""
    try:
        named = parse_room(handover, on_decode=True)
    except ValueError as error:
        raise ValueError(f"handover.{error}") from error
    if named is None:
        raise ValueError("handover.bootstrap_room is None; a prefill's handover names one")
    return {name: handover[name] for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}


def _reachable(host: str, config: KVTransportConfig) -> str:
    """Where decode finds the bootstrap server. Raises ValueError if that can't be told from the options."""
    if config.advertise_host is not None:
        return config.advertise_host
    if host in ("0.0.0.0", "::"):
        raise ValueError(
            f"host is {host!r}, which nobody can connect to; set advertise_host in the transport's options"
        )
    return host
