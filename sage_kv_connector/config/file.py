# SPDX-License-Identifier: Apache-2.0
"""Options in a file: ``kv_transport.yaml`` holds them at its top, ``config.yaml`` under ``kv_transport:``.

Servers and the gateway read the same file. In a shared ``config.yaml`` only our block is
replaced; everything else, comments too, stays as it is.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sage_kv_connector.config.refusal import SECRET_FIELDS

SECTION = "kv_transport"
#: A top-level key and all below it, up to the next line that begins with something else.
_BLOCK = re.compile(rf"(?m)^{SECTION}:.*\n?(?:(?:[ \t]+.*|[ \t]*)(?:\n|\Z))*")


def read_options(path: Path) -> dict[str, Any]:
    """The options in a file.

    Raises ValueError naming the file, and what is wrong: unreadable, not YAML, not a mapping, or a
    ``config.yaml`` without the section.
    """
    loaded = _load(path)
    if path.name == "config.yaml" or SECTION in loaded:
        if SECTION not in loaded:
            raise ValueError(
                f"{path} has no section {SECTION!r}; it has: {', '.join(map(str, loaded)) or 'none'}"
            )
        loaded = loaded[SECTION]
        if not isinstance(loaded, dict):
            raise ValueError(f"{path}: {SECTION} is {type(loaded).__name__}; it must be a mapping of options")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _load(path: Path) -> dict[Any, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"config_file {str(path)!r} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config_file {str(path)!r} is not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config_file {str(path)!r} is not YAML: {_why(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"config_file {str(path)!r} holds {type(loaded).__name__}; it must be a mapping")
    return loaded


def _why(error: yaml.YAMLError) -> str:
    """YAML's own text quotes the line, and a secret may stand there."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{where}{problem or 'it can not be read'}"


def write_options(path: Path, options: Mapping[str, Any]) -> None:
    """Write options to a file, whole or not at all; a ``config.yaml`` keeps what else it holds.

    Raises ValueError for a secret (name a ``secret_file``), and for a file that can't be read or written.
    """
    for name in sorted(SECRET_FIELDS):
        if options.get(name) is not None:
            raise ValueError(f"{name} is not written to a file others read; name a {name}_file instead")
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    _replace(
        path, _merged(path, plain) if path.name == "config.yaml" else yaml.safe_dump(plain, sort_keys=False)
    )


def _merged(path: Path, options: dict[str, Any]) -> str:
    block = yaml.safe_dump({SECTION: options}, sort_keys=False)
    if not path.exists():
        return block
    before = _load(path)
    text = path.read_text()
    if text and not text.endswith("\n"):
        text += "\n"
    if SECTION not in before:
        merged = text + block
    else:
        merged = _BLOCK.sub(lambda found: block + _blank_tail(found.group(0)), text, count=1)
    try:
        right = yaml.safe_load(merged) == {**before, SECTION: options}
    except yaml.YAMLError:
        right = False
    if not right:  # flow style, anchors, several documents: better refuse than spoil another's file
        raise ValueError(f"{path}: the section {SECTION!r} can't be replaced in place; write it by hand")
    return merged


def _blank_tail(block: str) -> str:
    return "\n" * (len(block) - len(block.rstrip("\n")) - 1) if block.endswith("\n\n") else ""


def _replace(path: Path, text: str) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        os.chmod(file.name, mode)
        os.replace(file.name, path)
    except OSError as error:
        raise ValueError(f"{str(path)!r} can't be written: {error.strerror}") from error
