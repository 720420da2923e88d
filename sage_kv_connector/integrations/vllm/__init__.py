# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector over the transport engine; docs/vllm.md is the user's guide.

``plugin`` makes the name known to vLLM, ``connector`` is the class vLLM builds
twice, ``scheduler`` and ``worker`` are its two halves, ``metadata`` what passes
between them, ``kv_caches`` reads vLLM's tensors, ``bootstrap`` answers routers.
"""
