# SPDX-License-Identifier: Apache-2.0
"""One Python parser under libFuzzer: ``python -m tests.fuzz.run_parser NAME [libFuzzer's arguments]``."""

from __future__ import annotations

import gc
import importlib
import sys
import types

import atheris

from tests.fuzz.parsers import CODE_OF, PARSERS


def main() -> None:
    name, *arguments = sys.argv[1:]
    for module in {code.partition(":")[0] for code in CODE_OF[name]}:
        instrument(importlib.import_module(module))
    gc.disable()  # an input leaves no cycles, and what others left is not the input's doing
    atheris.Setup([sys.argv[0], *arguments], PARSERS[name])
    atheris.Fuzz()


def instrument(module: types.ModuleType) -> None:
    """Inputs are steered by what they reach in it. It was imported by an editable install's own loader."""
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for owner in owners:
        for value in list(vars(owner).values()):
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


if __name__ == "__main__":
    main()
