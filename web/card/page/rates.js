// SPDX-License-Identifier: Apache-2.0
// What happened between two answers of card.json. Nothing here knows the page.

/**
 * @param {object} older an answer, or null: then nothing is known yet
 * @param {object} newer the answer after it
 * @returns {{seconds: number, links: Map<string, {sent: number, landed: number, utilization: number|null}>,
 *   sent: number, landed: number, transfers: number, conversion: number|null, p50: Map<string, number>,
 *   p99: Map<string, number>} | null} bytes a second by link and in sum; shares from 0 to 1; quantiles of seconds by
 *   side. Null if an engine came, went or restarted in between, or time did not move.
 */
export function between(older, newer) {
  if (!older) return null;
  const before = new Map(older.engines.map((engine) => [engine.id, engine]));
  if (before.size !== newer.engines.length || newer.engines.length === 0) return null;
  const seconds = new Map();
  for (const engine of newer.engines) {
    const known = before.get(engine.id);
    if (!known || engine.taken <= known.taken) return null;
    seconds.set(engine.id, engine.taken - known.taken);
  }
  const links = new Map();
  const linksBefore = new Map(older.links.map((link) => [link.id, link]));
  let sent = 0;
  let landed = 0;
  for (const link of newer.links) {
    const known = linksBefore.get(link.id) ?? { sent: 0, landed: 0 };
    const span = seconds.get(link.of);
    const rate = {
      sent: Math.max(0, link.sent - known.sent) / span,
      landed: Math.max(0, link.landed - known.landed) / span,
      utilization: null,
    };
    if (link.capacity > 0) rate.utilization = Math.max(rate.sent, rate.landed) / link.capacity;
    links.set(link.id, rate);
    sent += rate.sent;
    landed += rate.landed;
  }
  const counts = countsBetween(older.durations, newer.durations);
  const spans = [...seconds.values()];
  return {
    seconds: Math.max(...spans),
    links,
    sent,
    landed,
    transfers: sum(newer.links, "transfers") - sum(older.links, "transfers"),
    conversion: conversionShare(workOf(newer), workOf(older)),
    p50: quantiles(counts, newer.buckets, 0.5),
    p99: quantiles(counts, newer.buckets, 0.99),
  };
}

/** Seconds of work of all engines, by kind. */
export function workOf(answer) {
  const found = { encode: 0, decode: 0, send: 0, place: 0, verify: 0, copy: 0 };
  for (const engine of answer.engines) {
    for (const [kind, seconds] of Object.entries(engine.work)) found[kind] = (found[kind] ?? 0) + seconds;
  }
  return found;
}

/** Conversion's share of all work since `before` (or ever), null without any work. */
export function conversionShare(work, before = {}) {
  let all = 0;
  for (const [kind, seconds] of Object.entries(work)) all += seconds - (before[kind] ?? 0);
  const converted = work.encode + work.decode - (before.encode ?? 0) - (before.decode ?? 0);
  return all > 0 ? converted / all : null;
}

/** Counts of each side's buckets that came since. */
function countsBetween(older, newer) {
  const before = new Map(older.map((one) => [one.side, one.counts]));
  return new Map(
    newer.map(({ side, counts }) => [side, counts.map((count, at) => count - (before.get(side)?.[at] ?? 0))]),
  );
}

/** The upper end of the bucket in which a share of all lies, by side; sides with nothing are left out. */
export function quantiles(countsBySide, buckets, share) {
  const found = new Map();
  for (const [side, counts] of countsBySide) {
    const all = counts.reduce((sum, count) => sum + count, 0);
    if (all <= 0) continue;
    let below = 0;
    const at = counts.findIndex((count) => (below += count) >= share * all);
    found.set(side, buckets[at] ?? Infinity);
  }
  return found;
}

const sum = (links, field) => links.reduce((total, link) => total + link[field], 0);
