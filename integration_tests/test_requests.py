# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests that users send (``request_kinds.py``); ``scripts/request_matrix.py`` makes the whole table."""

from __future__ import annotations

import pytest

from integration_tests import request_kinds as kinds
from integration_tests.cluster import Cluster
from integration_tests.request_pair import Dispatch, Pair


@pytest.mark.parametrize("dispatch", ["sequential", "concurrent"])
@pytest.mark.parametrize("name", kinds.KINDS)
def test_a_kind_of_request_is_right(cluster: Cluster, name: str, dispatch: Dispatch) -> None:
    pair = Pair(cluster.prefill, cluster.decode_shm, cluster.prefill, cluster.bootstrap)
    row = kinds.run(pair, name, dispatch)
    cluster.audit.write_text("")
    assert row.right, row.why
    assert (row.stalls, row.held) == (0, {})
