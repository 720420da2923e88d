# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, all else on stderr")]


class BackendChoice(StrEnum):
    shm = "shm"
    tcp = "tcp"
