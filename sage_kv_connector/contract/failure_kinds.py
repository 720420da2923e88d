# SPDX-License-Identifier: Apache-2.0
"""What each failure code means, what causes it and what to do: one table for ``explain``, docs and metrics.

``SYMPTOMS`` are what an operator sees; each code belongs to one.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sage_kv_connector.contract.failure import Code, Stage


class Symptom(Enum):
    """What is seen from outside, in the order in which docs tell of it."""

    NOTHING = "Nothing is handed over: decode computes every prompt itself"
    RESTART = "Hand-over fails for a while after a restart, an update or a resize"
    SOME = "Some prompts are computed by decode"
    LOAD = "Hand-over fails under load, or after a wait"
    DATA = "Bytes do not arrive, or not as they were sent"
    QUIET = "A line in the log, and nothing is wrong"


class FailureKind(NamedTuple):
    """``stage``: where it happens, unless the transfer itself knows better.

    ``aborted``: somebody wanted it so; where the transfer was wanted no more, that is no failure.
    """

    code: Code
    symptom: Symptom
    stage: Stage
    meaning: str
    cause: str
    remedy: str
    aborted: bool = False


_KINDS = (
    FailureKind(
        Code.BOOTSTRAP,
        Symptom.NOTHING,
        Stage.RESOLVE,
        "Decode could not learn from the bootstrap server which ranks prefill has.",
        "The address that the router or the client named is wrong or not open to decode, prefill has no "
        "bootstrap_port, it was restarted or is down, or another connector answers there.",
        "Set bootstrap_port on prefill, open it to decode, and try it: curl http://HOST:PORT/query.",
    ),
    FailureKind(
        Code.PARALLEL_SIZES,
        Symptom.NOTHING,
        Stage.RESOLVE,
        "The kv heads can't be divided over the ranks of both sides.",
        "A tensor parallel size neither divides the model's kv heads nor is a multiple of them, or decode has "
        "pipeline stages.",
        "Choose tensor parallel sizes that divide the number of kv heads; give decode one pipeline stage.",
    ),
    FailureKind(
        Code.UNREACHABLE,
        Symptom.NOTHING,
        Stage.CONNECT,
        "No address of the prefill rank answered.",
        "Prefill is down, a firewall is between, or it advertises an address that decode can't reach "
        "(host, advertise_host, port).",
        "Look at the address in the line. Set advertise_host to one that decode reaches, and open port to "
        "port + ranks - 1.",
    ),
    FailureKind(
        Code.BAD_SECRET,
        Symptom.NOTHING,
        Stage.CONNECT,
        "The two servers do not have the same secret.",
        "One of them was started with another secret, or with none.",
        "Start both with the same SAGE_KVT_SECRET, or the same secret_file. sage-kvt doctor says whether one is set.",
    ),
    FailureKind(
        Code.VERSION,
        Symptom.RESTART,
        Stage.CONNECT,
        "The two servers speak different versions of the protocol.",
        "One of them has another release of sage_kv_connector.",
        "Install the same release on both; sage-kvt version prints it.",
    ),
    FailureKind(
        Code.OTHER_ENGINE,
        Symptom.RESTART,
        Stage.CONNECT,
        "Another engine answers at the address of the one that was meant.",
        "Prefill was restarted after it answered, or two servers share a port.",
        "Nothing after a restart: the next request uses the new engine. Else give each server a port of its own.",
    ),
    FailureKind(
        Code.PROTOCOL,
        Symptom.NOTHING,
        Stage.CONNECT,
        "The peer sent what the protocol does not allow, and the session was ended.",
        "Something else listens at that port, a proxy changes the bytes, or one of the releases has a fault.",
        "Check that the port is sage_kvt's and that no proxy is between; report the line if both are.",
    ),
    FailureKind(
        Code.SCHEMA,
        Symptom.NOTHING,
        Stage.AGREE,
        "The two KV caches can't be mapped on each other; the line names each field that differs.",
        "Other model, layers, heads, dtype or page layout on the two sides.",
        "Serve the same model on both. What may differ, and is converted, stands in docs/vllm.md.",
    ),
    FailureKind(
        Code.WEIGHTS,
        Symptom.RESTART,
        Stage.AGREE,
        "The two servers have different weights, configs or quantizations.",
        "A rolling update reached one of them, or a path names another checkpoint.",
        "Serve the same checkpoint on both. same_weights=false compares shapes alone: only where you know better.",
    ),
    FailureKind(
        Code.PROMPT,
        Symptom.SOME,
        Stage.AGREE,
        "Prefill's KV is that of another prompt.",
        "One prompt's parameters were sent with another prompt; tokenizer, template or truncation differ; cache "
        "salt, LoRA adapter, images or embeddings differ.",
        "Send decode the very request that prefill answered, and start both with the same tokenizer and template.",
    ),
    FailureKind(
        Code.TOKENS,
        Symptom.SOME,
        Stage.AGREE,
        "Decode wants KV of more tokens than prefill has (or, of a recurrent state, of fewer).",
        "The prompt was truncated on one side only, or the two servers tokenize differently.",
        "Send both the same truncate_prompt_tokens, and start both with the same tokenizer and template.",
    ),
    FailureKind(
        Code.BAD_SELECTION,
        Symptom.SOME,
        Stage.AGREE,
        "Decode asked for pages that this offer does not have.",
        "The sides count pages differently, or this consumer was served before.",
        "Report the line, with both servers' options.",
    ),
    FailureKind(
        Code.UNKNOWN_TRANSFER,
        Symptom.SOME,
        Stage.WAIT,
        "Prefill has no such transfer on offer.",
        "It was fetched already, its lease ended, prefill never got the request or refused it, or the parameters "
        "are made up.",
        "Use parameters once. If decode asks too late raise lease_s, or add decode servers; if prefill queues "
        "long raise unmatched_timeout_s.",
    ),
    FailureKind(
        Code.DUPLICATE,
        Symptom.SOME,
        Stage.HOLD,
        "Prefill has a transfer of this id on offer already.",
        "The same transfer id was sent with two requests.",
        "Let the router choose ids, and never use one twice.",
    ),
    FailureKind(
        Code.EXPIRED,
        Symptom.LOAD,
        Stage.HOLD,
        "Nobody fetched the pages within their lease.",
        "Decode queues longer than lease_s, the router lost the request, or the client went away between.",
        "Raise lease_s, add decode servers, or give decode a larger cache. Look whether the router asks decode.",
    ),
    FailureKind(
        Code.BUSY,
        Symptom.LOAD,
        Stage.WAIT,
        "Prefill keeps no more subscriptions that wait for their prefill.",
        "Thousands of requests were sent to decode whose prefill did not begin.",
        "Limit the requests in flight at the router, or add prefill servers.",
    ),
    FailureKind(
        Code.DECLINED,
        Symptom.SOME,
        Stage.HOLD,
        "Decode gave up what it was to fetch; decode's own line says why.",
        "Decode refused the caches, or ended the request before it fetched anything.",
        "Read decode's line of the same transfer.",
    ),
    FailureKind(
        Code.WITHDRAWN,
        Symptom.QUIET,
        Stage.HOLD,
        "Prefill took its pages back before they were fetched.",
        "The request was aborted or preempted there, the cache was reset, or the server went to sleep.",
        "Nothing if clients hang up. If prefill preempts often give it a larger cache.",
        aborted=True,
    ),
    FailureKind(
        Code.CANCELLED,
        Symptom.QUIET,
        Stage.WAIT,
        "The request was aborted while its KV was under way.",
        "The client hung up, or the server ended the request.",
        "Nothing.",
        aborted=True,
    ),
    FailureKind(
        Code.SHUTTING_DOWN,
        Symptom.QUIET,
        Stage.WAIT,
        "The server shuts down.",
        "It was told to.",
        "Nothing.",
        aborted=True,
    ),
    FailureKind(
        Code.DEADLINE,
        Symptom.LOAD,
        Stage.WAIT,
        "The transfer did not end within deadline_s.",
        "Prefill takes longer than that, the link is slow, or far too much is under way at once.",
        "The stage says what it waited for. Raise deadline_s for long prompts; else look at the link.",
    ),
    FailureKind(
        Code.SESSION_LOST,
        Symptom.DATA,
        Stage.MOVE,
        "The connection with the peer ended.",
        "The peer's process ended, it was silent for peer_timeout_s, or the network cut the connection.",
        "Look whether the peer lives. Sessions are opened again with the next request.",
    ),
    FailureKind(
        Code.MEMORY,
        Symptom.DATA,
        Stage.AGREE,
        "Memory for the transfer could not be used.",
        "Too many windows are open, or a page lies outside of what is registered.",
        "Report the line if the load is ordinary.",
    ),
    FailureKind(
        Code.POST,
        Symptom.DATA,
        Stage.MOVE,
        "Prefill could not begin to send.",
        "The lanes' queues are full, or the device refused the copy.",
        "Look at prefill's line of the same transfer.",
    ),
    FailureKind(
        Code.SEND_FAILED,
        Symptom.DATA,
        Stage.MOVE,
        "Prefill began to send, and could not end it.",
        "The connection or the device failed in the middle.",
        "Look at prefill's line of the same transfer, and at the link or the device that it names.",
    ),
    FailureKind(
        Code.CHECKSUM,
        Symptom.DATA,
        Stage.MOVE,
        "Bytes arrived that are not those which were sent.",
        "A NIC, a switch or memory corrupts data.",
        "Nothing wrong was used. Watch sage_kvt_checksum_failures, and replace what corrupts.",
    ),
    FailureKind(
        Code.LANDING,
        Symptom.DATA,
        Stage.MOVE,
        "A chunk could not be placed where it belongs.",
        "The peer sent outside of the window, twice, or for a transfer that is over.",
        "Report the line: both sides are sage_kvt's.",
    ),
    FailureKind(
        Code.CONVERSION,
        Symptom.DATA,
        Stage.CONVERT,
        "Pages could not be converted.",
        "Memory for conversion is too small, the device failed, or a value has no place in the format.",
        "Raise staging_bytes if the line names it; else look at the device.",
    ),
    FailureKind(
        Code.FIRST_TOKEN,
        Symptom.SOME,
        Stage.MOVE,
        "Decode in SGLang got no usable first token from prefill in vLLM.",
        "More prefills wait for SGLang than vLLM keeps first tokens for, or the room was used twice.",
        "Limit the requests in flight; let SGLang's router choose rooms.",
    ),
    FailureKind(
        Code.INTERNAL,
        Symptom.DATA,
        Stage.MOVE,
        "A step of this transfer failed in a way that nobody thought of; others go on.",
        "A fault of the connector, of a library or of a vendor's driver; the log has its traceback.",
        "Report it with the traceback and the versions that sage-kvt doctor prints.",
    ),
    FailureKind(
        Code.OTHER,
        Symptom.SOME,
        Stage.WAIT,
        "The peer named a reason that this release does not know.",
        "The peer has a newer release.",
        "Run sage-kvt explain there, with the code in the line.",
    ),
)

#: All codes, by what is seen.
FAILURE_KINDS = {kind.code: kind for symptom in Symptom for kind in _KINDS if kind.symptom is symptom}
