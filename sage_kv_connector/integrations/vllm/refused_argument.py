# SPDX-License-Identifier: Apache-2.0
"""A ``--kv-transfer-config`` that is meant for us and that vLLM can't read, in words.

vLLM's own text is a dump of what it was given, a secret included.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sage_kv_connector.config import HIDDEN, SECRET_FIELDS, OptionError, option_error
from sage_kv_connector.integrations.vllm.given_options import BARE_WORD, CONNECTOR_CLASS, ORIGIN, nearly_ours

ARGUMENT = "--kv-transfer-config"
_FORMS = f'{BARE_WORD}, {BARE_WORD}:KEY=VALUE,KEY=VALUE, or a JSON object with "kv_connector": "{BARE_WORD}"'
_FIRST_WORD = re.compile(r"\W*([\w-]*)")


def meant_for_us(text: str) -> bool:
    """Whether it names our connector, or begins with a word that is nearly ours."""
    first = _FIRST_WORD.match(text)
    return any(name in text for name in (BARE_WORD, CONNECTOR_CLASS)) or (
        first is not None and nearly_ours(first.group(1))
    )


def why_refused(text: str, error: Exception) -> str:
    """``error``: what vLLM's parser raised for the text."""
    if not text.lstrip().startswith("{"):
        shown = HIDDEN if any(name in text for name in SECRET_FIELDS) else repr(text)
        return f"{ARGUMENT} is {shown}; allowed: {_FORMS}"
    cause = error if error.__cause__ is None else error.__cause__
    if isinstance(cause, json.JSONDecodeError):
        return f"{ARGUMENT} is not JSON: {cause}"
    if not isinstance(cause, ValidationError):
        return f"{ARGUMENT} is not taken by this vLLM ({type(cause).__name__}); allowed: {_FORMS}"
    # What a decoder says tells the place and quotes nothing.
    not_json = [one["ctx"]["error"] for one in cause.errors() if one["type"] == "json_invalid"]
    return f"{ARGUMENT} is not JSON: {not_json[0]}" if not_json else str(_by_fields(cause))


def _by_fields(error: ValidationError) -> OptionError:
    from vllm.config import KVTransferConfig

    schema: dict[str, Any] = TypeAdapter(KVTransferConfig).json_schema()
    named = {str(one["loc"][0]) for one in error.errors() if one["loc"]}
    return option_error(error, schema, dict.fromkeys(named, ARGUMENT), SECRET_FIELDS | {ORIGIN})
