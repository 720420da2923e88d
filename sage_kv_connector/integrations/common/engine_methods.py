# SPDX-License-Identifier: Apache-2.0
"""Methods of an engine that we listen in on, where it has no hook for what we must hear."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any


def wrap_method(
    module: str, kind: str, method: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Let a class of a loaded module have ``around(method)`` for its method, or class method, from now on.

    Idempotent; nothing happens in an engine that does not have it.
    """
    owner = getattr(sys.modules.get(module), kind, None)
    known = inspect.getattr_static(owner, method, None)
    function = known.__func__ if isinstance(known, classmethod) else known
    if owner is None or function is None or hasattr(function, "sage_kvt"):
        return
    wrapped: Any = functools.wraps(function)(around(function))
    wrapped.sage_kvt = True
    setattr(owner, method, classmethod(wrapped) if isinstance(known, classmethod) else wrapped)
