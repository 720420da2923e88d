# SPDX-License-Identifier: Apache-2.0
"""The card "KV Transport": a page, a web component and the numbers that they poll. See ``docs/card.md``.

``contents`` makes the numbers of snapshots, ``page`` finds the files, ``router`` serves both. All numbers are totals:
rates come of two answers, and the page computes them (``web/card/page/rates.js``).
"""
