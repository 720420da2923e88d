# SPDX-License-Identifier: Apache-2.0
"""sageLLM's KVTransferEngine between two processes, with sage_kvt as its comm backend."""

import multiprocessing
import uuid
from typing import Any

import torch
from sagellm_comm import get_comm_backend
from sagellm_kv_cache.transfer import KVHandle, KVTransferEngine

from sage_kv_connector.integrations.sage.comm_backend import register

SHAPE, PORT = (2, 1024, 8, 128), 29600  # K and V of 1,024 tokens, 8 heads of 128 channels


def kv_of_prefill() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def run(rank: int, tensor: torch.Tensor) -> Any:
    register()  # names "sage_kvt" to sagellm_comm
    backend = get_comm_backend("sage_kvt")
    backend.init(rank, 2, "127.0.0.1", PORT)
    engine = KVTransferEngine(backend)
    handle = KVHandle(handle_id=uuid.uuid4(), num_tokens=SHAPE[1])
    transfer = engine.transfer_kv_handle(handle, src_rank=0, dst_rank=1, tensor=tensor)
    status = engine.get_transfer_status(transfer).value
    backend.destroy()
    return status


def prefill() -> None:
    run(0, kv_of_prefill())


if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=prefill).start()
    received = torch.zeros(SHAPE, dtype=torch.bfloat16)
    status = run(1, received)
    same = "every value equal" if torch.equal(received, kv_of_prefill()) else "VALUES DIFFER"
    print(f"{status}: {received.nbytes >> 20} MiB, {same}")
