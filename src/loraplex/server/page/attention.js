// What the model looked at when it chose a token: captured attention over prompt and answer.

import { button, el, visible } from "./dom.js";
import { AttentionOverview } from "./overview.js";

const MOST = 6; // of the list

export class AttentionView {
  #layer = el("select");
  #head = el("select");
  #skipFirst = el("input", { type: "checkbox", checked: true });
  #text = el("p", { className: "looked", tabIndex: 0 });
  #list = el("ol", { className: "looked-list small" });

  /** `index`: of the answer's token. `kept`: the layer and head of the view before. */
  constructor(attention, index, kept) {
    Object.assign(this, { attention, index, kept });
    fill(this.#layer, "all layers", attention.layers.map((layer) => `layer ${layer}`), kept.layer);
    const heads = attention.heads?.map((head) => `head ${head}`) ?? [];
    fill(this.#head, "all heads", heads, kept.head);
    this.#layer.setAttribute("aria-label", "Layer");
    this.#head.setAttribute("aria-label", "Head");
    this.#text.setAttribute("aria-label", "Tokens by their attention");
    this.#head.disabled = !heads.length;
    this.#skipFirst.checked = kept.skipFirst;
    for (const input of [this.#layer, this.#head, this.#skipFirst]) {
      input.addEventListener("change", () => this.#show());
    }
    const skip = el("label", { className: "check small" }, this.#skipFirst);
    skip.append(" Leave out the first token, where unused attention goes");
    this.overview = this.#overview();
    this.element = el(
      "div", { className: "attention" },
      el("div", { className: "row" }, this.#layer, this.#head),
      skip,
      this.#list, this.#text,
      el("div", { className: "row between" }, el("h3", { textContent: "All layers and heads" }),
        button("Enlarge", () => this.#enlarge(), { className: "quiet", label: "Enlarge the overview of attention" })),
      this.overview.element,
    );
    this.#show();
  }

  #overview() {
    const chosen = { layer: this.#layer.value, head: this.#head.value };
    return new AttentionOverview(this.attention, this.index, chosen, (layer, head) => {
      this.#layer.value = layer;
      this.#head.value = head;
      this.#show();
    });
  }

  #enlarge() {
    const large = this.#overview();
    const close = button("Close", () => dialog.close());
    const head = el("div", { className: "row between" }, el("h2", { textContent: "Attention of all layers and heads" }), close);
    const dialog = el("dialog", { className: "large" }, head, large.element);
    dialog.setAttribute("aria-label", "Attention of all layers and heads");
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    large.draw();
  }

  /** The weights of the chosen layers and heads, averaged: one for each earlier token. */
  #weights() {
    const { shape, data, queries } = this.attention;
    const [layers, heads, numQueries, keys] = shape;
    const seen = queries[this.index] + 1;
    const mean = new Float32Array(seen);
    const pick = (select, count) => (select.value === "" ? [...Array(count).keys()] : [Number(select.value)]);
    const [ofLayers, ofHeads] = [pick(this.#layer, layers), pick(this.#head, heads)];
    for (const layer of ofLayers) {
      for (const head of ofHeads) {
        const start = ((layer * heads + head) * numQueries + this.index) * keys;
        for (let key = 0; key < seen; key += 1) mean[key] += data[start + key];
      }
    }
    return mean.map((value) => value / (ofLayers.length * ofHeads.length));
  }

  #show() {
    Object.assign(this.kept, { layer: this.#layer.value, head: this.#head.value, skipFirst: this.#skipFirst.checked });
    this.overview.chosen = { layer: this.#layer.value, head: this.#head.value };
    this.overview.draw();
    const weights = this.#weights();
    const { tokens } = this.attention;
    const first = this.#skipFirst.checked && weights.length > 1 ? 1 : 0;
    const most = weights.subarray(first).reduce((a, b) => Math.max(a, b), 1e-9);
    this.#text.replaceChildren(...[...weights].map((weight, key) => {
      const title = `${visible(tokens[key])} ${weight.toFixed(3)}`;
      const span = el("span", { className: "key", textContent: tokens[key], title });
      span.style.setProperty("--weight", key < first ? 0 : (weight / most).toFixed(3));
      return span;
    }));
    const order = [...weights.keys()].slice(first).sort((a, b) => weights[b] - weights[a]).slice(0, MOST);
    this.#list.replaceChildren(...order.map((key) => {
      const weight = el("span", { className: "number", textContent: weights[key].toFixed(3) });
      return el("li", {}, el("code", { textContent: visible(tokens[key]) }), weight);
    }));
  }
}

function fill(select, all, names, chosen) {
  const options = [el("option", { value: "", textContent: all })];
  names.forEach((name, place) => options.push(el("option", { value: String(place), textContent: name })));
  select.replaceChildren(...options);
  if (options.some((option) => option.value === chosen)) select.value = chosen;
}
