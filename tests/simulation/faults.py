# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a run, and a peer that means harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage_kv_connector.contract.failure import Reason
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from tests.simulation.hostile import hostile_bytes
from tests.simulation.schedule import Fault

if TYPE_CHECKING:
    from tests.simulation.server import Server
    from tests.simulation.world import World

#: Nothing waits longer than a day.
JUMP_S = 100.0
MESSAGES = 12
#: Turns of a flood, and messages of each.
FLOODS, POURED = 4, 40


def begin_fault(world: World, fault: Fault) -> None:
    server = world.server(fault.server)
    now = world.clock.ns
    until = now + int(fault.for_s * 1e9)
    host = server.host
    match fault.kind:
        case "cut" | "cut_silently":
            world.wire.cut(host=host, silently=fault.kind == "cut_silently")
        case "kill":
            server.kill()
        case "kill_silently":
            world.wire.cut(host=host, silently=True)
            world.wire.silence(host=host, on=True)
            server.kill()
        case "restart":
            server.kill()
            world.restart(fault.server)
        case "die":
            server.die()
        case "stop":
            server.stop()
        case "freeze":
            server.stopped_until = until
            world.lose(server, fault.for_s)
        case "busy":
            server.busy_until = until
            world.lose(server, fault.for_s)
        case "jump":
            world.clock.advance_to(now + int(JUMP_S * 1e9))
            for other in world.servers:
                world.lose(other, JUMP_S)
        case "slow":
            world.latency(fault.for_s / 10)
            world.after(fault.for_s, world.latency, world.schedule.options.longest_s)
        case "unreachable":
            world.wire.silence(host=host, on=True)
            world.after(fault.for_s, _reachable, world, host)
        case "hostile":
            _hostile(world, server)
        case "flood":
            _flood(world, server)
        case "noise":
            _noise(world, server)


def _reachable(world: World, host: str) -> None:
    world.wire.silence(host=host, on=False)


def _hostile(world: World, victim: Server) -> None:
    """A peer that knows the secret, and says what it likes."""
    evil = world.start(world.schedule.prefills)

    def opened(session: Session | Reason) -> None:
        if isinstance(session, Session):
            for number in range(MESSAGES):
                world.after(number * 0.001, _say, world, evil, session)

    evil.core.sessions.get(victim.address, opened)
    world.after(5.0, evil.kill)


def _say(world: World, evil: Server, session: Session) -> None:
    if evil.alive:
        session.backend.send(session.connection, hostile_bytes(world.rng))


def _flood(world: World, victim: Server) -> None:
    """A peer that asks for more than anybody may have, as fast as it can."""
    evil = world.start(world.schedule.prefills)

    def opened(session: Session | Reason) -> None:
        if isinstance(session, Session):
            for number in range(FLOODS):
                world.after(number * 0.001, _pour, world, evil, session, number)

    evil.core.sessions.get(victim.address, opened)
    world.after(5.0, evil.kill)


def _pour(world: World, evil: Server, session: Session, number: int) -> None:
    if not evil.alive:
        return
    for i in range(POURED):
        name, generation = f"flood-{number}-{i}", 1 + number * POURED + i
        message: m.Message = m.Release(name)
        if i % 2:
            message = m.Subscribe(
                name, generation, bytes(24), 4096, (m.PageRuns(0, ((0, 1),)),), True, False, 60_000
            )
        session.backend.send(session.connection, m.encode(message))


def _noise(world: World, victim: Server) -> None:
    """A connection without a handshake."""
    evil = world.start(world.schedule.prefills)
    backend = evil.core.backends["stepped"]
    connection = backend.connect(victim.address.addresses[0], 1.0)
    for number in range(MESSAGES):
        world.after(number * 0.01, _shout, world, evil, connection)
    world.after(5.0, evil.kill)


def _shout(world: World, evil: Server, connection: int) -> None:
    if evil.alive:
        evil.core.backends["stepped"].send(connection, hostile_bytes(world.rng))
