# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from sage_kv_connector.backends.mooncake.backend import MooncakeBackend
from tests.backends.carried.kinds import carried_kind

KINDS = (carried_kind(MooncakeBackend),)
