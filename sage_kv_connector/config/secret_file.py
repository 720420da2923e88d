# SPDX-License-Identifier: Apache-2.0
"""Files that hold a secret."""

from __future__ import annotations

from pathlib import Path


def read_secret(option: str, file: Path, what: str) -> bytes:
    """What a file holds, without white space around it.

    Raises ValueError naming the option and the file if it can't be read, or does not hold ``what``.
    """
    try:
        held = file.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{option} {str(file)!r} can't be read: {error.strerror}") from error
    if not held:
        raise ValueError(f"{option} {str(file)!r} is empty; it must hold {what}")
    return held
