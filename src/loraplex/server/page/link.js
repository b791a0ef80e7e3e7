// The editor of one choice: no adapter is the base model, one is that adapter, several are a link.

import { announce, button, el } from "./dom.js";
import { AUTO, mixturesOf, models, modelParts, modelText } from "./models.js";

const KINDS = [["mixture", "Mixtures"], ["adapter", "Adapters"], ["residual", "Residuals"]];
const LARGEST = 1000; // that the server takes

export class LinkEditor {
  #parts = []; // {name, weight}
  #label;
  #list = el("ol", { className: "link" });
  #add = el("select");
  #text = el("code", { className: "model-text" });
  #problem = el("p", { className: "problem", hidden: true });
  #title = el("h3", {});
  #root;
  onChange = () => {};

  /** `root` has an id; `label` names the column. */
  constructor(root, label, onRemove) {
    this.#label = label;
    this.#root = root;
    this.#add.setAttribute("aria-label", `Add to ${label}`);
    this.#add.addEventListener("change", () => this.#append(this.#add.value));
    const remove = button("×", onRemove, { className: "icon", label: `Remove column ${label}` });
    this.#title.textContent = label;
    const head = el("div", { className: "column-head" }, this.#title, remove);
    root.append(head, this.#list, this.#add, el("p", { className: "small" }, this.#text), this.#problem);
    this.#render();
  }

  get id() {
    return this.#label;
  }

  /** The models have changed; names that are gone leave the link. */
  refresh() {
    const gone = this.#parts.filter((part) => !models.find(part.name));
    this.#parts = this.#parts.filter((part) => models.find(part.name));
    this.#render();
    if (gone.length) announce(`${gone.map((part) => part.name).join(", ")}: no longer loaded, taken out of the link`);
  }

  /** The API's `model`; empty where this key may not use the base model and nothing is chosen. */
  get model() {
    return modelText(this.#parts);
  }

  set model(text) {
    this.#parts = modelParts(text);
    this.#render();
  }

  get mixtures() {
    return mixturesOf(this.model);
  }

  get #isAuto() {
    return this.#parts[0]?.name === AUTO;
  }

  #append(name) {
    if (!name) return;
    this.#parts = name === AUTO ? [] : this.#parts;
    this.#parts.push({ name, weight: 1 });
    this.#render();
    this.#list.lastElementChild.querySelector("input, button").focus();
  }

  #render() {
    this.#list.replaceChildren(...this.#parts.map((part, place) => this.#row(part, place)));
    this.#renderChoices();
    this.#renderText();
  }

  #renderChoices() {
    const used = new Set(this.#parts.map((part) => part.name));
    const title = this.#parts.length ? "Add to the link…" : "Choose an adapter…";
    const first = el("option", { value: "", textContent: this.#isAuto ? "Each prompt chooses" : title });
    const groups = KINDS.map(([kind, title]) => {
      const names = models.all.filter((model) => model.kind === kind && !used.has(model.id));
      const options = names.map((model) => el("option", { value: model.id, textContent: model.id }));
      return options.length ? el("optgroup", { label: title }, ...options) : null;
    });
    const offersAuto = models.find(AUTO) && !this.#parts.length;
    if (offersAuto) groups.unshift(el("option", { value: AUTO, textContent: "auto: each prompt chooses" }));
    this.#add.replaceChildren(first, ...groups.filter(Boolean));
    this.#add.disabled = this.#isAuto || !groups.some(Boolean);
  }

  #renderText() {
    const { model } = this;
    this.#text.textContent = model;
    this.#problem.hidden = Boolean(model) || !models.all.length;
    this.#problem.textContent = "This key may not use the base model alone: add an adapter.";
    this.onChange();
  }

  #row(part, place) {
    const id = `${this.#root.id}-${place}`;
    const move = (step, sign, text) => {
      const made = button(sign, () => this.#move(place, step), { className: "icon", label: `${text}: ${part.name}` });
      made.disabled = place + step < 0 || place + step >= this.#parts.length;
      return made;
    };
    const remove = button("×", () => this.#remove(place), { className: "icon", label: `Remove ${part.name}` });
    const alone = this.#parts.length === 1;
    const buttons = alone ? [remove] : [move(-1, "↑", "Move up"), move(1, "↓", "Move down"), remove];
    const name = el("span", { className: "part-name", textContent: part.name });
    const head = el("div", { className: "part-head" }, name, ...buttons);
    return el("li", { id }, head, this.#isAuto ? null : this.#weight(part));
  }

  /** A slider from 0 to 1, and a field for whatever else. */
  #weight(part) {
    const slider = el("input", { type: "range", min: 0, max: 1, step: 0.05, value: part.weight });
    const field = el("input", { type: "number", min: -LARGEST, max: LARGEST, step: 0.05, value: part.weight });
    slider.setAttribute("aria-label", `Weight of ${part.name}`);
    field.setAttribute("aria-label", `Weight of ${part.name}, as a number`);
    slider.setAttribute("list", "weights");
    const mark = () => slider.classList.toggle("beyond", part.weight < 0 || part.weight > 1);
    slider.addEventListener("input", () => { field.value = slider.value; this.#weigh(part, slider.value); mark(); });
    field.addEventListener("input", () => { slider.value = field.value; this.#weigh(part, field.value); mark(); });
    mark();
    const scale = el("span", { className: "scale", "aria-hidden": "true" });
    scale.append(...["0", "½", "1"].map((textContent) => el("span", { textContent })));
    const track = el("div", { className: "slider" }, slider, scale);
    return el("div", { className: "part-weight" }, track, field);
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
