// SPDX-License-Identifier: Apache-2.0
// What charts show: the last minutes of this visit, in bounded memory.

import { rankOf, short } from "./format.js";

const MINUTES = 5;
const MOST = MINUTES * 60;
/** Links with a line of their own, those that moved most; the rest share one. */
const MOST_LINES = 5;

export class History {
  #points = [];
  #links = new Map();

  /** @param {ReturnType<import("./rates.js").between>} rates null where an interval has none: lines have a gap */
  add(rates, answer) {
    if (answer.engines.length === 0) return;
    const at = Math.max(...answer.engines.map((engine) => engine.taken));
    if (this.#points.length && at <= this.#points.at(-1).at) return;
    this.#points.push({ at, rates });
    if (this.#points.length > MOST) this.#points.shift();
    this.#links = new Map(answer.links.map((link) => [link.id, link]));
  }

  /** What is drawn: {name, format, data(), text()}; `data` gives times and lines of {label, values}. */
  charts(t, f) {
    const minutes = MINUTES;
    return [
      {
        name: "throughput",
        format: { value: (value) => f.rate(value), time: (at) => f.clock(at), timeLabel: t("at"), binary: true },
        data: () => this.#throughput(t),
        text: () => {
          const totals = this.#points.map(({ rates }) => (rates ? rates.sent + rates.landed : 0));
          return t("throughput_text", { minutes, now: f.rate(totals.at(-1) ?? 0), most: f.rate(Math.max(0, ...totals)) });
        },
      },
      {
        name: "duration",
        format: { value: (value) => f.seconds(value), time: (at) => f.clock(at), timeLabel: t("at"), binary: false },
        data: () => this.#durations(t),
        text: () => {
          const lasts = this.#durations(t).lines.map(({ label, values }) => [label, values.findLast((value) => value !== null)]);
          const now = lasts.flatMap(([label, value]) => (value === undefined ? [] : [`${label} ${f.seconds(value)}`]));
          return t("duration_text", { minutes, now: now.join(", ") || t("none") });
        },
      },
    ];
  }

  #throughput(t) {
    const moved = new Map();
    for (const { rates } of this.#points) {
      for (const [id, rate] of rates?.links ?? []) moved.set(id, (moved.get(id) ?? 0) + rate.sent + rate.landed);
    }
    const known = [...this.#links.values()].filter((link) => moved.get(link.id) > 0);
    const first = known.sort((a, b) => moved.get(b.id) - moved.get(a.id)).slice(0, MOST_LINES);
    const of = (rates, id) => ((rate) => (rate ? rate.sent + rate.landed : 0))(rates.links.get(id));
    const lines = first.map((link) => ({
      label: `${short(rankOf(link))} ⇄ ${short(link.peer || t("nobody"))} · ${link.backend}`,
      values: this.#points.map(({ rates }) => (rates ? of(rates, link.id) : null)),
    }));
    // The order of colours must not change with every second.
    lines.sort((a, b) => (a.label < b.label ? -1 : 1));
    if (known.length > first.length) {
      const shown = new Set(first.map((link) => link.id));
      const rest = (rates) => [...rates.links].reduce((sum, [id, rate]) => sum + (shown.has(id) ? 0 : rate.sent + rate.landed), 0);
      lines.push({ label: "…", values: this.#points.map(({ rates }) => (rates ? rest(rates) : null)) });
    }
    return { times: this.#points.map(({ at }) => at), lines };
  }

  #durations(t) {
    const sides = new Set(this.#points.flatMap(({ rates }) => [...(rates?.p50.keys() ?? [])]));
    const lines = [...sides].sort().flatMap((side) =>
      ["p50", "p99"].map((quantile) => ({
        label: `${t(`${side}_side`)} ${quantile}`,
        values: this.#points.map(({ rates }) => {
          const value = rates?.[quantile].get(side);
          return value === undefined || value === Infinity ? null : value;
        }),
      })),
    );
    return { times: this.#points.map(({ at }) => at), lines };
  }
}
