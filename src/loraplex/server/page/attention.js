// What the model looked at when it chose a token: captured attention over prompt and answer.

import { el, visible } from "./dom.js";

const MOST = 6; // of the list

export class AttentionView {
  #layer = el("select");
  #head = el("select");
  #skipFirst = el("input", { type: "checkbox", checked: true });
  #text = el("p", { className: "looked" });
  #list = el("ol", { className: "looked-list small" });

  /** `index`: of the answer's token. `kept`: the layer and head of the view before. */
  constructor(attention, index, kept) {
    this.attention = attention;
    this.index = index;
    this.kept = kept;
    fill(this.#layer, "all layers", attention.layers.map((layer) => `layer ${layer}`), kept.layer);
    const heads = attention.heads?.map((head) => `head ${head}`) ?? [];
    fill(this.#head, "all heads", heads, kept.head);
    this.#layer.setAttribute("aria-label", "Layer");
    this.#head.setAttribute("aria-label", "Head");
    this.#head.disabled = !heads.length;
    this.#skipFirst.checked = kept.skipFirst;
    for (const input of [this.#layer, this.#head, this.#skipFirst]) {
      input.addEventListener("change", () => this.#show());
    }
    const skip = el("label", { className: "check small" }, this.#skipFirst);
    skip.append(" Leave out the first token, where unused attention goes");
    this.element = el(
      "div", { className: "attention" },
      el("div", { className: "row" }, this.#layer, this.#head),
      skip,
      this.#list, this.#text,
    );
    this.#show();
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
    const weights = this.#weights();
    const { tokens } = this.attention;
    const first = this.#skipFirst.checked && weights.length > 1 ? 1 : 0;
    const most = Math.max(1e-9, ...weights.subarray(first));
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
  const options = names.length === 1 ? [] : [el("option", { value: "", textContent: all })];
  names.forEach((name, place) => options.push(el("option", { value: String(place), textContent: name })));
  if (!options.length) options.push(el("option", { value: "", textContent: all }));
  select.replaceChildren(...options);
  if (options.some((option) => option.value === chosen)) select.value = chosen;
}
