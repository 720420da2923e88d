// SPDX-License-Identifier: Apache-2.0
// Numbers and names as text of one language.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export class Format {
  /** @param {string} locale as in Intl */
  constructor(locale) {
    this.#whole = new Intl.NumberFormat(locale, { maximumFractionDigits: 0 });
    this.#three = new Intl.NumberFormat(locale, { maximumSignificantDigits: 3 });
    this.#clock = new Intl.DateTimeFormat(locale, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
    this.#date = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
  }

  #whole;
  #three;
  #clock;
  #date;

  count(value) {
    return this.#whole.format(value);
  }

  number(value) {
    return this.#three.format(value);
  }

  bytes(value) {
    const power = value < 1 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(value) / 10));
    return `${this.#three.format(value / 1024 ** power)} ${UNITS[power]}`;
  }

  rate(value) {
    return `${this.bytes(value)}/s`;
  }

  seconds(value) {
    if (!Number.isFinite(value)) return "> 60 s";
    if (value < 1e-3) return `${this.#three.format(value * 1e6)} µs`;
    if (value < 1) return `${this.#three.format(value * 1e3)} ms`;
    return `${this.#three.format(value)} s`;
  }

  percent(share) {
    return `${this.#three.format(share * 100)} %`;
  }

  ratio(value) {
    return `${this.#three.format(value)} ×`;
  }

  /** @param {number} at seconds since 1970 */
  clock(at) {
    return this.#clock.format(at * 1000);
  }

  /** With the day. */
  moment(at) {
    return this.#date.format(at * 1000);
  }
}

/** A long name, so that its ends can be told apart. */
export function short(name) {
  return name.length > 22 ? `${name.slice(0, 10)}…${name.slice(-9)}` : name;
}

/** An engine's rank, as everywhere in logs. */
export function rankOf({ engine, rank }) {
  return `${engine}[${rank}]`;
}
