# SPDX-License-Identifier: Apache-2.0
"""Spans of a file that the OpenTelemetry collector's file exporter wrote: OTLP as JSON, one object a line."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

#: The code of a status that says that a span failed.
ERROR = (2, "STATUS_CODE_ERROR")


class Value(msgspec.Struct, rename="camel"):
    string_value: str | None = None
    int_value: int | None = None
    double_value: float | None = None
    bool_value: bool | None = None
    array_value: Any = None
    kvlist_value: Any = None
    bytes_value: str | None = None

    def __str__(self) -> str:
        return next((str(one) for one in msgspec.structs.astuple(self) if one is not None), "")


class Attribute(msgspec.Struct):
    key: str
    value: Value = msgspec.field(default_factory=Value)


class SpanEvent(msgspec.Struct, rename="camel"):
    time_unix_nano: int
    name: str = ""
    attributes: list[Attribute] = []


class Status(msgspec.Struct):
    code: int | str = 0
    message: str = ""


class OtlpSpan(msgspec.Struct, rename="camel"):
    trace_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{32}$")]
    span_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{16}$")]
    start_time_unix_nano: Annotated[int, msgspec.Meta(ge=0)]
    end_time_unix_nano: Annotated[int, msgspec.Meta(ge=0)]
    name: str = ""
    parent_span_id: str = ""
    attributes: list[Attribute] = []
    events: list[SpanEvent] = []
    status: Status = msgspec.field(default_factory=Status)

    @property
    def failed(self) -> bool:
        return self.status.code in ERROR

    @property
    def named(self) -> dict[str, str]:
        """Attributes as text."""
        return {one.key: str(one.value) for one in self.attributes}


class _Scope(msgspec.Struct, rename="camel"):
    spans: list[OtlpSpan] = []


class _Resource(msgspec.Struct):
    attributes: list[Attribute] = []


class _ResourceSpans(msgspec.Struct, rename="camel"):
    resource: _Resource = msgspec.field(default_factory=_Resource)
    scope_spans: list[_Scope] = []


class _Exported(msgspec.Struct, rename="camel"):
    resource_spans: list[_ResourceSpans]


def spans_of(data: bytes) -> list[tuple[str, OtlpSpan]]:
    """The spans of one exported object, each with its ``service.name``. Raises ValueError naming the field."""
    try:
        exported = msgspec.json.decode(data, type=_Exported, strict=False)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    found = []
    for number, resource in enumerate(exported.resource_spans):
        names = {one.key: str(one.value) for one in resource.resource.attributes}
        for at, scope in enumerate(resource.scope_spans):
            for index, span in enumerate(scope.spans):
                if span.end_time_unix_nano < span.start_time_unix_nano:
                    raise ValueError(
                        f"resourceSpans[{number}].scopeSpans[{at}].spans[{index}].endTimeUnixNano is "
                        f"{span.end_time_unix_nano}, must be at least startTimeUnixNano {span.start_time_unix_nano}"
                    )
                found.append((names.get("service.name", ""), span))
    return found
