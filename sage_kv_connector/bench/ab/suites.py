# SPDX-License-Identifier: Apache-2.0
"""What is measured: groups of cases that the same servers run, by name of the suite."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

#: How a router may send requests: to prefill and then to decode, or to both at once.
DISPATCHES = ("sequential", "concurrent")


class Case(NamedTuple):
    """What all arms do alike. ``requests``: in one round."""

    link: str
    tokens: int
    load: str
    dispatch: str
    requests: int

    @property
    def name(self) -> str:
        return f"{self.link}, {self.tokens} tokens, {self.load}, {self.dispatch}"


class Group(NamedTuple):
    """``loads``: name, and requests a round. ``kv_gib``: KV cache of each server, for the prompts that run at once."""

    link: str
    tokens: tuple[int, ...]
    loads: tuple[tuple[str, int], ...]
    kv_gib: int = 1
    dispatches: tuple[str, ...] = ("sequential",)

    def cases(self) -> Iterator[Case]:
        for tokens in self.tokens:
            for load, requests in self.loads:
                for dispatch in self.dispatches:
                    yield Case(self.link, tokens, load, dispatch, requests)


class Only(NamedTuple):
    """What is wanted of a suite: an empty field means all of it, no ``rounds`` as many as it has."""

    links: Collection[str] = ()
    tokens: Collection[int] = ()
    loads: Collection[str] = ()
    dispatches: Collection[str] = ()
    arms: Collection[str] = ()
    rounds: int | None = None


EVERYTHING = Only()


class Suite(NamedTuple):
    groups: tuple[Group, ...]
    arms: tuple[str, ...]
    rounds: int

    def narrowed(self, only: Only) -> Suite:
        """Raises ValueError where nothing of it is left. Arms that it lacks are taken all the same."""
        groups = tuple(
            group._replace(
                tokens=tuple(one for one in group.tokens if one in (only.tokens or group.tokens)),
                loads=tuple(one for one in group.loads if one[0] in (only.loads or (one[0],))),
                dispatches=tuple(
                    one for one in group.dispatches if one in (only.dispatches or group.dispatches)
                ),
            )
            for group in self.groups
            if group.link in (only.links or (group.link,))
        )
        groups = tuple(group for group in groups if any(group.cases()))
        if not groups:
            raise ValueError(f"the suite has no case with all of {_words(only)}; it has\n{self.listing()}")
        return Suite(groups, tuple(only.arms) or self.arms, only.rounds or self.rounds)

    def listing(self) -> str:
        """Its cases, a line each."""
        return "\n".join(case.name for group in self.groups for case in group.cases())


def _words(only: Only) -> str:
    return ", ".join(f"{name} {value}" for name, value in only._asdict().items() if value)


_MAIN = ("ours-bf16", "ours-int4", "nixl-pull", "mooncake")
_ALL = ("ours-bf16", "ours-fp8", "ours-int4", "nixl-pull", "nixl-push", "mooncake", "alone")
_LOADS = (("closed-1", 3), ("closed-4", 8), ("rag", 8))

SUITES = {
    "ci": Suite((Group("1g", (4096,), (("closed-2", 4),)),), ("ours-bf16", "ours-int4"), 1),
    "quick": Suite(
        (
            Group("1g", (8192,), _LOADS, dispatches=DISPATCHES),
            Group("node", (8192,), _LOADS, dispatches=DISPATCHES),
        ),
        _MAIN,
        2,
    ),
    "carriers": Suite(
        tuple(
            Group(link, (8192,), (("closed-1", 4), ("closed-4", 8)), dispatches=DISPATCHES)
            for link in ("node", "1g")
        ),
        ("ours-nixl", "nixl-pull", "ours-mooncake", "mooncake"),
        2,
    ),
    "full": Suite(
        (
            Group("1g", (32768,), (*_LOADS, ("chat", 8)), 3, DISPATCHES),
            Group("node", (32768,), _LOADS, 3, DISPATCHES),
            Group("1g", (32768,), (("open-50", 8), ("open-80", 8), ("open-110", 8)), 3),
            Group("1g", (65536,), _LOADS, 5),
            Group("1g", (131072,), (("closed-1", 2), ("closed-4", 4), ("rag", 4)), 6),
            Group("1g", (8192,), (("closed-16", 32),), 3, DISPATCHES),
            Group("10g", (8192, 32768), _LOADS, 3),
            Group("100m", (8192,), (("closed-1", 2), ("closed-4", 4)), 2),
        ),
        _ALL,
        3,
    ),
}
