# SPDX-License-Identifier: Apache-2.0
"""The faults of ``fault_rows`` on real SGLang servers. Decode can't compute a prompt there: it says why, and lives.

Runs in SGLang's own environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from integration_tests.fault_servers import PATIENCE_S, TIMES, Found, Silent, Told, hashes_by_side
from integration_tests.fault_sglang import SglangServers, say_version
from integration_tests.leaving_client import leaving
from integration_tests.request_sglang import prompt_of
from sage_kv_connector.launch.sglang import room_at

#: Without a request, until a firewall has forgotten the connection.
IDLE_S = 5.0
#: Of the bytes of a long prompt, when a link breaks.
MIDDLE = 100_000
#: Tokens of a prompt whose bytes take more than one chunk.
LONG = 1024


def refused(servers: SglangServers, prompt: list[int], answer: Told, note: str = "") -> Found:
    return Found(answer.client, servers.is_refused_well(prompt, answer), answer.seconds, note)


def unknown_reference(servers: SglangServers) -> Found:
    prompt = prompt_of(500)
    return refused(servers, prompt, servers.asked(servers.decode, prompt, servers.room()))


def ids_out_of_range(servers: SglangServers) -> Found:
    """Rooms name no blocks, so the prompt asks for more of them than prefill has."""
    prompt, room = prompt_of(700), servers.room()
    with servers.prefilling(prompt[:300], room):
        answer = servers.asked(servers.decode, prompt, room)
    return refused(servers, prompt, answer)


def consumed_reference(servers: SglangServers) -> Found:
    prompt, room = prompt_of(500), servers.room()
    first = servers.handed_over(prompt, room)
    servers.forget_prompts()
    answer = servers.asked(servers.decode, prompt, room)
    return refused(servers, prompt, answer if first.good else first)


def stale_reference(servers: SglangServers) -> Found:
    prompt, room = prompt_of(500), servers.room()
    first = servers.handed_over(prompt, room)
    servers.forget_prompts()
    for _ in range(10):  # in every page of the pool
        servers.handed_over(prompt_of(1900))
    servers.forget_prompts()
    answer = servers.asked(servers.decode, prompt, room)
    return refused(servers, prompt, answer if first.good else first)


def lease_expired(servers: SglangServers) -> Found:
    prompt, room = prompt_of(500), servers.room()
    with servers.prefilling(prompt, room):
        time.sleep(TIMES["lease_s"] + 4)
        answer = servers.asked(servers.decode, prompt, room)
    return refused(servers, prompt, answer)


def dead_link(servers: SglangServers) -> Found:
    """A firewall forgot the connection; both ends believe in it."""
    servers.handed_over(prompt_of(300))
    for proxy in servers.proxies:
        proxy.forget()
    time.sleep(IDLE_S)
    prompt = prompt_of(500)
    answer = servers.handed_over(prompt)
    found = refused(servers, prompt, answer, "wanted: redialled in 2 s")
    return found._replace(right=found.right and answer.good and answer.seconds < 2)


def many_on_short_leases(servers: SglangServers) -> Found:
    servers.moved()
    prompts = [prompt_of(200 + 10 * n) for n in range(42)]
    with ThreadPoolExecutor(42) as pool:
        answers = list(pool.map(servers.handed_over, prompts))
    moved = len(servers.moved()) // 2
    wrong = [one for prompt, one in zip(prompts, answers, strict=True) if not servers.is_right(prompt, one)]
    worst = max(answers, key=lambda one: one.seconds)
    client = wrong[0].client if wrong else "42 × 200"
    return Found(client, not wrong, worst.seconds, f"KV of {moved} moved")


def partial_hit(servers: SglangServers) -> Found:
    whole = prompt_of(1000)
    servers.handed_over(whole[:512])
    answer = servers.handed_over(whole)
    return Found(answer.client, servers.is_right(whole, answer), answer.seconds)


def decode_aborts(servers: SglangServers) -> Found:
    """Decode's client hangs up while bytes cross; the same prompt is asked again."""
    prompt, room = prompt_of(LONG), servers.room()
    servers.proxies[0].hold_at(MIDDLE)
    with servers.prefilling(prompt, room):
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "stream": True, **room}
        with leaving(servers.decode, "/generate", body, PATIENCE_S):
            held = servers.proxies[0].held.wait(20)
        time.sleep(1)
        servers.proxies[0].let_go()
    answer = servers.handed_over(prompt)
    note = "" if held else "it had ended before"
    return Found(answer.client, servers.is_right(prompt, answer), answer.seconds, note)


def unpostable(servers: SglangServers) -> Found:
    """Decode waits for the pages; the connection is gone when prefill has them."""
    prompt, room = prompt_of(LONG), servers.room()
    servers.proxies[0].hold_at(0)
    with ThreadPoolExecutor(1) as pool, servers.prefilling(prompt, room):
        answer = pool.submit(servers.asked, servers.decode, prompt, room)
        time.sleep(0.3)
        servers.proxies[0].cut()
    return refused(servers, prompt, answer.result())


