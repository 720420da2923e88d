# SPDX-License-Identifier: Apache-2.0
"""SGLang's transfer backend ``sage_kvt`` over the transport engine; docs/sglang.md is the user's guide.

``plugin`` makes the name known to SGLang, ``manager`` is what each scheduler rank builds once,
``sender`` and ``receiver`` are one request's two ends, ``landing`` its transfers on decode,
``kv_pool`` reads SGLang's KV pool, ``bootstrap`` tells decode where the prefill ranks are.
"""
