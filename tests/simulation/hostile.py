# SPDX-License-Identifier: Apache-2.0
"""What a peer may say that means harm: every message with drawn fields, some of them with changed bytes."""

from __future__ import annotations

import random

from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.format.wire_format import WireFormat

_NUMBERS = (0, 1, 2, 7, 255, 1 << 16, 1 << 32, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def hostile_bytes(rng: random.Random) -> bytes:
    message = bytearray(m.encode(_message(rng)))
    if rng.random() < 0.3 and message:
        for _ in range(rng.randint(1, 4)):
            message[rng.randrange(len(message))] = rng.randrange(256)
    elif rng.random() < 0.1:
        message = bytearray(rng.randbytes(rng.randrange(200)))
    return bytes(message)


def _message(rng: random.Random) -> m.Message:
    name, number = f"evil-{rng.randrange(3)}", rng.choice(_NUMBERS)
    some = rng.choice(_NUMBERS)
    match rng.randrange(12):
        case 0:
            runs = tuple((rng.choice(_NUMBERS) % (1 << 40), 1 + some % 7) for _ in range(rng.randrange(3)))
            return m.Subscribe(
                name, number, bytes(24), max(1, some), (m.PageRuns(0, runs),), True, bool(number % 2), 1000
            )
        case 1:
            group = m.PartGroup(0, ((0, 1 + some % 3),), some, 1 + number % 4096, (WireFormat("bf16"),) * 2)
            return m.SubscribeParts(
                name, number, max(1, some), (group,), 0, 2, 4096, True, bool(number % 2), 1000
            )
        case 2:
            return m.Grant(number, 1 + some % (1 << 32), rng.randbytes(24))
        case 3:
            return m.PartsReady(number)
        case 4:
            return m.Cancel(name, number)
        case 5:
            return m.Release(name, 1 + some % 4096, "evil")
        case 6:
            return m.Renew((name,) * rng.randrange(4))
        case 7:
            return m.Failed(name, number, "code", "because")
        case 8:
            return m.Ask(number, "verb", b"body")
        case 9:
            return m.Answer(number, "", "", b"body")
        case 10:
            return m.Hello((7,), "evil", 0, bytes(32))
        case _:
            return m.Reject("busy", "go away")
