# SPDX-License-Identifier: Apache-2.0
"""Lets unmodified SGLang start on a machine without CUDA; only demo and tests put this folder on a path.

SGLang imports ``sgl_kernel`` even with ``--device cpu``, and torchvision from PyPI is linked with CUDA, so
that registering its operators fails. Here ``sgl_kernel`` is found as modules whose functions raise
when they are called, and torchvision's registrations are left out: no text model needs either.
HiCache's host pool is served by ``hicache_on_cpu``, LoRA adapters by ``unpinned_on_cpu``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import NoReturn

_MISSING = "sgl_kernel"


class _Missing:
    """A function, or a table of constants, that is not there; to call it raises."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} has no {name}")
        return _Missing(f"{self.__name__}.{name}")

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{self.__name__} needs CUDA: sgl_kernel is not installed here")


class _Kernels(types.ModuleType):
    """Any name is there, and raises when it is called."""

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} has no {name}")
        return _Missing(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``sgl_kernel`` and any submodule of it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MISSING and not name.startswith(f"{_MISSING}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


if importlib.util.find_spec(_MISSING) is None:
    sys.meta_path.append(_Finder())
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    after_import = importlib.import_module("after_import").after_import
    for name in ("hicache_on_cpu", "unpinned_on_cpu"):
        after_import(importlib.import_module(name).DEEDS)
