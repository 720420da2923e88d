# SPDX-License-Identifier: Apache-2.0
"""SGLang's hybrid pools: layers with a sliding window have a pool of their own, with its own page numbers.

It keeps the pages that a request's last tokens lie in. Both sides name those, in the order of tokens: prefill with its
last chunk, decode when it has pages. Here they become the last places of the request in group ``WINDOW_GROUP``, so
that each side's pages stand for the same tokens however many it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sage_kv_connector.engine import NULL_PAGE, GroupPages, PageIds
from sage_kv_connector.integrations.common.engine_methods import wrap_method

#: Of a view with windows; group 0 are the layers that keep everything.
WINDOW_GROUP = 1
#: SGLang's name of this pool among ``KVArgs.state_types``.
STATE_TYPE = "swa"


class WindowLayers(NamedTuple):
    """The split of a hybrid pool. ``windowed``, ``others``: numbers in the model, in the pools' order.

    ``tokens``: the window as the model's configuration says it. ``heads`` are those of this rank.
    """

    windowed: tuple[int, ...]
    others: tuple[int, ...]
    tokens: int
    heads: int
    total_heads: int


def state_names(kv_args: Any) -> list[str]:
    """What a pool keeps beside pages of K and V, or a latent, by SGLang's names."""
    return [str(getattr(kind, "value", kind)) for kind in kv_args.state_types]


def window_layers(kv_args: Any, model: Any, tp_size: int, pp_size: int) -> WindowLayers | None:
    """Of a server's pool and its ``ModelConfig``; None without windows. Raises ValueError naming the field."""
    if state_names(kv_args) != [STATE_TYPE]:
        return None
    if pp_size != 1:  # KVArgs does not tell which layers of a hybrid pool a stage has
        raise ValueError(f"pp_size is {pp_size} with sliding windows; sage_kvt allows 1, or {ONE_POOL}")
    windowed, others = model.swa_attention_layer_ids, model.full_attention_layer_ids
    if not windowed or not others:
        raise ValueError(
            f"swa_attention_layer_ids {windowed!r}, full_attention_layer_ids {others!r}: sage_kvt transfers a hybrid "
            f"pool that has layers of both kinds; allowed: {ONE_POOL}"
        )
    tokens = model.sliding_window_size or getattr(model, "attention_chunk_size", None) or 0
    return WindowLayers(
        tuple(map(int, windowed)),
        tuple(map(int, others)),
        int(tokens),
        int(model.get_swa_num_kv_heads(tp_size)),
        int(model.get_swa_num_kv_heads(1)),
    )


#: What keeps layers with a window where the others are.
ONE_POOL = "--disable-hybrid-swa-memory"


def window_table(state_indices: Sequence[Any] | None, places: int) -> PageIds:
    """Prefill's page ids at all ``places`` of a request, NULL_PAGE where nothing is kept.

    Raises ValueError for what can't be the last pages of so many.
    """
    ids = _window_ids(state_indices, places)
    kept = np.where(ids > 0, ids, NULL_PAGE)  # page 0 stands for tokens that have left their window
    return np.concatenate([np.full(places - len(ids), NULL_PAGE, dtype=np.int64), kept])


def window_pages(
    state_indices: Sequence[Any] | None, places: int, size: int, first_token: int | None
) -> GroupPages:
    """What decode asks for, where a request has ``places`` pages of ``size`` tokens.

    ``first_token``: where the window begins, or what the prefix cache lacks; None if SGLang did not tell. Raises
    ValueError for what can't be the last pages of so many, or does not begin there.
    """
    ids = _window_ids(state_indices, places)
    if not len(ids) or not ids.all():
        raise ValueError(
            f"state_indices: {ids.tolist()} lack pages of the last of {places}; allowed: 1 and more"
        )
    first = places - len(ids)
    begin = first * size if first_token is None else first_token
    if begin // size != first:
        raise ValueError(
            f"state_indices: {len(ids)} of {places} pages of {size} tokens, but the window begins at token {begin}"
        )
    return GroupPages(WINDOW_GROUP, ((first, len(ids)),), ids, range(begin, places * size))


def _window_ids(state_indices: Sequence[Any] | None, places: int) -> PageIds:
    given = list(state_indices) if state_indices is not None else []
    if len(given) != 1 or given[0] is None:
        raise ValueError(f"state_indices: {len(given)} lists of pages, expected 1, of the sliding windows")
    ids: PageIds = np.array(given[0], dtype=np.int64)
    if ids.ndim != 1 or len(ids) > places or (ids < 0).any():
        raise ValueError(
            f"state_indices: {ids.tolist()} are no page ids of the last of {places} pages of this request"
        )
    return ids


def follow_windows() -> None:
    """Learn from SGLang's decode where a request's window begins: its pages alone say it to a page only.

    A peer with smaller pages keeps no more than its own pages of the window.
    """
    wrap_method("sglang.srt.disaggregation.decode", "DecodePreallocQueue", "_send_kv_metadata", _heard)


def _heard(send: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, decode_req: Any, *arguments: Any, **more: Any) -> Any:
        if (window := self.scheduler.sliding_window_size) is not None:
            prompt = self._rebootstrap_prefill_len(decode_req.req)
            decode_req.kv_receiver.window_begin = max(0, prompt - window)
        return send(self, decode_req, *arguments, **more)

    return wrapped
