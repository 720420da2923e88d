# SPDX-License-Identifier: Apache-2.0
"""Faults that users of KV transfer report, tried on real vLLM servers. Decode computes what it does not get."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from integration_tests.cluster import new_prompt
from integration_tests.fault_servers import PATIENCE_S, TIMES, Found, Silent, Told, hashes_by_side
from integration_tests.fault_vllm import VllmServers
from integration_tests.leaving_client import leaving
from sage_kv_connector.launch.vllm import complete

#: Without a request, until a firewall has forgotten the connection.
IDLE_S = 5.0
#: Of the bytes of a long prompt, when a link breaks.
MIDDLE = 1_000_000


def judged(servers: VllmServers, prompt: list[int], answer: Told, note: str = "") -> Found:
    return Found(answer.client, servers.is_right(prompt, answer), answer.seconds, note)


def unknown_reference(servers: VllmServers) -> Found:
    prompt = new_prompt(600)
    params = {**servers.prefilled(prompt), "transfer_id": f"nobody-{random.getrandbits(64):x}"}
    return judged(servers, prompt, servers.decoded(prompt, params))


def ids_out_of_range(servers: VllmServers) -> Found:
    """Requests of ours name no blocks, so the prompt asks for more of them than prefill has."""
    prompt = new_prompt(900)
    params = servers.prefilled(prompt[:300])
    params |= {"remote_block_ids": [[10**9, -1]], "remote_prompt": None}
    return judged(servers, prompt, servers.decoded(prompt, params))


def consumed_reference(servers: VllmServers) -> Found:
    prompt = new_prompt(600)
    params = servers.prefilled(prompt)
    first = servers.decoded(prompt, params)
    servers.forget_prompts()
    second = servers.decoded(prompt, params)
    return judged(servers, prompt, second if first.good else first)


def stale_reference(servers: VllmServers) -> Found:
    prompt = new_prompt(600)
    params = servers.prefilled(prompt)
    first = servers.decoded(prompt, params)
    for _ in range(8):  # in every page of the pool
        complete(servers.prefill.url, new_prompt(3900), max_tokens=1)
    servers.forget_prompts()
    second = servers.decoded(prompt, params)
    return judged(servers, prompt, second if first.good else first)


def lease_expired(servers: VllmServers) -> Found:
    prompt = new_prompt(600)
    params = servers.prefilled(prompt)
    time.sleep(TIMES["lease_s"] + 2)
    return judged(servers, prompt, servers.decoded(prompt, params))


def dead_link(servers: VllmServers) -> Found:
    """A firewall forgot the connection; both ends believe in it."""
    servers.decoded(warm := new_prompt(300), servers.prefilled(warm))
    servers.moved()
    for proxy in servers.proxies:
        proxy.forget()
    time.sleep(IDLE_S)
    prompt = new_prompt(600)
    answer = servers.decoded(prompt, servers.prefilled(prompt))
    moved = "KV moved" if servers.moved() else "recomputed"
    found = judged(servers, prompt, answer, f"{moved}, wanted: redialled in 2 s")
    return found._replace(right=found.right and answer.seconds < 2 and moved == "KV moved")


def many_on_short_leases(servers: VllmServers) -> Found:
    servers.moved()
    prompts = [new_prompt(random.randint(100, 500)) for _ in range(42)]
    with ThreadPoolExecutor(42) as pool:
        answers = list(pool.map(lambda prompt: servers.decoded(prompt, servers.prefilled(prompt)), prompts))
    moved = len(servers.moved()) // 2
    wrong = [one for prompt, one in zip(prompts, answers, strict=True) if not servers.is_right(prompt, one)]
    worst = max(answers, key=lambda one: one.seconds)
    return Found(wrong[0].client if wrong else "42 × 200", not wrong, worst.seconds, f"KV of {moved} moved")


def partial_hit(servers: VllmServers) -> Found:
    """Decode has the first half of the prompt; both are asked at once."""
    head, tail = new_prompt(512), new_prompt(500)
    servers.decoded(head)
    with servers.both_asked(head + tail) as params:
        answer = servers.decoded(head + tail, params)
    return judged(servers, head + tail, answer)


def decode_aborts(servers: VllmServers) -> Found:
    """Decode's client hangs up while bytes cross; the same prompt is asked again."""
    prompt = new_prompt(3000)
    servers.proxies[0].hold_at(MIDDLE)
    with servers.both_asked(prompt) as params:
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": 8,
            "stream": True,
            "kv_transfer_params": params,
        }
        with leaving(servers.decode, "/v1/completions", body, PATIENCE_S):
            held = servers.proxies[0].held.wait(20)
        time.sleep(1)
        servers.proxies[0].let_go()
    servers.forget_prompts()
    answer = servers.decoded(prompt, servers.prefilled(prompt))
    return judged(servers, prompt, answer, "" if held else "it had ended before")


