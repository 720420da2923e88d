// SPDX-License-Identifier: Apache-2.0
// The last transfers, each with its stages as a bar and as words, and what stages take on average.

import { element, setText, Table } from "./elements.js";
import { rankOf } from "./format.js";
import { nameCell, panel } from "./panels.js";

/** In the order of their colours; a stage that is not here is drawn as the last. */
const STAGES = ["connect", "wait", "queue", "wire", "decode", "report", "compute", "hold"];

const colour = (stage) => `stage s${STAGES.includes(stage) ? STAGES.indexOf(stage) : STAGES.length}`;

export class Transfers {
  constructor(t, f) {
    const word = (stage) => (STAGES.includes(stage) ? t(`stage_${stage}`) : stage);
    this.#table = new Table({
      caption: t("transfers"),
      empty: t("transfers_empty"),
      key: (one) => `${rankOf(one)} ${one.record.side} ${one.record.transfer_id} ${one.record.peer} ${one.record.began}`,
      columns: [
        { head: t("transfer"), fill: (cell, { record }) => nameCell(cell, record.transfer_id) },
        { head: t("side"), fill: (_, { record }) => t(`${record.side}_side`) },
        { head: t("peer"), fill: (cell, { record }) => nameCell(cell, record.peer || t("nobody")) },
        { head: t("ended"), fill: (_, { record }) => f.clock(record.began + record.seconds) },
        { head: t("size"), number: true, fill: (_, { record }) => f.bytes(record.nbytes) },
        { head: t("took"), number: true, fill: (_, { record }) => f.seconds(record.seconds) },
        {
          head: t("stages"),
          make: () => element("details", {}, element("summary", {}, element("span", { class: "bar", role: "img" })), element("ul", { class: "stages" })),
          fill: (cell, { record }) => {
            const details = cell.firstElementChild;
            if (details.dataset.told) return; // a transfer that ended does not change
            details.dataset.told = "1";
            const said = record.stages.map(([stage, seconds]) => `${word(stage)} ${f.seconds(seconds)}`);
            const bar = details.querySelector(".bar");
            bar.setAttribute("aria-label", said.join(", "));
            record.stages.forEach(([stage, seconds], at) => {
              const piece = element("span", { class: colour(stage), title: said[at] });
              piece.style.flexGrow = String(record.seconds > 0 ? seconds / record.seconds : 1);
              bar.append(piece);
              details.lastElementChild.append(element("li", {}, element("span", { class: `swatch ${colour(stage)}`, "aria-hidden": "true" }), said[at]));
            });
          },
        },
        {
          head: t("result"),
          make: () => element("span", {}, element("span", { class: "code" }), element("span", { class: "detail", lang: "en" })),
          fill: (cell, { record }) => {
            const [code, detail] = cell.firstElementChild.children;
            code.classList.toggle("bad", record.code !== "ok");
            setText(code, record.code === "ok" ? t("ok") : record.code);
            setText(detail, record.detail);
          },
        },
      ],
    });
    this.#averages = new Table({
      caption: t("averages"),
      empty: t("transfers_empty"),
      key: (one) => `${one.side} ${one.stage}`,
      columns: [
        { head: t("stages"), fill: (_, one) => `${t(`${one.side}_side`)}: ${word(one.stage)}` },
        { head: t("average"), number: true, fill: (_, one) => (one.count ? f.seconds(one.seconds / one.count) : "–") },
        { head: t("count"), number: true, fill: (_, one) => f.count(one.count) },
      ],
    });
    const legend = element(
      "ul",
      { class: "legend", "aria-hidden": "true" },
      ...STAGES.map((stage) => element("li", {}, element("span", { class: `swatch ${colour(stage)}` }), word(stage))),
    );
    this.element = panel("transfers", t("transfers"), t("transfers_about"), legend, this.#table.element);
    this.averages = panel("averages", t("averages"), "", this.#averages.element);
  }

  #table;
  #averages;

  update(answer) {
    const list = this.#table.element;
    // Nobody's row goes away while it is read.
    if (!list.matches(":focus-within") && !list.querySelector("details[open]")) this.#table.update(answer.transfers);
    this.#averages.update(answer.stages);
  }
}
