# SPDX-License-Identifier: Apache-2.0
"""KV transfers between engines, over any backend: the door of the engine.

Who owns what::

    EngineCore                     one a worker process; any thread may call it
    ├── ControlLoop                one thread; owns the state of everything below
    ├── backends                   by name; their lanes are C++ threads
    ├── SessionTable               sessions by connection and by peer
    │   └── Session                one authenticated connection: plan, schema verdict, who holds it
    ├── Conversions                staging memory, the kernels' threads (and a device's lanes)
    ├── Producer                   transfers on offer
    │   ├── Offer → Source         a transfer id and where its bytes come from
    │   │   └── Stream             one subscription being served, by a Cursor or a PartSender
    │   └── Early                  what came before its offer
    ├── Consumer                   transfers on their way in
    │   ├── Subscription → Target  one that was asked for, and where its bytes go
    │   │   └── PartFetch          of a converting one: its ring and its parts
    │   └── Windows                who gets a window's events
    └── Questions                  verbs, bodies and answers of services that stand on the engine

Threading: an engine's own threads submit orders, which run on the control thread in order of
submission; so nothing in here locks. What changes once a step or a layer, the pages of a source, they change
themselves, in the data plane. Callbacks come on the control thread and must be short.

Folders depend on those left of them only: control < session < pages < conversion < transfer < core < transport.
Whoever stands on the engine imports from here.
"""

from sage_kv_connector._data_plane import Step as Step
from sage_kv_connector.engine.control.listen_address import advertised_host as advertised_host
from sage_kv_connector.engine.control.listen_address import listen_host as listen_host
from sage_kv_connector.engine.control.reachability import capabilities_of as capabilities_of
from sage_kv_connector.engine.control.reachability import enabled_backends as enabled_backends
from sage_kv_connector.engine.control.reachability import order_addresses as order_addresses
from sage_kv_connector.engine.control.reachability import scheme_of as scheme_of
from sage_kv_connector.engine.conversion.wire_plan import SAME as SAME
from sage_kv_connector.engine.conversion.wire_plan import planned_wire_dtype as planned_wire_dtype
from sage_kv_connector.engine.core import CALL_TIMEOUT_S as CALL_TIMEOUT_S
from sage_kv_connector.engine.core import EngineCore as EngineCore
from sage_kv_connector.engine.pages.layout import NULL_PAGE as NULL_PAGE
from sage_kv_connector.engine.pages.layout import PageIds as PageIds
from sage_kv_connector.engine.pages.layout import gathered_segments as gathered_segments
from sage_kv_connector.engine.pages.layout import index_runs as index_runs
from sage_kv_connector.engine.pages.memory import ItemSource as ItemSource
from sage_kv_connector.engine.pages.memory import MemorySource as MemorySource
from sage_kv_connector.engine.pages.paged import PagedSource as PagedSource
from sage_kv_connector.engine.pages.source import Cursor as Cursor
from sage_kv_connector.engine.pages.target import GroupPages as GroupPages
from sage_kv_connector.engine.pages.target import MemoryTarget as MemoryTarget
from sage_kv_connector.engine.pages.target import PagesTarget as PagesTarget
from sage_kv_connector.engine.pages.target import Target as Target
from sage_kv_connector.engine.session.bounds import MAX_TRANSFER_ID as MAX_TRANSFER_ID
from sage_kv_connector.engine.session.questions import Question as Question
from sage_kv_connector.engine.session.questions import Reply as Reply
from sage_kv_connector.engine.session.transfer_messages import PageRuns as PageRuns
from sage_kv_connector.engine.transfer.audit import TransferAudit as TransferAudit
from sage_kv_connector.engine.transfer.offer import OfferTerms as OfferTerms
from sage_kv_connector.engine.transfer.subscription import Subscription as Subscription
from sage_kv_connector.engine.transfer.subscription import Wanted as Wanted
