// SPDX-License-Identifier: Apache-2.0
// The card's panels. Each is made once for a language and told of every answer: update(answer, rates).

import { CODES_ZH } from "./codes_zh.js";
import { element, setAttributes, setText, Table } from "./elements.js";
import { rankOf, short } from "./format.js";
import { conversionShare, workOf } from "./rates.js";

/** A section with a heading; `about` is a sentence below it. */
export function panel(name, title, about, ...children) {
  return element(
    "section",
    { "aria-labelledby": `${name}-title`, class: `panel ${name}` },
    element("h3", { id: `${name}-title`, text: title }),
    ...(about ? [element("p", { class: "about", text: about })] : []),
    ...children,
  );
}

/** A cell with a long name: cut for the eye, whole for the pointer and for screen readers. */
export function nameCell(cell, name) {
  setAttributes(cell, { title: name, "aria-label": short(name) === name ? undefined : name });
  return short(name);
}

function ranksCells(t) {
  return [
    { head: t("engine"), fill: (cell, item) => nameCell(cell, rankOf(item)) },
    { head: t("peer"), fill: (cell, { peer }) => nameCell(cell, peer || t("nobody")) },
  ];
}

export class Figures {
  constructor(t, format) {
    this.#t = t;
    this.#format = format;
    this.element = element("dl", { class: "figures" });
    for (const name of ["sent_now", "landed_now", "busiest", "transfers_now", "failed_share", "conversion_now", "compression"]) {
      const value = element("dd", { class: "figure" });
      const more = element("dd", { class: "more" });
      this.#cells[name] = { value, more };
      this.element.append(element("div", { class: name }, element("dt", { text: t(name) }), value, more));
    }
  }

  #t;
  #format;
  #cells = {};

  update(answer, rates) {
    const t = this.#t;
    const f = this.#format;
    const all = answer.links.reduce((sum, link) => sum + link.transfers, 0);
    const failed = answer.links.reduce((sum, link) => sum + link.failed, 0);
    this.#say("sent_now", rates ? f.rate(rates.sent) : t("measuring"), f.bytes(sumOf(answer.links, "sent")));
    this.#say("landed_now", rates ? f.rate(rates.landed) : t("measuring"), f.bytes(sumOf(answer.links, "landed")));
    const busiest = rates && busiestOf(answer.links, rates);
    this.#say("busiest", busiest ? f.percent(busiest.utilization) : rates ? t("unknown") : t("measuring"), busiest ? short(busiest.peer) : "");
    this.#say("transfers_now", rates ? t("per_second", { rate: f.number(rates.transfers / rates.seconds) }) : t("measuring"), t("in_all", { count: f.count(all) }));
    this.#say("failed_share", all ? f.percent(failed / all) : t("none"), t("of_total", { count: f.count(failed), all: f.count(all) }));
    this.#cells.failed_share.value.classList.toggle("bad", failed > 0);
    const share = conversionShare(workOf(answer));
    const now = rates && rates.conversion;
    this.#say("conversion_now", now !== null && now !== undefined ? f.percent(now) : share === null ? t("none") : f.percent(share), share === null ? "" : t("in_all_share", { share: f.percent(share) }));
    const wire = sumOf(answer.compression, "transferred_bytes");
    const cached = sumOf(answer.compression, "kv_bytes");
    this.#say("compression", wire ? f.ratio(cached / wire) : t("none"), wire ? `${f.bytes(cached)} → ${f.bytes(wire)}` : "");
  }

