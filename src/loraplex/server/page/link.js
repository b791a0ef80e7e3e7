// The editor of one choice: no adapter is the base model, one is that adapter, several are a link.

import { el, announce } from "./dom.js";

const KINDS = [["mixture", "Mixtures"], ["adapter", "Adapters"], ["residual", "Residuals"]];
const LARGEST = 2;

export class LinkEditor {
  #parts = []; // {name, weight}
  #models = [];
  #label;
  #list = el("ol", { className: "link" });
  #add = el("select");
  #text = el("code", { className: "model-text" });
  #problem = el("p", { className: "problem", hidden: true });
  #root;

  constructor(root, label) {
    this.#label = label;
    this.#root = root;
    this.#add.setAttribute("aria-label", `Add to ${label}`);
    this.#add.addEventListener("change", () => this.#append(this.#add.value));
    const title = el("h3", { textContent: label, className: "compare-only" });
    root.append(title, this.#list, this.#add, el("p", { className: "small" }, this.#text), this.#problem);
    this.#render();
  }

  /** What the server offers; names that are gone leave the link. */
  offer(models) {
    this.#models = models;
    const known = new Set(models.map((model) => model.id));
    const gone = this.#parts.filter((part) => !known.has(part.name));
    this.#parts = this.#parts.filter((part) => known.has(part.name));
    this.#render();
    if (gone.length) announce(`${gone.map((part) => part.name).join(", ")}: no longer loaded, taken out of the link`);
  }

  /** The API's `model`; empty where this key may not use the base model and nothing is chosen. */
  get model() {
    if (!this.#parts.length) return this.#models.find((model) => model.kind === "base")?.id ?? "";
    return this.#parts.map(({ name, weight }) => (weight === 1 ? name : `${name}:${weight}`)).join("+");
  }

  /** The mixtures of the link with their experts, in the order of the answers' scalings. */
  get mixtures() {
    return this.#parts
      .map((part) => this.#models.find((model) => model.id === part.name))
      .filter((model) => model?.kind === "mixture")
      .map((model) => ({ name: model.id, experts: model.experts }));
  }

  #append(name) {
    if (!name) return;
    this.#parts.push({ name, weight: 1 });
    this.#render();
    this.#list.lastElementChild.querySelector("input").focus();
  }

  #render() {
    this.#list.replaceChildren(...this.#parts.map((part, place) => this.#row(part, place)));
    this.#renderChoices();
    this.#renderText();
  }

  #renderChoices() {
    const used = new Set(this.#parts.map((part) => part.name));
    const title = this.#parts.length ? "Add to the link…" : "Choose an adapter…";
    const first = el("option", { value: "", textContent: title });
    const groups = KINDS.map(([kind, title]) => {
      const names = this.#models.filter((model) => model.kind === kind && !used.has(model.id));
      const options = names.map((model) => el("option", { value: model.id, textContent: model.id }));
      return options.length ? el("optgroup", { label: title }, ...options) : null;
    });
    this.#add.replaceChildren(first, ...groups.filter(Boolean));
    this.#add.disabled = !groups.some(Boolean);
  }

  #renderText() {
    const { model } = this;
    this.#text.textContent = model;
    this.#problem.hidden = Boolean(model) || !this.#models.length;
    this.#problem.textContent = "This key may not use the base model alone: add an adapter.";
  }

  #row(part, place) {
    const id = `${this.#root.id}-${place}`;
    const slider = this.#number(part, "range", `Weight of ${part.name}`);
    const field = this.#number(part, "number", `Weight of ${part.name}, as a number`);
    slider.addEventListener("input", () => { field.value = slider.value; this.#weigh(part, slider.value); });
    field.addEventListener("input", () => { slider.value = field.value; this.#weigh(part, field.value); });
    const move = (step, sign, text) => {
      const button = el("button", { type: "button", className: "icon", textContent: sign, title: text });
      button.setAttribute("aria-label", `${text}: ${part.name}`);
      button.disabled = place + step < 0 || place + step >= this.#parts.length;
      button.addEventListener("click", () => this.#move(place, step));
      return button;
    };
    const remove = el("button", { type: "button", className: "icon", textContent: "×", title: "Remove" });
    remove.setAttribute("aria-label", `Remove ${part.name}`);
    remove.addEventListener("click", () => this.#remove(place));
    const alone = this.#parts.length === 1;
    const buttons = alone ? [remove] : [move(-1, "↑", "Move up"), move(1, "↓", "Move down"), remove];
    return el(
      "li", { id },
      el("div", { className: "part-head" }, el("span", { className: "part-name", textContent: part.name }), ...buttons),
      el("div", { className: "part-weight" }, slider, field),
    );
  }

  #number(part, type, label) {
    const input = el("input", { type, min: -LARGEST, max: LARGEST, step: 0.05, value: part.weight });
    input.setAttribute("aria-label", label);
    return input;
  }

  #weigh(part, value) {
    const weight = Number.parseFloat(value);
    if (Number.isFinite(weight)) part.weight = weight;
    this.#renderText();
  }

  #move(place, step) {
    const [part] = this.#parts.splice(place, 1);
    this.#parts.splice(place + step, 0, part);
    this.#render();
    const buttons = this.#list.children[place + step].querySelectorAll("button");
    const same = buttons[step < 0 ? 0 : 1];
    (same.disabled ? buttons[step < 0 ? 1 : 0] : same).focus();
    announce(`${part.name} is now number ${place + step + 1} of the link`);
  }

  #remove(place) {
    const [part] = this.#parts.splice(place, 1);
    this.#render();
    this.#add.focus();
    announce(`${part.name} removed`);
  }
}
