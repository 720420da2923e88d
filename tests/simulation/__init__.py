# SPDX-License-Identifier: Apache-2.0
"""The real engine over a virtual clock and a lying network, by seed.

::

    schedule.py   what happens: servers, requests, faults, drawn from a seed; may be shrunk
    world.py      runs one: picks what moves next, lets time pass, looks whether all is over
    server.py     one engine with its pages; a freed page is scribbled over, and must stay so
    prefill.py    requests on a prefill server   decode.py   loads on a decode server
    faults.py     links cut, servers killed, stopped and restarted, a hostile peer
    verdict.py    what must hold afterwards
    stepped.py    loop, backend, clock: nothing has a thread; csrc/ is the wire
    planted.py    faults in the engine that a run must find

Sessions, producer, consumer, streams and conversions are the engine's own, connections, windows, posts, cursors and
part streams the data plane's. Simulated are the wire, the clock, and the inference engines.
"""