  #say(name, value, more) {
    setText(this.#cells[name].value, value);
    setText(this.#cells[name].more, more);
  }
}

const sumOf = (items, field) => items.reduce((sum, item) => sum + item[field], 0);

function busiestOf(links, rates) {
  let found = null;
  for (const link of links) {
    const utilization = rates.links.get(link.id)?.utilization ?? null;
    if (utilization !== null && (!found || utilization > found.utilization)) found = { peer: link.peer, utilization };
  }
  return found;
}

export class Links {
  constructor(t, f) {
    this.#table = new Table({
      caption: t("links"),
      empty: t("links_empty"),
      key: (link) => link.id,
      columns: [
        ...ranksCells(t),
        { head: t("backend"), fill: (_, link) => link.backend + (link.open ? "" : ` (${t("closed")})`) },
        { head: t("sent"), number: true, fill: (_, { rate }) => (rate ? f.rate(rate.sent) : "…") },
        { head: t("landed"), number: true, fill: (_, { rate }) => (rate ? f.rate(rate.landed) : "…") },
        { head: t("utilization"), make: meter, fill: (cell, link) => fillMeter(cell, link, t, f) },
        { head: t("wire"), number: true, fill: (_, link) => (link.wire_seconds === null ? "–" : f.seconds(link.wire_seconds)) },
        { head: t("whole"), number: true, fill: (_, link) => (link.seconds === null ? "–" : f.seconds(link.seconds)) },
        {
          head: t("errors"),
          number: true,
          fill: (cell, link) => {
            cell.classList.toggle("bad", link.failed > 0);
            return t("of_total", { count: f.count(link.failed), all: f.count(link.transfers) });
          },
        },
        { head: t("total"), number: true, fill: (_, link) => `↑ ${f.bytes(link.sent)} ↓ ${f.bytes(link.landed)}` },
      ],
    });
    this.element = panel("links", t("links"), t("links_about"), this.#table.element);
  }

  #table;

  update(answer, rates) {
    this.#table.update(answer.links.map((link) => ({ ...link, rate: rates?.links.get(link.id) })));
  }
}

function meter() {
  return element("span", { class: "meter" }, element("span", { class: "track", "aria-hidden": "true" }, element("span", { class: "fill" })), element("span", { class: "value" }));
}

function fillMeter(cell, { rate, source, capacity }, t, f) {
  const [track, value] = cell.firstElementChild.children;
  const share = rate ? rate.utilization : null;
  track.firstElementChild.style.width = `${Math.min(100, (share ?? 0) * 100)}%`;
  track.classList.toggle("full", (share ?? 0) > 0.9);
  const of = capacity > 0 ? ` / ${source === "best" ? "≈ " : ""}${f.rate(capacity)}` : "";
  setText(value, (!rate ? "…" : share === null ? t("unknown") : f.percent(share)) + of);
}

export class Failures {
  constructor(t, f, language) {
    const said = (one) => (language === "zh" && Object.hasOwn(CODES_ZH, one.code) ? CODES_ZH[one.code] : [one.meaning, one.remedy]);
    this.#failures = new Table({
      caption: t("failures"),
      empty: t("failures_empty"),
      key: (one) => `${one.side} ${one.code}`,
      columns: [
        { head: t("code"), fill: (_, one) => one.code },
        { head: t("side"), fill: (_, one) => t(`${one.side}_side`) },
        { head: t("count"), number: true, fill: (_, one) => f.count(one.count) },
        { head: t("lost"), number: true, fill: (_, one) => f.seconds(one.lost_seconds) },
        {
          head: t("last"),
          make: () => element("span", { class: "last" }, element("time"), element("span", { class: "detail", lang: "en" })),
          fill: (cell, one) => {
            const [time, detail] = cell.firstElementChild.children;
            setText(time, one.at === null ? "–" : f.moment(one.at));
            setText(detail, one.detail);
          },
        },
        {
          head: t("meaning"),
          make: () => element("span", { class: "meaning" }, element("span"), element("span", { class: "remedy" })),
          fill: (cell, one) => said(one).forEach((text, at) => setText(cell.firstElementChild.children[at], text)),
        },
      ],
    });
    this.#alerts = new Table({
      caption: t("alerts"),
      empty: t("alerts_empty"),
      key: (one) => `${one.metric} ${one.of}`,
      columns: [
        { head: t("alert"), fill: (_, one) => t(one.metric) },
        { head: t("of"), fill: (_, one) => one.of },
        { head: t("count"), number: true, fill: (_, one) => f.count(one.value) },
      ],
    });
    this.#notes = new Table({
      caption: t("notes"),
      empty: t("notes_empty"),
      key: ({ engine, rank, note }) => `${engine} ${rank} ${note.at} ${note.code} ${note.text}`,
      columns: [
        { head: t("at"), fill: (_, { note }) => f.moment(note.at) },
        { head: t("engine"), fill: (cell, item) => nameCell(cell, rankOf(item)) },
        { head: t("code"), fill: (_, { note }) => note.code },
        { head: t("note"), make: () => element("span", { lang: "en" }), fill: (cell, { note }) => setText(cell.firstElementChild, note.text) },
      ],
    });
    this.element = panel(
      "failures", t("failures"), "", this.#failures.element,
      element("h4", { text: t("alerts") }), this.#alerts.element,
      element("h4", { text: t("notes") }), this.#notes.element,
    );
  }

  #failures;
  #alerts;
  #notes;

  update(answer) {
    this.#failures.update(answer.failures);
    this.#alerts.update(answer.faults);
    this.#notes.update(answer.notes);
  }
}

