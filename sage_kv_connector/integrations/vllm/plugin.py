# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``vllm.general_plugins``: makes ``sage_kvt`` a connector, and a word of its own.

vLLM loads general plugins in every process, before it builds its argument parser
and again when an ``EngineArgs`` is made, so ``register`` is idempotent.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.vllm.given_options import BARE_WORD, CONNECTOR_CLASS, take_options
from sage_kv_connector.integrations.vllm.refused_argument import meant_for_us, why_refused

CONNECTOR_MODULE = "sage_kv_connector.integrations.vllm.connector"


def register() -> None:
    """Make the connector known to vLLM's factory and the bare word to its arguments."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    for name in (BARE_WORD, CONNECTOR_CLASS):
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, CONNECTOR_MODULE, CONNECTOR_CLASS)
    if not hasattr(EngineArgs, "_sage_kvt_bare_word"):
        EngineArgs._sage_kvt_bare_word = True
        EngineArgs.add_cli_args = staticmethod(_with_bare_word(EngineArgs.add_cli_args))
        EngineArgs.kv_transfer_config = GivenConfig(EngineArgs.kv_transfer_config)


def is_bare_word(text: object) -> bool:
    """``sage_kvt`` alone, or with options: ``sage_kvt:backend=tcp,port=7000``."""
    return isinstance(text, str) and (text == BARE_WORD or text.startswith(f"{BARE_WORD}:"))


def expand_bare_word(text: str) -> Any:
    """The KVTransferConfig that the word stands for: both roles, recompute when a load fails.

    Raises ValueError for an option that KVTransportConfig does not know.
    """
    from vllm.config import KVTransferConfig

    words = [word for word in text[len(BARE_WORD) + 1 :].split(",") if word]
    config = KVTransportConfig.from_words(words, f"--kv-transfer-config {BARE_WORD}")
    # A config_file's options are in the model by now; workers on other nodes need not have the file.
    options = config.model_dump(mode="json", exclude_unset=True, exclude={"config_file"})
    options |= config.given_secrets()
    wanted = {
        "kv_connector": BARE_WORD,
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
        "kv_load_failure_policy": "recompute",
    }
    known = {field.name for field in dataclasses.fields(KVTransferConfig)}
    return KVTransferConfig(**{name: value for name, value in wanted.items() if name in known})


def _with_bare_word(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_cli_args)
    def wrapped(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = add_cli_args(parser, *args, **kwargs)
        for action in parser._actions:
            if action.dest == "kv_transfer_config" and not getattr(action.type, "sage_kvt", False):
                action.type = _parse_type(action.type)
        return parser

    return wrapped


def _parse_type(original: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            given = text if is_bare_word(text) else original(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            if not meant_for_us(text):
                raise
            why = why_refused(text, error)
        else:
            try:
                return _ready(given)
            except ValueError as error:
                why = str(error)
        raise argparse.ArgumentTypeError(f"sage_kvt: {why}")  # argparse shows the text of no other error

    parse.sage_kvt = True  # type: ignore[attr-defined]
    parse.__name__ = getattr(original, "__name__", "kv_transfer_config")
    return parse


def _ready(given: Any) -> Any:
    """The word expanded, options checked, a secret hidden. Raises ValueError as ``take_options``."""
    if is_bare_word(given):
        return expand_bare_word(given)
    if given is not None:
        take_options(given)
    return given


class GivenConfig:
    """``EngineArgs.kv_transfer_config`` for whoever reads it, where it did not come by the command line.

    vLLM loads plugins while it makes its first ``EngineArgs``, when the field is set already, and logs the fields
    right after: only reading is always later than this.
    """

    def __init__(self, default: Any) -> None:
        self._default = default

    def __get__(self, args: Any, owner: type) -> Any:
        if args is None:
            return self._default
        given = vars(args)["kv_transfer_config"] = _ready(vars(args).get("kv_transfer_config", self._default))
        return given

    def __set__(self, args: Any, given: Any) -> None:
        vars(args)["kv_transfer_config"] = _ready(given)
