# SPDX-License-Identifier: Apache-2.0
"""Every option of the transport, in one place: from code, JSON, YAML, or ``key=value`` words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from sage_kv_connector.backends import backend_names
from sage_kv_connector.config.file import read_options, write_options
from sage_kv_connector.config.layers import layered, options_of_words, presets
from sage_kv_connector.config.refusal import SECRET_FIELDS, option_error
from sage_kv_connector.config.secret_file import read_secret
from sage_kv_connector.contract.dtypes import WIRE_DTYPES

SECRET_ENV = "SAGE_KVT_SECRET"
SECRET_FILE_ENV = "SAGE_KVT_SECRET_FILE"
PREVIOUS_SECRET_ENV = "SAGE_KVT_PREVIOUS_SECRET"
PREVIOUS_SECRET_FILE_ENV = "SAGE_KVT_PREVIOUS_SECRET_FILE"
Security = Literal["none", "authenticated", "encrypted"]
#: A week, so that no clock and no message overflows.
LONGEST_S = 604_800
_NUMBERS = (int, float, int | None)


def _secret(
    file_option: str, given: SecretStr | None, variable: str, file: Path | None, file_variable: str
) -> bytes:
    if given is not None:
        return given.get_secret_value().encode()
    if word := os.environ.get(variable):
        return word.encode()
    path = file or (Path(p) if (p := os.environ.get(file_variable)) else None)
    if path is None:
        return b""
    return read_secret(file_option, path, "the shared secret")


def _is_collector(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and not (parts.query or parts.fragment or "@" in parts.netloc)


def _has_opentelemetry() -> bool:
    try:
        return find_spec("opentelemetry.sdk.trace") is not None and (
            find_spec("opentelemetry.exporter.otlp.proto.http") is not None
        )
    except ModuleNotFoundError:  # of a package above
        return False


class KVTransportConfig(BaseModel):
    """Options of one engine's transport. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    preset: str | None = Field(None, description="named set of options that the others override")
    config_file: Path | None = Field(
        None,
        description="kv_transport.yaml, or a config.yaml with a section kv_transport; lies between preset and options",
    )
    backend: str = Field(
        "auto", description="auto: shm on the same node, else tcp; for a cache on a device pcie comes first"
    )
    target_dtype: str = Field(
        "auto",
        description="dtype on the wire, chosen by the side that receives; auto: the cache's own, "
        "the smaller one where prefill and decode differ",
    )
    staging_bytes: int = Field(
        64 << 20,
        ge=16 << 20,
        le=16 << 30,
        description="memory that converted KV may wait in, each for sending and receiving; used only if needed",
    )
    chunk_size: int = Field(
        0, ge=0, le=64 << 20, description="bytes of one chunk; 0: the backend's measured default"
    )
    overlap_streams: int = Field(
        0, ge=0, le=16, description="lanes (data-plane threads) of a backend; 0: chosen from the cores"
    )
    prefetch_depth: int = Field(4, ge=1, le=64, description="chunks in flight in stream_pipeline")
    library_transport: str = Field(
        "",
        description="of nixl a plugin of NIXL's (UCX), of mooncake a protocol (tcp, rdma, …); empty: its own choice",
    )
    library_device: str = Field(
        "", description="network cards that Mooncake uses, as it names them; empty: its own choice"
    )
    zero_copy: bool = Field(
        True,
        description="read straight from the peer's pages (shm), from device to device (pcie); false: always staged",
    )
    integrity: Literal["auto", "crc", "generation"] = Field(
        "auto",
        description="auto: CRC32C where bytes cross a wire or a staging buffer; crc: always; "
        "generation: never a CRC (a trusted fabric)",
    )
    host: str = Field(
        "auto",
        description="address to listen on and to advertise; auto: all interfaces when a secret is set, else loopback",
    )
    links: tuple[str, ...] = Field(
        (),
        max_length=8,
        description="this host's interfaces, or its addresses there, that KV is striped over by tcp (A+B)",
    )
    advertise_host: str | None = Field(
        None, description="address that peers connect to, if not host (NAT, proxies)"
    )
    advertise_port: int | None = Field(
        None, ge=1, le=65535, description="port that peers connect to, if not port"
    )
    port: int = Field(
        0, ge=0, le=65535, description="tcp port of rank 0, rank r takes port + r; 0: any free one"
    )
    bootstrap_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="HTTP port that answers GET /query for routers that dispatch at once",
    )
    concurrent: bool = Field(
        True,
        description="let routers that can ask decode while prefill computes; without bootstrap_port only where port "
        "is not set either, on any free one",
    )
    secret: SecretStr | None = Field(None, description=f"shared secret; else ${SECRET_ENV}, else secret_file")
    secret_file: Path | None = Field(
        None, description=f"file with the shared secret; else ${SECRET_FILE_ENV}"
    )
    previous_secret: SecretStr | None = Field(
        None,
        description="a second secret that is accepted while the first one is being changed; "
        f"else ${PREVIOUS_SECRET_ENV}, else previous_secret_file",
    )
    previous_secret_file: Path | None = Field(
        None, description=f"file with the second secret; else ${PREVIOUS_SECRET_FILE_ENV}"
    )
    security: Security | None = Field(
        None,
        description="what crosses a wire; authenticated: nobody changes it, encrypted: nobody reads it either; "
        "unset: authenticated with a secret, none without",
    )
    same_weights: bool = Field(
        True,
        description="refuse KV of a model with other weights, config or quantization; false: only shapes are compared",
    )
    deadline_s: float = Field(
        120.0, gt=0, le=LONGEST_S, description="a transfer that takes longer fails, and decode recomputes"
    )
    lease_s: float = Field(
        60.0, gt=0, le=LONGEST_S, description="a producer keeps finished pages this long unless decode renews"
    )
    connect_timeout_s: float = Field(5.0, gt=0, le=LONGEST_S, description="connect and handshake with a peer")
    peer_timeout_s: float = Field(
        15.0, gt=0, le=LONGEST_S, description="a silent peer is given up after this time"
    )
    unmatched_timeout_s: float = Field(
        60.0, gt=0, le=LONGEST_S, description="a subscription waits this long for its prefill to arrive"
    )

    telemetry: bool = Field(
        True,
        description="count and time what moves, and let sage-kvt exporter and top of the same user read it",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="of this transport's log lines; json: one object a line on stderr, apart from the engine's",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector that gets a span of each hand-over, by OTLP over HTTP, such as "
        "http://127.0.0.1:4318; unset: none",
    )
    audit_file: Path | None = Field(
        None,
        description="while this file exists, append a SHA-256 of each transfer's pages, read back on this side (slow)",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(field.field_name)].annotation in _NUMBERS:
            raise PydanticCustomError("bool_is_no_number", "true and false are no numbers")
        return value

    # A field's own check says what is allowed; ``option_error`` makes the sentence around it.

    @field_validator("secret", "previous_secret", "host", "advertise_host")
    @classmethod
    def _not_empty(cls, value: SecretStr | str | None) -> SecretStr | str | None:
        if value is not None and not len(value):
            raise ValueError("text that is not empty; leave the option out for none")
        return value

    @field_validator("links", mode="before")
    @classmethod
    def _each_once(cls, value: object) -> object:
        value = tuple(value.split("+")) if isinstance(value, str) and value else value or ()
        if isinstance(value, (tuple, list)) and ("" in value or len(set(value)) < len(value)):
            raise ValueError("names of interfaces or addresses of this host, each once, joined by +")
        return value

    @field_validator("target_dtype", mode="before")
    @classmethod
    def _on_the_wire(cls, value: object) -> object:
        if value != "auto" and value not in WIRE_DTYPES:
            raise ValueError(f"auto, {', '.join(WIRE_DTYPES)}")
        return value

    @field_validator("backend", mode="before")
    @classmethod
    def _available(cls, value: object) -> object:
        if value != "auto" and value not in backend_names():
            raise ValueError(f"auto, {', '.join(backend_names())}")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        if value is None:
            return value
        if not _is_collector(value):
            raise ValueError("http://HOST:PORT or https://…, of a collector that takes OTLP over HTTP")
        if not _has_opentelemetry():
            raise ValueError("only with the OpenTelemetry SDK: pip install sage_kv_connector[otlp]")
        return value

    def resolved_secret(self) -> bytes:
        """The shared secret: config, environment, file; empty if none is set.

        Raises ValueError when a named file can't be read or is empty.
        """
        return _secret("secret_file", self.secret, SECRET_ENV, self.secret_file, SECRET_FILE_ENV)

    def given_secrets(self) -> dict[str, SecretStr]:
        """Those among the options, which ``model_dump`` hides: name → secret."""
        return {name: given for name in sorted(SECRET_FIELDS) if (given := getattr(self, name)) is not None}

    def resolved_secrets(self) -> tuple[bytes, ...]:
        """Those that are accepted, the one that is kept first; one that is empty if none is set.

        Raises ValueError as ``resolved_secret``, and for a previous secret without one that follows it.
        """
        name, given, file = "previous_secret_file", self.previous_secret, self.previous_secret_file
        previous = _secret(name, given, PREVIOUS_SECRET_ENV, file, PREVIOUS_SECRET_FILE_ENV)
        secret = self.resolved_secret()
        if previous and not secret:
            raise ValueError(
                f"previous_secret is set and secret is not; allowed: both, or secret (${SECRET_ENV}) alone"
            )
        return (secret, previous) if previous else (secret,)

    def resolved_security(self, secret: bytes) -> Security:
        """Of connections that cross a wire. Raises ValueError for protection without a secret to derive it from."""
        if self.security is None:
            return "authenticated" if secret else "none"
        if self.security != "none" and not secret:
            raise ValueError(
                f"security is {self.security!r}, which needs a shared secret: set secret, secret_file or ${SECRET_ENV} "
                "on every server; allowed without one: none"
            )
        return self.security

    @classmethod
    def load(cls, options: Mapping[str, Any] | None = None, origin: str = "given") -> KVTransportConfig:
        """From a mapping (``kv_connector_extra_config``, YAML); ``preset`` and ``config_file`` are layers below.

        ``origin``: where the mapping came from. Raises ValueError naming field, value, origin and what is allowed.
        """
        layers = layered(options or {}, origin)
        try:
            return cls.model_validate(layers.options)
        except ValidationError as error:
            refused = option_error(error, cls.model_json_schema(), layers.origins)
        raise refused  # outside, so that no traceback shows pydantic's own text with the values

    @classmethod
    def from_file(cls, path: Path) -> KVTransportConfig:
        """From ``kv_transport.yaml`` or ``config.yaml``. Raises ValueError naming file, field and value."""
        return cls.load(read_options(path), str(path))

    def to_file(self, path: Path) -> None:
        """Write the options that were set, for ``from_file``; a ``config.yaml`` keeps its other sections.

        Raises ValueError for a secret, and for a file that can't be written.
        """
        # What stands over the preset is written even where it is the default: it overrides the preset.
        over = presets()[self.preset]["settings"] if self.preset in presets() else {}
        wanted = (self.model_fields_set | set(over)) - {"config_file"}
        write_options(path, self.model_dump(include=wanted))

    @classmethod
    def from_words(cls, words: Iterable[str], origin: str = "given") -> KVTransportConfig:
        """From ``key=value`` words; values are read as YAML, dashes in keys as underscores. Raises as ``load``."""
        return cls.load(options_of_words(words, origin), origin)
