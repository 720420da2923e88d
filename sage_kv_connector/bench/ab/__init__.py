# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench ab``: the same engine, model, prompts and arrivals; only the connector differs.

``suites`` says what is measured, ``loads`` makes the requests, ``links`` the hosts and what lies between them,
``arms`` the pairs of servers; ``drive`` sends one load to one arm and ``spent`` says what that took of the machine;
``rounds`` interleaves all of it and keeps what is done; ``figures`` makes medians, intervals and ratios.
"""
