# SPDX-License-Identifier: Apache-2.0
"""Modules of SGLang are loaded as they are; then something is done to them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping, Sequence

Deed = Callable[[types.ModuleType], None]


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, deeds: Mapping[str, Deed]) -> None:
        self._deeds = deeds
        self._loaders: dict[str, importlib.abc.Loader] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._deeds:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        self._loaders[name] = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loaders[module.__name__].exec_module(module)
        self._deeds[module.__name__](module)


def after_import(deeds: Mapping[str, Deed]) -> None:
    """``deeds``: by the module's name."""
    sys.meta_path.insert(0, _AfterImport(deeds))
