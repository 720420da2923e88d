# SPDX-License-Identifier: Apache-2.0
"""The token that readers of what engines count bring over HTTP."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.config.secret_file import read_secret

TOKEN_ENV = "SAGE_KVT_EXPORTER_TOKEN"


def reading_token(file: Path | None = None) -> str:
    """The token that a reader brings and a server asks for: the file's, else $SAGE_KVT_EXPORTER_TOKEN, else that of
    the transport's secret; "" for none.

    The secret is what engines take that are started here: by options of the environment or its configuration file, too.
    Raises ValueError naming the file that can't be read or is empty, or the option.
    """
    if file is not None:
        return read_secret("token_file", file, "the token").decode()
    if token := os.environ.get(TOKEN_ENV, ""):
        return token
    secret = KVTransportConfig.load().resolved_secret()
    return token_of_secret(secret) if secret else ""


def token_of_secret(secret: bytes) -> str:
    """The token where the transport's shared secret stands for one; the secret can't be found from it."""
    return hmac.new(secret, b"sage_kvt exporter token 1", hashlib.sha256).hexdigest()
