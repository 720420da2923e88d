# SPDX-License-Identifier: Apache-2.0
"""Write docs/troubleshooting.md: ``python -m scripts.troubleshooting_document [--check]``.

With ``--check`` nothing is written; exit status 1 if the committed file is not what would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sage_kv_connector.contract.failure_kind import Symptom
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"

_HEAD = """\
# Troubleshooting

Made from `sage_kv_connector/contract/failure_kinds.py` by `python -m scripts.troubleshooting_document`; don't edit it.

Both servers log one line for each transfer, with the request and the transfer. The last two below are warnings, at most
one a second of each code; the others are there with the log's level at debug ([log](ops.md#log)):

```
received KV of request cmpl-…, transfer 7f3a…: 33554432 bytes in 3.1 ms (10.82 GB/s) over shm (direct)
sent KV of request cmpl-…, transfer 7f3a…: 33554432 bytes in 3.3 ms (10.17 GB/s) over shm (direct)
KV of request cmpl-…, transfer 7f3a…: not needed
KV of request cmpl-…, transfer 7f3a…: given up: the request was aborted (code cancelled, stage wait, peer …[0])
KV of request cmpl-…, transfer 7f3a…: did not arrive: told by the peer: nobody fetched it within its lease \
(code expired, stage hold, peer …[0]); `sage-kvt explain expired` says more
KV of request cmpl-…, transfer 7f3a…: was not fetched: nobody fetched it within its lease (code expired, stage hold); \
`sage-kvt explain expired` says more
```

"Did not arrive" is decode's word, "was not fetched" prefill's. Whatever the code, decode computes the prompt itself and
the answer is right (SGLang answers with an error instead where it has no way to compute). A request that was aborted is
no failure: it is told at debug only and counted apart. vLLM's `/metrics` counts failures by code:
`vllm:sage_kvt_failed_loads_total{code="…"}` on decode and `vllm:sage_kvt_failed_offers_total{code="…"}` on prefill.

`sage-kvt explain CODE` prints a row of the tables below, `sage-kvt explain` all codes, and `--json` either for a
program. A code has a stage: how far the transfer had come. Stages are `resolve` (who holds the KV), `connect`, `agree`
(caches, weights and prompts are compared), `hold` (pages wait for decode), `wait` (decode waits for pages), `move`,
`convert`.
"""


def document() -> str:
    """The whole file."""
    parts = [_HEAD]
    for symptom in Symptom:
        parts.append(
            f"\n## {symptom.value}\n\n| code, stage | what it means | cause | what to do |\n|---|---|---|---|\n"
        )
        parts += [
            f"| `{kind.code}`, {kind.stage} | {kind.meaning} | {kind.cause} | {kind.remedy} |\n"
            for kind in FAILURE_KINDS.values()
            if kind.symptom is symptom
        ]
    return "".join(parts)


def main() -> int:
    text = document()
    if "--check" not in sys.argv:
        DOCUMENT.write_text(text)
    elif not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        print(
            "docs/troubleshooting.md is not current; run python -m scripts.troubleshooting_document",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
