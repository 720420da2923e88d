# SPDX-License-Identifier: Apache-2.0
"""A bad option in words: the field, its value, where it came from, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

#: Fields whose values are never shown.
SECRET_FIELDS = frozenset({"secret", "previous_secret"})
HIDDEN = "**********"
_TYPES = {
    "boolean": "true, false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "password": "text",
    "path": "a path",
    "object": "an object",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class OptionError(ValueError):
    """One or several options can't be used; the message has a sentence for each."""


def option_error(
    error: ValidationError,
    schema: Mapping[str, Any],
    origins: Mapping[str, str],
    hidden: frozenset[str] = SECRET_FIELDS,
) -> OptionError:
    """``schema``: the model's JSON schema. ``origins``: where each option came from. ``hidden``: values not shown."""
    fields = schema["properties"]
    sentences = [_sentence(one, fields, origins, hidden) for one in error.errors(include_url=False)]
    return OptionError("; ".join(sentences))


def _sentence(
    one: ErrorDetails, fields: Mapping[str, Any], origins: Mapping[str, str], hidden: frozenset[str]
) -> str:
    name = str(one["loc"][0]) if one["loc"] else "options"
    origin = f" (from {origins[name]})" if name in origins else ""
    if one["type"] in _UNKNOWN:
        shown = HIDDEN if _may_be_of_a_secret(name, origins) else name
        near = difflib.get_close_matches(name, fields, n=1)
        means = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(sorted(fields))}"
        return f"option {shown!r}{origin} is unknown; {means}"
    shown = HIDDEN if name in hidden else repr(one["input"])
    own_check = one["type"] == "value_error"
    allowed = "" if own_check else _allowed(fields.get(name, {}))
    allowed = allowed or one["msg"].removeprefix("Value error, ")
    return f"{name} is {shown}{origin}; allowed: {allowed}"


def _may_be_of_a_secret(name: str, origins: Mapping[str, str]) -> bool:
    """An unknown name behind a secret, be it like one of ours: it can be what a comma cut off from the secret."""
    names = [one for one, origin in origins.items() if origin == origins.get(name)]
    return name in names and bool(SECRET_FIELDS & set(names[: names.index(name)]))


def _allowed(field: Mapping[str, Any]) -> str:
    """Names, a range, or a type; empty where only the field's own check knows."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    found = [text for text in map(_allowed_of_kind, kinds) if text]
    return " or ".join(found)


def _allowed_of_kind(kind: Mapping[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(map(str, kind["enum"]))
    low, high = kind.get("minimum"), kind.get("maximum")
    if low is not None and high is not None:
        return f"{low} to {high}"
    if "exclusiveMinimum" in kind:
        return f"a number above {kind['exclusiveMinimum']:g}, at most {high}"
    if low is not None:
        return f"{low} or more"
    return _TYPES.get(kind.get("format", kind.get("type", "")), "")
