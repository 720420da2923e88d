# SPDX-License-Identifier: Apache-2.0
"""How ranks learn where the others are: each tells rank 0, rank 0 tells all, once.

Every record is u32 length, JSON; rank 0 answers when all ranks have come. With a shared secret each
record carries an HMAC, and an answer holds the nonce of its question. Nothing here is trusted
further: whoever answers at an address must prove the secret again (docs/protocol.md, handshake).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time

import msgspec

from sage_kv_connector.config import SECRET_ENV
from sage_kv_connector.contract.chunk import DeviceSpec
from sage_kv_connector.contract.peer import is_loopback

MAX_RECORD = 1 << 20
#: One record must come within this time once its connection is there.
RECORD_TIMEOUT_S = 10.0
_LENGTH = struct.Struct("<I")


class RendezvousError(RuntimeError):
    """Not all ranks came together; the text says who is missing or what was wrong."""


class _Here(msgspec.Struct, forbid_unknown_fields=True):
    rank: int
    world_size: int
    spec: DeviceSpec
    nonce: str


class _Everybody(msgspec.Struct, forbid_unknown_fields=True):
    nonce: str
    table: dict[int, DeviceSpec]
    refused: str = ""


class _Signed(msgspec.Struct, forbid_unknown_fields=True):
    body: str
    proof: str = ""


def meet(
    rank: int, world_size: int, address: str, port: int, spec: DeviceSpec, secret: bytes, timeout_s: float
) -> dict[int, DeviceSpec]:
    """Where every rank is; returns on all ranks when the last one has come.

    Raises RendezvousError after ``timeout_s``, ValueError for ranks out of range and for an ``address``
    that others reach while there is no secret, OSError when rank 0 can't listen on it.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; allowed with world_size {world_size}: 0 to {world_size - 1}")
    if not secret and not is_loopback(address):
        raise ValueError(
            f"master_addr {address!r} is reachable from other machines, so a shared secret is needed: "
            f"set secret, secret_file or ${SECRET_ENV} for every rank (or master_addr 127.0.0.1)"
        )
    if world_size == 1:
        return {0: spec}
    until = time.monotonic() + timeout_s
    if rank == 0:
        return _host(world_size, address, port, spec, secret, until)
    return _visit(_Here(rank, world_size, spec, secrets.token_hex(16)), address, port, secret, until)


def _host(
    world_size: int, address: str, port: int, spec: DeviceSpec, secret: bytes, until: float
) -> dict[int, DeviceSpec]:
    table = {0: spec}
    waiting: list[tuple[socket.socket, _Here]] = []
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((address, port), family=family, backlog=world_size) as listener:
        try:
            while len(table) < world_size:
                missing = ", ".join(str(one) for one in range(world_size) if one not in table)
                listener.settimeout(_left(until, f"these ranks did not come: {missing}"))
                try:
                    visitor, _ = listener.accept()
                except TimeoutError:
                    continue
                here = _admit(visitor, world_size, table, secret, until)
                if here is None:
                    visitor.close()
                else:
                    table[here.rank] = here.spec
                    waiting.append((visitor, here))
            for visitor, here in waiting:
                _send(visitor, msgspec.json.encode(_Everybody(here.nonce, table)), secret)
        finally:
            for visitor, _here in waiting:
                visitor.close()
    return table


def _admit(
    visitor: socket.socket, world_size: int, table: dict[int, DeviceSpec], secret: bytes, until: float
) -> _Here | None:
    """Who came; None if that is no rank of ours. It is told why, and may come again."""
    visitor.settimeout(min(RECORD_TIMEOUT_S, max(0.01, until - time.monotonic())))
    try:
        here = msgspec.json.decode(_receive(visitor, secret), type=_Here)
        refused = ""
        if here.world_size != world_size:
            refused = f"world_size is {here.world_size} at rank {here.rank}, {world_size} at rank 0"
        elif not 0 < here.rank < world_size or here.rank in table:
            refused = f"rank {here.rank} is taken or out of range; still free: " + ", ".join(
                str(one) for one in range(world_size) if one not in table
            )
        if not refused:
            return here
        _send(visitor, msgspec.json.encode(_Everybody(here.nonce, {}, refused)), secret)
    except (OSError, msgspec.MsgspecError, RendezvousError):
        pass  # a stranger: port scanners and wrong secrets must not end the meeting
    return None


def _visit(here: _Here, address: str, port: int, secret: bytes, until: float) -> dict[int, DeviceSpec]:
    where = f"{address}:{port}"
    why = ""
    while True:
        left = _left(until, f"rank 0 did not answer at {where}{why}")
        try:
            with socket.create_connection((address, port), timeout=min(left, 5.0)) as host:
                _send(host, msgspec.json.encode(here), secret)
                host.settimeout(_left(until, f"the meeting at {where} took too long"))
                answer = msgspec.json.decode(_receive(host, secret), type=_Everybody)
        except (OSError, msgspec.MsgspecError) as error:
            why = f": {error}"
            time.sleep(0.05)
            continue
        if answer.nonce != here.nonce:
            raise RendezvousError(f"the answer from {where} is to another question")
        if answer.refused:
            raise RendezvousError(f"rank 0 at {where} refused: {answer.refused}")
        return answer.table


def _left(until: float, why: str) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise RendezvousError(why)
    return left


def _send(peer: socket.socket, body: bytes, secret: bytes) -> None:
    record = msgspec.json.encode(_Signed(body.decode(), _proof(body, secret)))
    peer.sendall(_LENGTH.pack(len(record)) + record)


def _receive(peer: socket.socket, secret: bytes) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(peer, _LENGTH.size))
    if length > MAX_RECORD:
        raise RendezvousError(f"a record of {length} bytes; allowed: up to {MAX_RECORD}")
    signed = msgspec.json.decode(_exactly(peer, length), type=_Signed)
    body = signed.body.encode()
    if not hmac.compare_digest(signed.proof, _proof(body, secret)):
        raise RendezvousError("the other rank has another secret")
    return body


def _proof(body: bytes, secret: bytes) -> str:
    return hmac.new(secret, b"sage-kvt-ranks/1 " + body, hashlib.sha256).hexdigest()


def _exactly(peer: socket.socket, count: int) -> bytes:
    """Raises OSError when the peer closes before ``count`` bytes came (a wrong secret ends so, too)."""
    got = bytearray()
    while len(got) < count:
        more = peer.recv(min(65536, count - len(got)))
        if not more:
            raise OSError("the connection was closed (are the secrets the same?)")
        got += more
    return bytes(got)