def unpostable(servers: VllmServers) -> Found:
    """Decode waits for the pages; the connection is gone when prefill has them."""
    prompt = new_prompt(3000)
    servers.proxies[0].hold_at(0)
    with ThreadPoolExecutor(1) as pool, servers.both_asked(prompt) as params:
        answer = pool.submit(servers.decoded, prompt, params)
        time.sleep(0.3)
        servers.proxies[0].cut()
    return judged(servers, prompt, answer.result())


def head_of_line(servers: VllmServers) -> Found:
    """One request names a peer that never answers its handshake; another one beside it is asked for its time."""
    dead = Silent()
    slow, prompt = new_prompt(300), new_prompt(600)
    to_nobody = servers.prefilled(slow)
    to_nobody |= {"remote_ranks": {"0": [f"tcp://127.0.0.1:{dead.port}"]}, "remote_engine_id": "dead"}
    params = servers.prefilled(prompt)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(servers.decoded, slow, to_nobody)
        time.sleep(0.5)
        answer = servers.decoded(prompt, params)
        beside = other.result()
    dead.close()
    found = judged(
        servers, prompt, answer, f"the one to the dead peer: {beside.client} after {beside.seconds:.1f} s"
    )
    return found._replace(right=found.right and servers.is_right(slow, beside) and answer.seconds < 2)


def rejected_load(servers: VllmServers) -> Found:
    prompt = new_prompt(600)
    params = servers.prefilled(new_prompt(600))
    answer = servers.decoded(prompt, params)
    return judged(servers, prompt, answer, "the second model runner needs Triton for CPUs: not run")


def flipped_byte(servers: VllmServers) -> Found:
    prompt = new_prompt(3000)
    params = servers.prefilled(prompt)
    servers.proxies[0].flip_byte_at(MIDDLE)
    answer = servers.decoded(prompt, params)
    return judged(servers, prompt, answer, "" if servers.proxies[0].flipped else "no byte was flipped")


def prefill_killed(servers: VllmServers) -> Found:
    prompt = new_prompt(3000)
    params = servers.prefilled(prompt)
    servers.proxies[0].hold_at(MIDDLE)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(servers.decoded, prompt, params)
        held = servers.proxies[0].held.wait(20)
        servers.prefill.stop(9)
        servers.proxies[0].cut()
        result = answer.result()
    found = judged(servers, prompt, result, "" if held else "it had ended before")
    servers.prefill.start()
    servers.prefill.wait_until_healthy()
    again = new_prompt(600)
    after = judged(servers, again, servers.decoded(again, servers.prefilled(again)))
    return found._replace(right=found.right and after.right)


def client_gone(servers: VllmServers) -> Found:
    """Prefill answered, and nobody asks decode; later somebody else has the same prompt."""
    prompt = new_prompt(600)
    servers.prefilled(prompt)
    time.sleep(TIMES["lease_s"] + 1)
    return judged(servers, prompt, servers.decoded(prompt, servers.prefilled(prompt)))


def concurrent_writes(servers: VllmServers) -> Found:
    servers.moved()
    prompts = [new_prompt(800) for _ in range(8)]
    params = [servers.prefilled(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(servers.decoded, prompts, params))
    hashes = hashes_by_side(servers.moved())
    equal = hashes["producer"] == hashes["consumer"]
    right = all(servers.is_right(prompt, one) for prompt, one in zip(prompts, answers, strict=True))
    note = f"{len(hashes['consumer'])} transfers, hashes {'equal' if equal else 'DIFFER'}"
    return Found(f"8 × {answers[0].client}", right and equal, max(one.seconds for one in answers), note)


def failed_groups(servers: VllmServers) -> Found:
    """Of a model with a sliding window: one byte of one group arrives wrong, pages of all groups are computed."""
    return flipped_byte(servers)


def blip(servers: VllmServers) -> Found:
    """One rank's connection breaks in the middle; the next request finds both ranks again."""
    prompt = new_prompt(3000)
    params = servers.prefilled(prompt)
    servers.proxies[1].hold_at(MIDDLE // 4)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(servers.decoded, prompt, params)
        held = servers.proxies[1].held.wait(20)
        servers.proxies[1].cut()
        result = answer.result()
    found = judged(servers, prompt, result, "" if held else "it had ended before")
    again = new_prompt(600)
    servers.moved()
    after = judged(servers, again, servers.decoded(again, servers.prefilled(again)))
    return found._replace(right=found.right and after.right and bool(servers.moved()))


Fault = Callable[[VllmServers], Found]
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
ON_TWO_GROUPS: dict[str, Fault] = {"failed pages of several cache groups": failed_groups}
