# SPDX-License-Identifier: Apache-2.0
"""Our options as an SGLang server is given them, looked at before SGLang logs its arguments and loads a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sage_kv_connector.config import HIDDEN, SECRET_ENV, SECRET_FIELDS
from sage_kv_connector.integrations.sglang.options import (
    EXTRA_CONFIG,
    hicache_transport,
    options_from_environment,
)

NAME = "sage_kvt"
BACKEND = "--disaggregation-transfer-backend"
_PACKAGE = __name__.partition(".")[0]


def asked_for(words: Sequence[str]) -> bool:
    """Whether a command line names our transfer backend."""
    return NAME in _values(words, BACKEND)


def why_refused(words: Sequence[str]) -> str:
    """What is wrong with our options beside this command line: field, value and what is allowed; "" if nothing is."""
    try:
        if asked_for(words):
            options_from_environment()
        for extra in _hicache_configs(words):
            _check_transport(extra)
    except ValueError as error:
        return str(error)
    return ""


def _values(words: Sequence[str], option: str) -> Iterator[str]:
    for word, following in pairwise((*words, "")):
        name, sign, value = word.partition("=")
        if name == option:
            yield value if sign else following


def _hicache_configs(words: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Those of our storage backend. A file (``@PATH``) is SGLang's to read, which logs its path alone."""
    for text in _values(words, EXTRA_CONFIG):
        try:
            extra = json.loads(text)
        except ValueError:
            continue
        if isinstance(extra, Mapping) and str(extra.get("module_path", "")).startswith(f"{_PACKAGE}."):
            yield extra


def _check_transport(extra: Mapping[str, Any]) -> None:
    transport = extra.get("transport")
    if isinstance(transport, Mapping) and SECRET_FIELDS & set(transport):
        raise ValueError(
            f"transport.secret in {EXTRA_CONFIG} is {HIDDEN}, and SGLang would log it; "
            f"allowed: a secret_file, or ${SECRET_ENV}"
        )
    hicache_transport(transport)
