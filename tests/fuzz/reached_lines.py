# SPDX-License-Identifier: Apache-2.0
"""How much of a Python parser a folder of inputs reaches: ``python -m tests.fuzz.reached_lines NAME FOLDER``.

Prints two numbers: lines that ran, and lines of functions that there are.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.parsers import CODE_OF, PARSERS


def main() -> None:
    name, folder = sys.argv[1:]
    there: set[tuple[str, int]] = set()
    for code_of in CODE_OF[name]:
        module, _, function = code_of.partition(":")
        path = importlib.import_module(module).__file__
        assert path is not None
        code = compile(Path(path).read_text(), path, "exec")
        there |= {
            (path, line)
            for inner in functions_in(code)
            if function in ("", inner.co_name)
            for _, _, line in inner.co_lines()
            if line is not None
        }
    files = {path for path, _ in there}
    reached: set[tuple[str, int]] = set()

    def trace(frame: types.FrameType, _event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    inputs = [path.read_bytes() for path in Path(folder).iterdir()]
    sys.settrace(trace)
    for data in inputs:
        PARSERS[name](data)
    sys.settrace(None)
    print(len(reached & there), len(there))


def functions_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code that runs when a function is called, not when its module is imported."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & 0x2:  # CO_NEWLOCALS: a function's
                yield constant
            yield from functions_in(constant)


if __name__ == "__main__":
    main()
