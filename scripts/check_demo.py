# SPDX-License-Identifier: Apache-2.0
"""Read the demo's JSON object from stdin; exit status 1, saying why, unless it is complete and right."""

import json
import sys

KEYS = (
    "prompt_tokens", "kv_bytes", "transfer_s", "gbytes_per_s", "prefill_s", "decode_ttft_s",
    "recompute_ttft_s", "token_ids_equal", "kv_bytes_equal", "backend", "engine_version",
)  # fmt: skip

result = json.load(sys.stdin)
print(json.dumps(result, indent=2))
missing = [key for key in KEYS if result.get(key) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}")
if not (result["token_ids_equal"] and result["kv_bytes_equal"] and result["kv_bytes"] > 0):
    sys.exit("token ids or KV bytes differ")
