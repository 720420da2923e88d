# SPDX-License-Identifier: Apache-2.0
"""Inputs that were once found are refused or taken as documented; ``make fuzz`` looks for more."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest

from tests.fuzz.parsers import PARSERS, seeds_of

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_takes_or_refuses(name: str) -> None:
    inputs = [base64.b64decode(line) for line in (CORPUS / f"{name}.txt").read_text().split()] + seeds_of(
        name
    )
    assert len(inputs) > 5
    chance = random.Random(name)
    for data in inputs:
        PARSERS[name](data)
        changed = bytearray(data or b"\0")
        for _ in range(20):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
            PARSERS[name](bytes(changed))
