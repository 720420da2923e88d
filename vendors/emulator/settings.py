# SPDX-License-Identifier: Apache-2.0
"""What can be set about an emulated machine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Copy engines in the order of the C++ enum Direction.
DIRECTIONS = ("h2d", "d2h", "d2d", "peer")
DirectionName = Literal["h2d", "d2h", "d2d", "peer"]


class EmulatorSettings(BaseModel):
    """A node of equal devices. GB are 10⁹ bytes; a rate of 0 is as fast as memcpy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: int = Field(2, ge=0, le=64)
    memory_bytes: int = Field(256 << 20, ge=1, description="of each device; taken from the host when written")
    dma_alignment_bytes: int = Field(1, ge=1, description="of both addresses and of the length of a copy")
    max_transfer_bytes: int = Field(0, ge=0, description="of one copy; 0 is any")
    h2d_gbytes_per_s: float = Field(0, ge=0)
    d2h_gbytes_per_s: float = Field(0, ge=0)
    d2d_gbytes_per_s: float = Field(0, ge=0, description="inside a device")
    peer_gbytes_per_s: float = Field(0, ge=0, description="between devices")
    latency_us: float = Field(0, ge=0, description="of each call that copies, once for a batch")
    pinned_only: bool = Field(False, description="refuse pageable host memory, instead of copying at once")
    peer_access: bool | tuple[tuple[bool, ...], ...] = Field(
        True, description="all devices reach each other, or a row a device"
    )
    ipc: bool = True
    virtual_memory: bool = Field(
        False, description="what is allocated meanwhile is mapped from a pool, which has no IPC handles"
    )
    held: frozenset[DirectionName] = Field(frozenset(), description="engines that stand still")
    out_of_memory_after_bytes: int | None = Field(None, ge=0, description="allocated on a device in all")
    dma_error_after_copies: int | None = Field(None, ge=0, description="the copy after so many fails halfway")
    device_lost_after_copies: int | None = Field(
        None, ge=0, description="the next copy after so many takes its device away"
    )

    @model_validator(mode="after")
    def _square(self) -> EmulatorSettings:
        if not isinstance(self.peer_access, bool) and (
            len(self.peer_access) != self.devices or any(len(row) != self.devices for row in self.peer_access)
        ):
            raise ValueError(
                f"peer_access must be true, false or {self.devices} rows of {self.devices}, one for each device"
            )
        return self

    def text(self) -> str:
        """The lines that ``sage_emulator_configure`` reads."""
        lines = {name: getattr(self, name) for name in type(self).model_fields}
        every = range(self.devices)
        rows = (
            [[self.peer_access] * self.devices for _ in every]
            if isinstance(self.peer_access, bool)
            else self.peer_access
        )
        lines["peer_access"] = ";".join("".join("1" if cell else "0" for cell in row) for row in rows)
        lines["held"] = sum(1 << DIRECTIONS.index(name) for name in self.held)
        return "".join(f"{name}={_shown(value)}\n" for name, value in lines.items())


def _shown(value: object) -> str:
    if value is None:
        return "-1"
    return str(int(value)) if isinstance(value, bool) else str(value)
