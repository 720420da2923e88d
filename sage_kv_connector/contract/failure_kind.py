# SPDX-License-Identifier: Apache-2.0
"""What is said of a failure code (``failure_kinds`` is the table), and the symptoms that an operator sees."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sage_kv_connector.contract.failure import Code, Stage


class Symptom(Enum):
    """What is seen from outside, in the order in which docs tell of it."""

    NOTHING = "Nothing is handed over: decode computes every prompt itself"
    RESTART = "Hand-over fails for a while after a restart, an update or a resize"
    SOME = "Some prompts are computed by decode"
    LOAD = "Hand-over fails under load, or after a wait"
    DATA = "Bytes do not arrive, or not as they were sent"
    QUIET = "A line in the log, and nothing is wrong"


class FailureKind(NamedTuple):
    """``stage``: where it happens, unless the transfer itself knows better.

    ``aborted``: somebody wanted it so; where the transfer was wanted no more, that is no failure.
    """

    code: Code
    symptom: Symptom
    stage: Stage
    meaning: str
    cause: str
    remedy: str
    aborted: bool = False
