// The columns that are compared: any number of choices, each with an editor.

import { announce, byId, el } from "./dom.js";
import { LinkEditor } from "./link.js";
import { models } from "./models.js";

export class Columns {
  #links = [];
  #root = byId("columns");
  onChange = () => {};

  constructor() {
    this.add();
    byId("add-column").addEventListener("click", () => {
      this.add();
      this.#root.lastElementChild.querySelector("select").focus();
    });
    byId("one-each").addEventListener("click", () => this.useEach());
  }

  get choices() {
    return this.#links.map(({ id, model, mixtures }) => ({ column: id, model, mixtures }));
  }

  add(model = "") {
    const label = letters(this.#firstFree());
    const root = el("div", { id: `link-${label.toLowerCase()}`, className: "column", role: "group" });
    root.setAttribute("aria-label", `Column ${label}`);
    this.#root.append(root);
    const link = new LinkEditor(root, label, () => this.#remove(link, root));
    link.onChange = () => this.onChange();
    this.#links.push(link);
    if (model) link.model = model;
    this.#show();
    return link;
  }

  /** One column for each of these models. */
  use(names) {
    this.#root.replaceChildren();
    this.#links = [];
    for (const name of names) this.add(name);
  }

  /** The base model and every adapter, mixture and residual. */
  useEach() {
    const kinds = ["base", "adapter", "mixture", "residual"];
    this.use(models.all.filter(({ kind }) => kinds.includes(kind)).map(({ id }) => id));
    announce(`${this.#links.length} columns`);
  }

  refresh() {
    for (const link of this.#links) link.refresh();
    this.onChange();
  }

  #remove(link, root) {
    this.#links = this.#links.filter((other) => other !== link);
    root.remove();
    this.#show();
    byId("add-column").focus();
    announce(`Column ${link.id} removed`);
  }

  #firstFree() {
    const used = new Set(this.#links.map(({ id }) => id));
    let index = 0;
    while (used.has(letters(index))) index += 1;
    return index;
  }

  #show() {
    this.#root.classList.toggle("several", this.#links.length > 1);
    this.onChange();
  }
}

/** A, B, ... Z, AA, AB, ... */
function letters(index) {
  const last = String.fromCharCode(65 + (index % 26));
  return index < 26 ? last : letters(Math.floor(index / 26) - 1) + last;
}
