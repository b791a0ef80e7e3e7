// What is loaded, and loading, pinning and unloading it by keys that may.

import { loadAdapter, setPinned, unloadAdapter } from "./api.js";
import { announce, button, byId, el } from "./dom.js";

const SURE_MS = 4000; // in which a second press unloads

export class LoadedAdapters {
  #panel = byId("adapters-panel");
  #form = byId("load-form");
  #problem = byId("load-problem");
  onChange = () => {}; // something was loaded, pinned or unloaded
  onError = () => {};

  constructor() {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#load();
    });
  }

  /** `data` of /v1/adapters, and whether this key may load anything. */
  show(data, mayLoad) {
    this.#form.hidden = !mayLoad;
    if (this.#panel.contains(document.activeElement)) return; // a button that is about to be pressed
    if (!data.length) {
      this.#panel.replaceChildren(el("p", { className: "muted small", textContent: "No adapters are loaded." }));
      return;
    }
    const head = ["name", "where", "used", ""].map((text) => el("th", { scope: "col", textContent: text }));
    const rows = data.map((one) => this.#row(one));
    const parts = [el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)];
    this.#panel.replaceChildren(el("table", { className: "loaded" }, ...parts));
  }

  fail(text) {
    const again = button("Try again", () => this.onChange());
    this.#panel.replaceChildren(el("p", { className: "problem small", textContent: text }), again);
  }

  #row({ name, kind, tier, version, pinned, in_use: inUse, may_load: mayLoad }) {
    const details = kind === "adapter" ? `version ${version}` : kind;
    const where = tier ? el("span", { className: `tier ${tier}`, textContent: tier }) : "";
    const tools = mayLoad ? [kind === "residual" ? null : this.#pin(name, pinned), this.#unload(name)] : [];
    return el("tr", {},
      el("th", { scope: "row" }, name, el("span", { className: "muted small block", textContent: details })),
      el("td", {}, where),
      el("td", { className: "number", textContent: inUse || "–" }),
      el("td", {}, ...tools));
  }

  #pin(name, pinned) {
    const made = button(pinned ? "pinned" : "pin", () => {
      this.#do(made, () => setPinned(name, !pinned), `${name} is ${pinned ? "no longer pinned" : "pinned"}`);
    }, { className: "small", label: `Pin ${name}` });
    made.setAttribute("aria-pressed", String(pinned));
    return made;
  }

  /** Asks once more, as what is unloaded has to be loaded from its folder again. */
  #unload(name) {
    let isSure = false;
    const made = button("unload", () => {
      if (isSure) {
        this.#do(made, () => unloadAdapter(name), `${name} is unloaded`);
        return;
      }
      isSure = true;
      made.textContent = "sure?";
      announce(`Press once more to unload ${name}`);
      setTimeout(() => { isSure = false; made.textContent = "unload"; }, SURE_MS);
    }, { className: "small", label: `Unload ${name}` });
    return made;
  }

  async #do(made, work, told) {
    made.disabled = true;
    try {
      await work();
      announce(told);
    } catch (error) {
      this.onError(error.message);
    }
    made.blur();
    this.onChange();
  }

  async #load() {
    const [name, path] = [byId("load-name").value.trim(), byId("load-path").value.trim()];
    const submit = this.#form.querySelector("[type=submit]");
    submit.disabled = true;
    this.#problem.hidden = true;
    try {
      await loadAdapter(name, path);
      announce(`${name} is loaded`);
      this.#form.reset();
    } catch (error) {
      this.#problem.textContent = error.message;
      this.#problem.hidden = false;
    } finally {
      submit.disabled = false;
      this.onChange();
    }
  }
}
