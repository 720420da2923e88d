# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.backends.kinds import KINDS, Kind
from tests.backends.pair import Pair
from tests.backends.places import HOST


def pytest_configure(config: pytest.Config) -> None:
    text = (
        "any_memory: what moves lies in the kind's own memory; without it a test runs over host memory only"
    )
    config.addinivalue_line("markers", text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        anywhere = metafunc.definition.get_closest_marker("any_memory") is not None
        kinds = [kind for kind in KINDS if anywhere or kind.memory is HOST]
        metafunc.parametrize("kind", kinds, ids=[kind.name for kind in kinds], indirect=True)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def make_pair(kind: Kind) -> Iterator[Callable[..., Pair]]:
    """Pairs of the kind under test; closed at the end."""
    pairs: list[Pair] = []

    def make(**options: Any) -> Pair:
        pairs.append(Pair(kind, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()
