# SPDX-License-Identifier: Apache-2.0
"""The scheduler's orders name pages by vLLM's block tables, the transport by groups; several may follow one table."""

from __future__ import annotations

from dataclasses import replace

from sage_kv_connector.engine import GroupPages
from sage_kv_connector.integrations.vllm.metadata import PageTables, SageKVConnectorMetadata


class BlockTables:
    """``tables``: by group, the place of its table among those that take part in transfers."""

    def __init__(self, tables: tuple[int, ...]) -> None:
        self._tables = tables
        self._one_to_one = tables == tuple(range(len(tables)))

    def by_group(self, orders: SageKVConnectorMetadata) -> SageKVConnectorMetadata:
        """The same orders, each table's pages said of every group that follows it."""
        if self._one_to_one:
            return orders
        return replace(
            orders,
            loads=[replace(load, pages=self._wanted(load.pages)) for load in orders.loads],
            progress=[replace(one, new_page_ids=self._page_ids(one.new_page_ids)) for one in orders.progress],
            finished=[replace(one, page_ids=self._page_ids(one.page_ids)) for one in orders.finished],
        )

    def _page_ids(self, by_table: PageTables) -> PageTables:
        return tuple(by_table[table] for table in self._tables)

    def _wanted(self, by_table: tuple[GroupPages, ...]) -> tuple[GroupPages, ...]:
        of_table = {pages.group: pages for pages in by_table}
        return tuple(
            of_table[table]._replace(group=group)
            for group, table in enumerate(self._tables)
            if table in of_table
        )
