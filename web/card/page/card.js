// SPDX-License-Identifier: Apache-2.0
// <kv-transport-card src="…/card.json" lang="en|zh" theme="auto|light|dark">: the card, wherever a page wants it.

import { element, setAttributes, setText } from "./elements.js";
import { Format } from "./format.js";
import { History } from "./history.js";
import { Choices, Conversion, Failures, Figures, HotChunks, Links, panel } from "./panels.js";
import { between } from "./rates.js";
import { Transfers } from "./transfers.js";
import { known, LANGUAGES, wordsOf } from "./words.js";

const POLL_MS = 1000;
const GIVE_UP_MS = 5000;
/** Rates in tables are those of about so many seconds, so that they can be read. */
const STEADY_S = 5;
const THEMES = ["auto", "light", "dark"];

const beside = (name) => new URL(name, import.meta.url).href;

class KvTransportCard extends HTMLElement {
  static observedAttributes = ["src", "lang", "theme"];

  #shadow = this.attachShadow({ mode: "open" });
  #sheets = new Map();
  #history = new History();
  #answers = [];
  #paused = false;
  #timer = 0;
  #asking = null;
  #failed = "";
  #parts = null;
  #charts = null;
  #onVisible = () => this.#next(0);

  connectedCallback() {
    document.addEventListener("visibilitychange", this.#onVisible);
    this.#sheet("card.css").then(() => this.#frame && (this.#frame.hidden = false));
    this.#build();
    this.#next(0);
  }

  disconnectedCallback() {
    document.removeEventListener("visibilitychange", this.#onVisible);
    clearTimeout(this.#timer);
    this.#asking?.abort();
    this.#parts?.destroy();
    this.#parts = null;
    this.#shadow.replaceChildren();
    this.#sheets.clear();
  }

  attributeChangedCallback(name, before, now) {
    if (before === now || !this.#parts) return;
    if (name === "src") {
      this.#answers = [];
      this.#history = new History();
    }
    this.#build();
    this.#next(0);
  }

  get #language() {
    return known(this.getAttribute("lang")) ?? known(remembered("lang")) ?? known(navigator.language) ?? "en";
  }

  get #theme() {
    return [this.getAttribute("theme"), remembered("theme")].find((theme) => THEMES.includes(theme)) ?? "auto";
  }

  // -- asking

  #next(delay) {
    clearTimeout(this.#timer);
    if (this.isConnected && !this.#paused && !document.hidden) this.#timer = setTimeout(() => this.#ask(), delay);
  }

  async #ask() {
    if (this.#asking) return;
    const asking = (this.#asking = new AbortController());
    const late = setTimeout(() => asking.abort(), GIVE_UP_MS);
    const src = this.getAttribute("src") ?? "card.json";
    try {
      const response = await fetch(new URL(src, document.baseURI), { signal: asking.signal, cache: "no-store" });
      const body = await response.json().catch(() => ({}));
      if (!response.ok) throw new Error(body.error ?? `HTTP ${response.status}`);
      if (src === (this.getAttribute("src") ?? "card.json")) await this.#take(body);
    } catch (error) {
      if (this.isConnected) this.#say(error.name === "AbortError" ? `${GIVE_UP_MS / 1000} s` : error.message);
    } finally {
      clearTimeout(late);
      this.#asking = null;
      this.#next(POLL_MS);
    }
  }

  async #take(answer) {
    const last = this.#answers.at(-1);
    this.#failed = "";
    this.#history.add(between(last?.answer ?? null, answer), answer);
    const failed = failedOf(answer) - (last ? failedOf(last.answer) : failedOf(answer));
    if (failed > 0) setText(this.#parts.news, this.#parts.t("new_failure", { count: this.#parts.format.count(failed) }));
    this.#answers.push({ at: Date.now() / 1000, answer });
    while (this.#answers.length > 2 && this.#answers[1].at <= this.#answers.at(-1).at - STEADY_S) this.#answers.shift();
    if (answer.charts && !this.#charts) {
      const dressed = Promise.all(["card.css", "charts.css"].map((name) => this.#sheet(name)));
      this.#charts = await import(beside("charts.js")).catch(() => null);
      await dressed;
      if (this.#charts && this.isConnected) this.#build();
    }
    this.#show();
  }

  #say(why) {
    this.#failed = why;
    this.#show();
  }

  // -- showing

  /** A style sheet of the card, asked for once; resolves when it holds, or can't be had. */
  #sheet(name) {
    if (!this.#sheets.has(name)) {
      const link = element("link", { rel: "stylesheet", href: beside(name) });
      this.#sheets.set(name, new Promise((done) => (link.onload = link.onerror = done)));
      this.#shadow.append(link);
    }
    return this.#sheets.get(name);
  }

  get #frame() {
    return this.#shadow.querySelector("article");
  }

  #build() {
    // A card without its style is never seen: the first waits for it, later ones take the place of one that has it.
    const hidden = this.#frame?.hidden ?? true;
    const focused = this.#shadow.activeElement?.id;
    this.#parts?.destroy();
    const t = wordsOf(this.#language);
    const format = new Format(this.#language === "zh" ? "zh-CN" : "en");
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const repaint = () => this.#build();
    dark.addEventListener("change", repaint);

    const status = element("p", { class: "status", role: "status" });
    const updated = element("p", { class: "updated" });
    const news = element("p", { class: "unseen", "aria-live": "polite" });
    const engines = element("p", { class: "engines" });
    const pause = element("button", { type: "button", id: "pause", onclick: () => this.#toggle() });
    const figures = new Figures(t, format);
    const transfers = new Transfers(t, format);
    const panels = [new Links(t, format), new Failures(t, format, this.#language), new Choices(t), new Conversion(t, format), new HotChunks(t, format)];
    const [links, failures, choices, conversion, hot] = panels.map((one) => one.element);
    const frame = element(
      "article",
      { class: `card ${this.#theme}`, lang: this.#language === "zh" ? "zh-CN" : "en", "aria-labelledby": "title", hidden },
      element(
        "header",
        {},
        element("h2", { id: "title", text: t("title") }),
        status,
        updated,
        news,
        element("div", { class: "controls" }, pause, this.#select("lang", t("language"), { en: "English", zh: "中文" }, this.#language), this.#select("theme", t("theme"), Object.fromEntries(THEMES.map((theme) => [theme, t(theme)])), this.#theme)),
      ),
      engines,
      figures.element,
    );
    const charts = element("div", { class: "charts" });
    const noCharts = element("p", { class: "empty", text: t("no_charts"), hidden: true });
    charts.append(noCharts);
    frame.append(links, charts, failures, choices, element("div", { class: "pair" }, conversion, element("div", {}, hot, transfers.averages)), transfers.element);
    this.#frame?.remove();
    this.#shadow.append(frame);

    let lines = [];
    if (this.#charts) {
      lines = this.#history.charts(t, format).map((chart) => ({ chart, lines: new this.#charts.Lines(frame, chart.format) }));
      charts.append(...lines.map(({ chart, lines: made }) => panel(chart.name, t(chart.name), "", made.element)));
    }
    this.#parts = {
      t, format, status, updated, news, engines, pause, noCharts, lines,
      updates: [figures, transfers, ...panels],
      destroy: () => {
        dark.removeEventListener("change", repaint);
        lines.forEach((one) => one.lines.destroy());
      },
    };
    this.#show();
    if (focused) this.#shadow.getElementById(focused)?.focus();
  }

  #select(name, label, options, chosen) {
    const select = element("select", {
      id: name,
      onchange: () => {
        remember(name, select.value);
        if (this.getAttribute(name) === select.value) this.#build();
        else this.setAttribute(name, select.value);
      },
    });
    for (const [value, text] of Object.entries(options)) {
      select.append(element("option", { value, selected: value === chosen, lang: name === "lang" ? value : undefined, text }));
    }
    return element("span", {}, element("label", { for: name, text: label }), select);
  }

  #toggle() {
    this.#paused = !this.#paused;
    if (this.#paused) this.#asking?.abort();
    this.#show();
    this.#next(0);
  }

  #show() {
    const { t, format, status, updated, engines, pause, noCharts, lines, updates } = this.#parts;
    const last = this.#answers.at(-1);
    const at = last ? format.clock(last.at) : "";
    const failed = this.#failed && !this.#paused;
    setText(status, this.#paused ? t("paused") : failed ? t(last ? "stale" : "unanswered", { at, why: this.#failed }) : last ? t("live") : t("starting"));
    status.className = `status ${this.#paused ? "paused" : failed ? "bad" : last ? "live" : ""}`;
    setText(updated, last && !failed ? t("updated", { at }) : "");
    setText(pause, t(this.#paused ? "resume" : "pause"));
    setAttributes(pause, { "aria-pressed": this.#paused });
    if (!last) return;
    const { answer } = last;
    const sums = (field) => answer.engines.reduce((sum, engine) => sum + engine[field], 0);
    const counts = { engines: answer.engines.length, sessions: sums("sessions"), offers: sums("offers"), subscriptions: sums("subscriptions") };
    setText(engines, counts.engines ? t("engines_text", counts) : t("no_engine"));
    const rates = this.#answers.length > 1 ? between(this.#answers[0].answer, answer) : null;
    for (const one of updates) one.update(answer, rates);
    noCharts.hidden = answer.charts;
    for (const { chart, lines: made } of lines) made.set(chart.data(), chart.text());
  }
}

const failedOf = (answer) => answer.failures.reduce((sum, one) => sum + one.count, 0);

// A visitor's choice, where the browser keeps any.
function remembered(name) {
  try {
    return localStorage.getItem(`kv-transport-card-${name}`);
  } catch {
    return null;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`kv-transport-card-${name}`, value);
  } catch {
    // then it holds for this visit
  }
}

if (!customElements.get("kv-transport-card")) customElements.define("kv-transport-card", KvTransportCard);

export { KvTransportCard, LANGUAGES };
