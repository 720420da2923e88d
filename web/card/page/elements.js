// SPDX-License-Identifier: Apache-2.0
// Elements whose text is text: nothing here or elsewhere in the card parses HTML.

/** An element with properties (`class`, `text`, `on…`; the rest are attributes) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Text that changed only: a reader's selection and a screen reader's place stay. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Attributes that changed only; undefined takes one away. */
export function setAttributes(target, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined) target.removeAttribute(name);
    else if (target.getAttribute(name) !== String(value)) target.setAttribute(name, value);
  }
}

/**
 * A table whose rows are kept by key, so that an update disturbs nobody who reads or has the focus.
 *
 * `columns`: {head, number, make(), fill(cell, item)}; `make` builds a cell's inside once. `fill` may return text.
 */
export class Table {
  constructor({ caption, columns, key, empty }) {
    this.#columns = columns;
    this.#key = key;
    this.#empty = element("p", { class: "empty", text: empty });
    this.#body = element("tbody");
    const head = columns.map((column) =>
      element("th", { scope: "col", class: column.number ? "number" : undefined, text: column.head }),
    );
    this.#table = element(
      "table",
      {},
      element("caption", { class: "unseen", text: caption }),
      element("thead", {}, element("tr", {}, ...head)),
      this.#body,
    );
    // Wide tables scroll on their own, by keyboard, too.
    this.#scroll = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, this.#table);
    this.element = element("div", {}, this.#scroll, this.#empty);
    this.update([]);
  }

  #columns;
  #key;
  #empty;
  #body;
  #table;
  #scroll;
  #rows = new Map();

  update(items) {
    this.#scroll.hidden = items.length === 0;
    this.#empty.hidden = items.length > 0;
    const rows = new Map();
    for (const item of items) {
      const key = this.#key(item);
      const row = this.#rows.get(key) ?? this.#made();
      rows.set(key, row);
      this.#columns.forEach((column, at) => {
        const text = column.fill(row.cells[at], item);
        if (text !== undefined) setText(row.cells[at], text);
      });
    }
    for (const [key, row] of this.#rows) if (!rows.has(key)) row.remove();
    let at = this.#body.firstElementChild;
    for (const row of rows.values()) {
      if (row === at) at = at.nextElementSibling;
      else this.#body.insertBefore(row, at);
    }
    this.#rows = rows;
  }

  #made() {
    return element(
      "tr",
      {},
      ...this.#columns.map((column, at) =>
        element(
          at === 0 ? "th" : "td",
          { scope: at === 0 ? "row" : undefined, class: column.number ? "number" : undefined },
          ...(column.make ? [column.make()] : []),
        ),
      ),
    );
  }
}
