# SPDX-License-Identifier: Apache-2.0
"""Our connector class against the interface of each vLLM release, without vLLM: by its source and snapshots.

The snapshots are what ``scripts/connector_versions.py`` read from the releases' wheels.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONNECTOR = ROOT / "sage_kv_connector" / "integrations" / "vllm" / "connector.py"
SNAPSHOTS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "data" / "vllm_interfaces.json").read_text()
)
#: Hooks that came later, and what their absence means in releases that never call them.
OPTIONAL = {
    "on_new_request": "a queued request does not renew its lease",
    "handle_preemptions": "what was given up is withdrawn when the step's metadata is bound",
    "has_pending_push_work": "orders wait for the next step",
    "bind_kv_cache_manager": "vLLM holds finished prefills itself, and steps while it does",
    "build_connector_worker_meta": "nothing is held that it would tell of",
    "get_transfer_results": "get_finished and get_block_ids_with_load_errors are asked instead",
    "get_loaded_kv_cache_group_ids": "one group, or all of them",
    "set_xfer_handshake_metadata_pp_aware": "set_xfer_handshake_metadata is called instead",
    "supports_sleep_mode": "sleep mode is refused when the connector is built",
    "unregister_kv_caches": "sleep mode is refused when the connector is built",
    "restore_kv_caches": "sleep mode is refused when the connector is built",
}
#: Names the adapter imports that a release may lack, because it looks for them with getattr.
LOOKED_FOR = {"SupportsHMA", "KVConnectorTransferResults", "KVConnectorWorkerMetadata"}
#: What holds of finished prefills stand on, as releases have it that give connectors their blocks.
HOLDS = {
    "BlockPool.touch": "self, blocks: Sequence[KVCacheBlock]",
    "BlockPool.free_blocks": "self, ordered_blocks: Iterable[KVCacheBlock]",
    "KVCacheManager.get_blocks": "self, request_id: str",
    "Scheduler.pause_state": "self",
    "EngineCoreProc.has_work": "self",
}


def our_methods() -> dict[str, ast.FunctionDef]:
    tree = ast.parse(CONNECTOR.read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SageKVConnector")
    return {n.name: n for n in found.body if isinstance(n, ast.FunctionDef)}


OURS = our_methods()


def takes(node: ast.FunctionDef, parameters: list[str]) -> bool:
    """Whether a call with the release's parameters, by position, fits our method."""
    positional = [p for p in parameters if not p.startswith("*")]
    args = node.args
    most = len(args.args) - 1
    least = most - len(args.defaults)
    required = [p for p in positional if not p.endswith("?")]
    return (len(positional) <= most or args.vararg is not None) and least <= len(required)


def test_every_release_since_0_16_has_a_snapshot() -> None:
    minors = {int(version.split(".")[1]) for version in SNAPSHOTS}
    assert minors >= set(range(16, 34))


@pytest.mark.parametrize("version", SNAPSHOTS)
def test_abstract_methods_are_ours_and_take_what_the_release_passes(version: str) -> None:
    snapshot = SNAPSHOTS[version]
    for name in snapshot["abstract"]:
        assert name in OURS, f"{name} is abstract in {version}"
    for name, parameters in snapshot["hooks"].items():
        if name in OURS:
            assert takes(OURS[name], parameters), f"{name}{tuple(parameters)} of {version}"


@pytest.mark.parametrize("version", SNAPSHOTS)
def test_hooks_that_we_rely_on_are_called_by_the_release(version: str) -> None:
    hooks = set(SNAPSHOTS[version]["hooks"])
    own = {"scheduler_side", "worker_side", "weights_replaced", "drains"}
    missing = {n for n in OURS if not n.startswith("_")} - hooks - own - set(OPTIONAL)
    assert not missing


@pytest.mark.parametrize("version", SNAPSHOTS)
def test_what_the_adapter_imports_or_wraps_is_there(version: str) -> None:
    from scripts.connector_versions import NEEDED

    snapshot = SNAPSHOTS[version]
    for path, names in NEEDED.items():
        missing = set(names) - set(snapshot["names"][path]) - LOOKED_FOR
        assert not missing, f"{path} of {version}"
    assert snapshot["arguments"] == ["add_cli_args", "create_engine_config"]
    assert snapshot["register_connector"] == ["name", "module_path", "class_name"]
    assert {"kv_connector", "kv_role", "kv_connector_extra_config"} <= set(snapshot["config_fields"])
    assert len([p for p in snapshot["constructor"] if not p.endswith("?")]) in (2, 3)


@pytest.mark.parametrize("version", SNAPSHOTS)
def test_blocks_are_held_where_all_that_it_takes_is_there(version: str) -> None:
    """Without the pool vLLM holds them. With it, reports of workers need a way back."""
    snapshot = SNAPSHOTS[version]
    given = "bind_kv_cache_manager" in snapshot["hooks"]
    assert given == (int(version.split(".")[1]) >= 30)
    assert snapshot["called"] == (HOLDS if given else {})
    if given:
        assert {"build_connector_worker_meta", "has_pending_push_work"} <= set(snapshot["hooks"])


def test_sleep_mode_is_told_of_since_0_33() -> None:
    """The three hooks came together, so that one of them tells ``refuse_sleep_mode`` of all."""
    sleeps = {"supports_sleep_mode", "unregister_kv_caches", "restore_kv_caches"}
    for version, snapshot in SNAPSHOTS.items():
        found = sleeps & set(snapshot["hooks"])
        assert found == (sleeps if int(version.split(".")[1]) >= 33 else set()), version
