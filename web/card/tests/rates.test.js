// SPDX-License-Identifier: Apache-2.0
// What happened between two answers: node --test

import assert from "node:assert/strict";
import { test } from "node:test";

import { between, conversionShare, quantiles, workOf } from "../page/rates.js";

const link = (changes) => ({
  id: "e/0/1/0/p/tcp", of: "e/0/1/0", engine: "e", rank: 0, peer: "p", backend: "tcp", sent: 0, landed: 0, capacity: 0, transfers: 0, ...changes,
});

function answer(changes = {}) {
  return {
    engines: [{ id: "e/0/1/0", engine: "e", rank: 0, taken: 100, work: {} }],
    links: [link({})],
    durations: [],
    buckets: [0.001, 0.01, 0.1],
    ...changes,
  };
}

const later = (seconds, changes = {}, work = {}) =>
  answer({ engines: [{ id: "e/0/1/0", engine: "e", rank: 0, taken: 100 + seconds, work }], ...changes });

test("bytes a second are those of the engine's own clock", () => {
  const rates = between(answer(), later(2, { links: [link({ sent: 300, landed: 100, capacity: 1000 })] }));
  assert.deepEqual(rates.links.get("e/0/1/0/p/tcp"), { sent: 150, landed: 50, utilization: 0.15 });
  assert.equal(rates.sent, 150);
  assert.equal(rates.landed, 50);
  assert.equal(rates.seconds, 2);
});

test("a link of unknown capacity has no utilization", () => {
  const rates = between(answer(), later(1, { links: [link({ sent: 5 })] }));
  assert.equal(rates.links.get("e/0/1/0/p/tcp").utilization, null);
});

test("a new link counts from nothing, and one that went counts no more", () => {
  const other = link({ id: "e/0/1/0/q/shm", peer: "q", sent: 40 });
  assert.equal(between(answer(), later(2, { links: [other] })).sent, 20);
  assert.equal(between(answer({ links: [other] }), later(2, { links: [] })).sent, 0);
});

test("two processes of one name are each measured by their own clock", () => {
  const engines = (a, b) => [
    { id: "a", engine: "same", rank: 0, taken: a, work: {} },
    { id: "b", engine: "same", rank: 0, taken: b, work: {} },
  ];
  const links = (sent) => [link({ id: "a", of: "a", sent }), link({ id: "b", of: "b", sent })];
  const rates = between(answer({ engines: engines(1, 1), links: links(0) }), answer({ engines: engines(2, 5), links: links(100) }));
  assert.equal(rates.links.get("a").sent, 100);
  assert.equal(rates.links.get("b").sent, 25);
  assert.equal(rates.sent, 125);
});

test("nothing is said of an interval in which an engine came, went, restarted or stood still", () => {
  const restarted = answer({ engines: [{ id: "e/0/2/7", engine: "e", rank: 0, taken: 101, work: {} }] });
  const two = answer({ engines: [...later(1).engines, { id: "f", engine: "f", rank: 0, taken: 101, work: {} }] });
  for (const [older, newer] of [[null, answer()], [answer(), restarted], [answer(), two], [two, later(2)], [answer(), answer()], [later(1), answer()], [answer({ engines: [] }), answer({ engines: [] })]]) {
    assert.equal(between(older, newer), null);
  }
});

test("conversion's share is of the work in the interval, not since the start", () => {
  const before = { encode: 10, decode: 0, send: 10, place: 0, verify: 0, copy: 0 };
  const older = later(0, {}, before);
  assert.equal(between(older, later(1, {}, { ...before, encode: 11, send: 13 })).conversion, 0.25);
  assert.equal(between(older, later(1, {}, before)).conversion, null, "no work, no share");
  assert.equal(conversionShare(workOf(older)), 0.5);
});

test("quantiles are those of transfers that ended in the interval", () => {
  const durations = (...counts) => [{ side: "decode", counts }];
  const older = answer({ durations: durations(1000, 0, 0, 0) });
  const rates = between(older, later(1, { durations: durations(1000, 98, 0, 2) }));
  assert.deepEqual([...rates.p50], [["decode", 0.01]]);
  assert.deepEqual([...rates.p99], [["decode", Infinity]]);
  assert.deepEqual([...between(older, later(1, { durations: durations(1000, 0, 0, 0) })).p50], []);
});

test("a quantile lies in the bucket that holds its share", () => {
  const of = (counts, share) => quantiles(new Map([["x", counts]]), [1, 2, 3], share).get("x");
  assert.equal(of([1, 0, 0, 0], 0.99), 1);
  assert.equal(of([1, 1, 0, 0], 0.5), 1);
  assert.equal(of([1, 1, 0, 0], 0.51), 2);
});
