// SPDX-License-Identifier: Apache-2.0
// Line charts over time, by uPlot. Built into charts.js by scripts/build_card.py; the page does without, too.

import uPlot from "uplot";

const HEIGHT = 180;
const COLOURS = 7;
/** Beside colours, so that nobody needs these to tell lines apart: on the canvas, and of markers in the legend. */
const DASHES = [
  { line: undefined, marker: "solid" },
  { line: [8, 4], marker: "dashed" },
  { line: [2, 3], marker: "dotted" },
];
/** Steps of an axis of bytes. */
const POWERS = Array.from({ length: 60 }, (_, power) => 2 ** power);

export class Lines {
  #host;
  #frame;
  #format;
  #plot = null;
  #labels = "";
  #resized;

  /**
   * @param {Element} frame whose style has the colours
   * @param {{value: (value: number) => string, time: (at: number) => string,
   *   timeLabel: string, binary: boolean}} format of both axes
   */
  constructor(frame, format) {
    this.#frame = frame;
    this.#format = format;
    this.#host = document.createElement("div");
    this.#host.className = "chart";
    this.#host.setAttribute("role", "img");
    this.element = this.#host;
    this.#resized = new ResizeObserver(() => this.#plot?.setSize(this.#size()));
    this.#resized.observe(this.#host);
  }

  /** @param {{times: number[], lines: {label: string, values: (number|null)[]}[]}} data @param {string} text */
  set({ times, lines }, text) {
    if (this.#host.getAttribute("aria-label") !== text) this.#host.setAttribute("aria-label", text);
    const labels = JSON.stringify(lines.map((line) => line.label));
    const data = [times, ...lines.map((line) => line.values)];
    if (this.#plot && labels === this.#labels) {
      this.#plot.setData(data);
    } else if (this.#host.clientWidth > 0) {
      this.#plot?.destroy();
      this.#labels = labels;
      this.#plot = new uPlot(this.#options(lines), data, this.#host);
    }
  }

  destroy() {
    this.#resized.disconnect();
    this.#plot?.destroy();
    this.#plot = null;
  }

  #size() {
    return { width: Math.max(200, this.#host.clientWidth), height: HEIGHT };
  }

  #options(lines) {
    const { value, time, timeLabel, binary } = this.#format;
    const style = getComputedStyle(this.#frame);
    const of = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: of("--chart-text"), grid: { stroke: of("--chart-grid"), width: 1 }, ticks: { stroke: of("--chart-grid"), width: 1 } };
    return {
      ...this.#size(),
      cursor: { drag: { x: false, y: false } },
      legend: { live: true, markers: { dash: (_, series) => DASHES[(series + DASHES.length - 1) % DASHES.length].marker } },
      scales: { y: { range: (_, __, most) => [0, most > 0 ? most * 1.1 : 1] } },
      axes: [
        { ...axis, space: 90, values: (_, times) => times.map(time) },
        { ...axis, size: 76, values: (_, values) => values.map(value), ...(binary ? { incrs: POWERS } : {}) },
      ],
      series: [
        { label: timeLabel, value: (_, at) => (at === null || at === undefined ? "–" : time(at)) },
        ...lines.map((line, at) => ({
          label: line.label,
          stroke: of(`--line-${at % COLOURS}`),
          width: 2,
          dash: DASHES[at % DASHES.length].line,
          spanGaps: false,
          points: { show: false },
          value: (_, found) => (found === null || found === undefined ? "–" : value(found)),
        })),
      ],
    };
  }
}