export class Choices {
  constructor(t) {
    this.#table = new Table({
      caption: t("choices"),
      empty: t("choices_empty"),
      key: (one) => `${rankOf(one)} ${one.peer} ${one.backend} ${one.address}`,
      columns: [
        ...ranksCells(t),
        { head: t("backend"), fill: (cell, one) => (setAttributes(cell, { title: one.address }), one.backend) },
        { head: t("mode"), fill: (_, one) => one.mode || "–" },
        { head: t("reason"), make: () => element("span", { lang: "en" }), fill: (cell, one) => setText(cell.firstElementChild, one.reason || "–") },
        { head: t("security"), fill: (_, one) => one.security },
        { head: t("checksum"), fill: (_, one) => t(one.checksum ? "yes" : "no") },
        { head: t("conversion"), make: () => element("span"), fill: (cell, one) => {
          setAttributes(cell.firstElementChild, { lang: one.conversion ? "en" : undefined });
          setText(cell.firstElementChild, one.conversion || t("as_is"));
        } },
      ],
    });
    this.element = panel("choices", t("choices"), "", this.#table.element);
  }

  #table;

  update(answer) {
    this.#table.update(answer.choices);
  }
}

export class Conversion {
  constructor(t, f) {
    this.#work = new Table({
      caption: t("work"),
      empty: t("work_empty"),
      key: (one) => one.kind,
      columns: [
        { head: t("work"), fill: (_, one) => t(one.kind) },
        { head: t("work_time"), number: true, fill: (_, one) => f.seconds(one.seconds) },
        { head: t("work_share"), number: true, fill: (_, one) => f.percent(one.share) },
        { head: t("wire_bytes"), number: true, fill: (_, one) => (one.bytes === undefined ? "–" : f.bytes(one.bytes)) },
      ],
    });
    this.#formats = new Table({
      caption: t("formats"),
      empty: t("formats_empty"),
      key: (one) => one.wire_dtype,
      columns: [
        { head: t("wire_dtype"), fill: (_, one) => (one.wire_dtype === "same" ? t("same") : one.wire_dtype) },
        { head: t("wire_bytes"), number: true, fill: (_, one) => f.bytes(one.transferred_bytes) },
        { head: t("in_cache"), number: true, fill: (_, one) => f.bytes(one.kv_bytes) },
        { head: t("compression"), number: true, fill: (_, one) => (one.transferred_bytes ? f.ratio(one.kv_bytes / one.transferred_bytes) : "–") },
      ],
    });
    this.element = panel("conversion", t("conversion"), "", this.#work.element, element("h4", { text: t("formats") }), this.#formats.element);
  }

  #work;
  #formats;

  update(answer) {
    const work = Object.entries(workOf(answer)).filter(([, seconds]) => seconds > 0);
    const all = work.reduce((sum, [, seconds]) => sum + seconds, 0);
    this.#work.update(
      work.map(([kind, seconds]) => ({ kind, seconds, share: seconds / all, bytes: answer.converted_bytes[kind] })),
    );
    this.#formats.update(answer.compression);
  }
}

export class HotChunks {
  constructor(t, f) {
    this.#table = new Table({
      caption: t("hot"),
      empty: t("hot_empty"),
      key: (chunk) => chunk.digest,
      columns: [
        { head: t("place_no"), number: true, fill: (_, chunk) => f.count(chunk.place) },
        { head: t("digest"), fill: (cell, chunk) => nameCell(cell, chunk.digest) },
        { head: t("tokens"), number: true, fill: (_, chunk) => f.count(chunk.tokens) },
        { head: t("handovers"), number: true, fill: (_, chunk) => f.count(chunk.handovers) },
      ],
    });
    this.element = panel("hot", t("hot"), "", this.#table.element);
  }

  #table;

  update(answer) {
    this.#table.update(answer.hot_chunks.map((chunk, at) => ({ ...chunk, place: at + 1 })));
  }
}
