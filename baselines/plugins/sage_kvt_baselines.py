# SPDX-License-Identifier: Apache-2.0
"""vLLM and SGLang plugins for comparisons and tests on a CPU; only ever on PYTHONPATH of their servers.

``SAGE_KVT_PREFILL_STUB=1``: attention of a step that computes more than one token of any request returns zeros.
KV is written as ever, decode attention is real, but answers mean nothing: true attention over 32K tokens
takes minutes on a CPU. A token's KV hangs on the token alone, however a prompt is cut into chunks.

``SAGE_KVT_FAST_LINEAR=1``: linear layers of 16 bit are computed in fp32 on a CPU without instructions for bf16, where
oneDNN takes ten times as long.

``SAGE_KVT_MOONCAKE_ON_CPU=1``: lets vLLM's MooncakeConnector start without an
accelerator, which it asks for its device index; lets SGLang's Mooncake backend send page indices
without pinned memory and CUDA events.

``SAGE_KVT_ABSORBED_MLA=1``: SGLang prefills latent attention in its absorbed form, the one that its
``torch_native`` attention can compute. For tests on a CPU.

``SAGE_KVT_WINDOWS_ON_CPU=1``: SGLang's ``torch_native`` attention reads K and V of layers with a sliding window where
it has written them, in a pool of their own. As released it reads that pool by the places of the other one. For tests on
a CPU.
"""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger("vllm.sage_kvt_baselines")
sglang_logger = logging.getLogger("sglang.sage_kvt_baselines")


def stub_prefill_attention() -> None:
    if os.environ.get("SAGE_KVT_PREFILL_STUB") != "1":
        return
    from vllm import _custom_ops

    from sage_kv_connector.integrations.vllm.amx import request_amx_tiles

    request_amx_tiles()  # prefill is what asks for them otherwise
    real = _custom_ops.cpu_attention_with_kv_cache
    if getattr(real, "sage_kvt_stub", False):
        return

    def stubbed(query: Any, *args: Any, output: Any, seq_lens: Any, **kwargs: Any) -> None:
        if query.shape[0] > seq_lens.shape[0]:
            output.zero_()
        else:
            real(query, *args, output=output, seq_lens=seq_lens, **kwargs)

    stubbed.sage_kvt_stub = True  # type: ignore[attr-defined]
    _custom_ops.cpu_attention_with_kv_cache = stubbed
    logger.warning("prefill attention is STUBBED for a transfer benchmark: answers mean nothing")


def compute_linear_layers_in_fp32() -> None:
    if os.environ.get("SAGE_KVT_FAST_LINEAR") != "1":
        return
    import torch
    from vllm.model_executor.layers import utils

    dispatched = utils.dispatch_cpu_unquantized_gemm
    if torch.cpu._is_avx512_bf16_supported() or getattr(dispatched, "sage_kvt_fp32", False):
        return

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2 or layer.weight.dtype == torch.float32:
            dispatched(layer, remove_weight)
            return
        known = layer.weight.detach().float()

        def linear(x: Any, weight: Any, bias: Any) -> Any:
            added = None if bias is None else bias.float()
            return torch.nn.functional.linear(x.float(), known, added).to(x.dtype)

        layer.cpu_linear = linear

    dispatch.sage_kvt_fp32 = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch


def let_mooncake_start_on_cpu() -> None:
    if os.environ.get("SAGE_KVT_MOONCAKE_ON_CPU") != "1":
        return
    import torch
    from vllm.platforms.cpu import CpuPlatform

    torch.accelerator.current_device_index = lambda: 0
    CpuPlatform.set_device = classmethod(lambda cls, device: None)


def read_windows_where_they_are() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def placed(run: Any) -> Any:
        def wrapped(
            self: Any, query: Any, output: Any, k: Any, v: Any, slots: Any, rows: Any, *args: Any, **more: Any
        ) -> Any:
            if self.use_sliding_window_kv_pool and more.get("sliding_window_size") is not None:
                slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots[rows])
                rows = rows.new_tensor(range(len(rows)))
            return run(self, query, output, k, v, slots, rows, *args, **more)

        return wrapped

    for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        setattr(TorchNativeAttnBackend, name, placed(getattr(TorchNativeAttnBackend, name)))


def for_sglang() -> None:
    if os.environ.get("SAGE_KVT_WINDOWS_ON_CPU") == "1":
        read_windows_where_they_are()
    if os.environ.get("SAGE_KVT_ABSORBED_MLA") == "1":
        from sglang.srt.models.deepseek_common import attention_backend_handler as handler

        handler.AttentionBackendRegistry.register("torch_native", handler._dispatch_mla_subtype)
    if os.environ.get("SAGE_KVT_MOONCAKE_ON_CPU") == "1":
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        MooncakeKVSender.supports_host_tensor_indices = False
    if os.environ.get("SAGE_KVT_PREFILL_STUB") == "1":
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        def stubbed(self: Any, query: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
            return output.zero_()

        TorchNativeAttnBackend._run_sdpa_forward_extend = stubbed
        sglang_logger.warning("prefill attention is STUBBED for a transfer benchmark: answers mean nothing")
