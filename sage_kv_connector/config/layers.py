# SPDX-License-Identifier: Apache-2.0
"""Options put together from layers: a preset, the user's file, what was given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sage_kv_connector.config.file import read_options
from sage_kv_connector.config.refusal import HIDDEN, SECRET_FIELDS, OptionError

#: A kv_transport.yaml for every engine that is started with it, unless its options name another.
CONFIG_FILE_ENV = "SAGE_KVT_CONFIG_FILE"


class Layers(NamedTuple):
    """Options put together, and which layer each comes from."""

    options: dict[str, Any]
    origins: dict[str, str]


def layered(options: Mapping[str, Any], origin: str = "given") -> Layers:
    """Preset, then the user's file, then the options themselves (of ``origin``); later ones win.

    The file is the one that ``config_file`` or else ``$SAGE_KVT_CONFIG_FILE`` names. The preset may
    be named by the file or by the options. Raises ValueError for an unknown preset and for a file
    that can't be read.
    """
    if not isinstance(options, Mapping):
        raise OptionError(f"options are {type(options).__name__} (from {origin}); they must be a mapping")
    path = options.get("config_file") or os.environ.get(CONFIG_FILE_ENV)
    if path is not None and not isinstance(path, str | Path):
        raise OptionError(f"config_file is {path!r} (from {origin}); allowed: a path")
    from_file: Mapping[str, Any] = {}
    if path is not None:
        try:
            from_file = read_options(Path(path))
        except ValueError as error:
            source = origin if options.get("config_file") else f"${CONFIG_FILE_ENV}"
            raise OptionError(f"{error} (named by {source})") from None
    if "config_file" in from_file:
        raise OptionError(f"config_file {str(path)!r} names another config_file; options name at most one")
    name = options.get("preset", from_file.get("preset"))
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if name is not None:
        known = presets()
        if name not in list(known):  # what a file says may be a list, which no mapping can be asked for
            source = origin if "preset" in options else str(path)
            raise OptionError(f"preset is {name!r} (from {source}); allowed: {', '.join(sorted(known))}")
        layers.append((f"preset {name}", known[name]["settings"]))
    if path is not None:
        layers.append((str(path), from_file))
    layers.append((origin, options))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, layer in layers:
        merged.update(layer)
        origins.update(dict.fromkeys(layer, name))
    return Layers(merged, origins)


def options_of_words(words: Iterable[str], origin: str = "given") -> dict[str, Any]:
    """``key=value`` words as options; values are read as YAML, dashes in keys as underscores.

    Raises ValueError for a word of another form, naming the ``origin`` of the words.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        behind_secret = bool(SECRET_FIELDS & set(options))  # it may be what a comma cut off from the secret
        if not sign or not key:
            # "secret:…" is meant as one.
            hide = behind_secret or word.strip().startswith(tuple(SECRET_FIELDS))
            shown = HIDDEN if hide else word
            raise OptionError(f"option {shown!r} is not of the form key=value (from {origin})")
        name = key.strip().replace("-", "_")
        try:
            # A secret of digits is text all the same.
            options[name] = value if name in SECRET_FIELDS else yaml.safe_load(value)
        except yaml.YAMLError:
            said = HIDDEN if behind_secret else f"{name} is {value!r}"
            raise OptionError(f"{said} (from {origin}); allowed: YAML, as in a file") from None
    return options


@cache
def presets() -> dict[str, dict[str, Any]]:
    """The presets that ship with the package: name → {goal, hardware, why, settings}."""
    text = (files("sage_kv_connector") / "presets" / "kv_transport_presets.yaml").read_text()
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(text)["presets"]
    return loaded
