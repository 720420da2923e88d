# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``sglang.srt.plugins``: makes ``sage_kvt`` a disaggregation transfer backend.

SGLang loads plugins in the launcher before it parses arguments, and again in each process
it starts. It only logs what a plugin raises; where this backend was asked for, that would end
in a misleading error later, so ``register`` then ends the process with its own. So it does for a bad option.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sage_kv_connector.integrations.sglang.given_options import NAME, asked_for, why_refused
from sage_kv_connector.integrations.sglang.metadata_rows import follow_metadata_buffers

#: The release whose interfaces this was written for and is tested with.
TESTED_VERSION = "0.5.23"
_GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"


class RefusedError(RuntimeError):
    """This SGLang can't take the backend; the message says why."""


def register() -> None:
    """Add the name to SGLang's choices, its enum and its table of classes. Idempotent.

    Ends the process for options that are refused: field, value and what is allowed are its last words.
    """
    if why := why_refused(sys.argv[1:]):
        raise SystemExit(f"sage_kvt: {why}")
    try:
        _register()
    except Exception as error:
        import sglang

        message = (
            f"sage_kvt could not register with SGLang {sglang.__version__} (tested: {TESTED_VERSION}): "
            f"{type(error).__name__}: {error}"
        )
        if asked_for(sys.argv[1:]):
            raise SystemExit(message) from error
        raise RefusedError(message) from error


def registered() -> str:
    """Why the backend can't be used in this process, "" if it can; loads SGLang's plugins."""
    from sglang.srt.disaggregation import utils
    from sglang.srt.plugins import load_plugins

    load_plugins()
    try:
        backend = utils.TransferBackend(NAME)
        found = utils.get_kv_class(backend, utils.KVClassType.MANAGER)
    except ValueError as error:
        return f"{error} (is {NAME!r} missing in SGLANG_PLUGINS?)"
    if found is None or not found.__module__.startswith("sage_kv_connector."):
        return f"{_GET_KV_CLASS} answers {found}, not this package's manager"
    return ""


def _register() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.disaggregation.utils import TransferBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _check_interfaces()
    follow_metadata_buffers()
    if NAME in TransferBackend._value2member_map_:
        return
    member = object.__new__(TransferBackend)
    member._name_, member._value_ = NAME.upper(), NAME
    TransferBackend._member_map_[member._name_] = member
    TransferBackend._value2member_map_[NAME] = member
    TransferBackend._member_names_.append(member._name_)
    if NAME not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([NAME])
    HookRegistry.register(_GET_KV_CLASS, _get_kv_class, HookType.AROUND)


def _get_kv_class(original: Callable[[Any, Any], Any], transfer_backend: Any, class_type: Any) -> Any:
    """AROUND hook: this package's classes for our name, SGLang's answer for any other."""
    if getattr(transfer_backend, "value", None) != NAME or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from sage_kv_connector.integrations.sglang.bootstrap import SageKVBootstrapServer
    from sage_kv_connector.integrations.sglang.decode import SageKVReceiver
    from sage_kv_connector.integrations.sglang.manager import SageKVManager
    from sage_kv_connector.integrations.sglang.prefill import SageKVSender

    ours = {
        "manager": SageKVManager,
        "sender": SageKVSender,
        "receiver": SageKVReceiver,
        "bootstrap_server": SageKVBootstrapServer,
    }
    return ours[class_type.value]


def _check_interfaces() -> None:
    """What the classes here override or call must be there under its name. Raises RefusedError."""
    from sglang.srt.disaggregation.common import conn

    wanted = {
        "CommonKVManager": (
            "update_status",
            "record_failure",
            "_register_topology_row",
            "try_ensure_parallel_info",
        ),
        "CommonKVSender": ("_prepare_send_indices", "pop_decode_prefix_len", "poll", "clear", "abort"),
        "CommonKVReceiver": (
            "_setup_bootstrap_infos",
            "invalidate_cached_bootstrap_infos",
            "_send_abort_notification",
            "_clear",
        ),
        "CommonKVBootstrapServer": ("_setup_routes", "_handle_route_put", "_is_ready"),
    }
    for name, methods in wanted.items():
        found = getattr(conn, name, None)
        missing = [method for method in methods if not hasattr(found, method)]
        if missing:
            raise RefusedError(f"disaggregation.common.conn.{name} has no {', '.join(missing)}")
