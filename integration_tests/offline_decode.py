# SPDX-License-Identifier: Apache-2.0
"""An offline ``LLM`` as decode side of a running prefill server; prints "TOKEN_IDS [...]".

Arguments: "word" or "object", model, prefill's URL, options as JSON, prompt as JSON.
"""

from __future__ import annotations

import json
import sys

from sage_kv_connector.launch.vllm import complete


def main() -> None:
    form, model, prefill_url, options_text, prompt_text = sys.argv[1:]
    options, prompt = json.loads(options_text), json.loads(prompt_text)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    given = (
        "sage_kvt:" + ",".join(f"{key}={value}" for key, value in options.items())
        if form == "word"
        else KVTransferConfig(
            kv_connector="sage_kvt", kv_role="kv_consumer", kv_connector_extra_config=options
        )
    )
    llm = LLM(model, enforce_eager=True, dtype="float32", max_model_len=1024, kv_transfer_config=given)
    prefilled = complete(
        prefill_url,
        prompt,
        max_tokens=1,
        kv_transfer_params={"do_remote_decode": True, "do_remote_prefill": False},
        stream=False,
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=8,
        ignore_eos=True,
        extra_args={"kv_transfer_params": prefilled.kv_transfer_params},
    )
    (answer,) = llm.generate({"prompt_token_ids": prompt}, sampling)
    print("\nTOKEN_IDS", json.dumps(list(answer.outputs[0].token_ids)), flush=True)


if __name__ == "__main__":
    main()