def head_of_line(servers: SglangServers) -> Found:
    """One request names a bootstrap server that never answers; another one beside it is asked for its time."""
    dead = Silent()
    prompt = prompt_of(500)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(servers.asked, servers.decode, prompt_of(300), room_at(dead.port))
        time.sleep(0.5)
        answer = servers.handed_over(prompt)
        beside = other.result()
    dead.close()
    note = f"the one to the dead peer: {beside.client[:60]} after {beside.seconds:.1f} s"
    right = servers.is_right(prompt, answer) and answer.seconds < 2 and beside.client != "hung"
    return Found(answer.client, right, answer.seconds, note)


def rejected_load(servers: SglangServers) -> Found:
    """Prefill has other weights. SGLang has nothing that would compute instead."""
    prompt = prompt_of(500)
    say_version(servers.prefill, "7")
    answer = servers.handed_over(prompt)
    say_version(servers.prefill, "default")
    note = "refused for its weights; prompts are not compared on SGLang (docs/requests.md)"
    return refused(servers, prompt, answer, note)


def client_gone(servers: SglangServers) -> Found:
    """Prefill is asked, and nobody asks decode; later somebody else has the same prompt."""
    prompt = prompt_of(500)
    alone = servers.asked(servers.prefill, prompt, servers.room())
    answer = servers.handed_over(prompt)
    note = f"prefill's client: {alone.client[:60]} after {alone.seconds:.1f} s"
    right = servers.is_right(prompt, answer) and alone.client != "hung"
    return Found(answer.client, right, answer.seconds, note)


def concurrent_writes(servers: SglangServers) -> Found:
    servers.moved()
    prompts = [prompt_of(700) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(servers.handed_over, prompts))
    hashes = hashes_by_side(servers.moved())
    equal = hashes["producer"] == hashes["consumer"] and len(hashes["producer"]) >= 8
    right = all(servers.is_right(prompt, one) for prompt, one in zip(prompts, answers, strict=True))
    note = f"{len(hashes['consumer'])} transfers, hashes {'equal' if equal else 'DIFFER'}"
    return Found(f"8 × {answers[0].client}", right and equal, max(one.seconds for one in answers), note)


def flipped_byte(servers: SglangServers) -> Found:
    prompt = prompt_of(LONG)
    servers.proxies[0].flip_byte_at(MIDDLE)
    answer = servers.handed_over(prompt)
    return refused(servers, prompt, answer, "" if servers.proxies[0].flipped else "no byte was flipped")


def prefill_killed(servers: SglangServers) -> Found:
    prompt, room = prompt_of(LONG), servers.room()
    servers.proxies[0].hold_at(MIDDLE)
    with ThreadPoolExecutor(1) as pool, servers.prefilling(prompt, room):
        answer = pool.submit(servers.asked, servers.decode, prompt, room)
        held = servers.proxies[0].held.wait(20)
        servers.prefill.stop(9)
        servers.proxies[0].cut()
        result = answer.result()
    servers.prefill.start()
    servers.prefill.wait_until_healthy()
    return refused(servers, prompt, result, "" if held else "it had ended before")


def blip(servers: SglangServers) -> Found:
    """One rank's connection breaks in the middle; the next request finds both ranks again."""
    prompt, room = prompt_of(LONG), servers.room()
    servers.proxies[1].hold_at(MIDDLE // 2)
    with ThreadPoolExecutor(1) as pool, servers.prefilling(prompt, room):
        answer = pool.submit(servers.asked, servers.decode, prompt, room)
        held = servers.proxies[1].held.wait(20)
        servers.proxies[1].cut()
        result = answer.result()
    return refused(servers, prompt, result, "" if held else "it had ended before")


Fault = Callable[[SglangServers], Found]
ON_ONE_RANK: dict[str, Fault] = {
    "unknown reference": unknown_reference,
    "block ids out of range": ids_out_of_range,
    "consumed reference used again at once": consumed_reference,
    "stale reference after the pages were used again": stale_reference,
    "lease expired": lease_expired,
    "link dies after hours": dead_link,
    "42 requests under load on short leases": many_on_short_leases,
    "partial prefix hit in push": partial_hit,
    "decode aborts after push began": decode_aborts,
    "a write that cannot be posted": unpostable,
    "head-of-line handshake with a dead peer": head_of_line,
    "recompute after a rejected load": rejected_load,
    "client gone between prefill's end and decode's start": client_gone,
    "concurrent writes": concurrent_writes,
    "a flipped byte": flipped_byte,
    "prefill process deleted in mid-transfer": prefill_killed,
}
ON_TWO_RANKS: dict[str, Fault] = {"network blip with tensor parallelism": blip}
