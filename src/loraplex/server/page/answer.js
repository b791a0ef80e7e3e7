// One answer: its tokens as they come, their colours, and what came with them at the end.

import { Aligner } from "./align.js";
import { decodeArray } from "./arrays.js";
import { el } from "./dom.js";
import { expertColors, leader } from "./palette.js";

const SHORT_PROMPT = 160; // tokens; a longer one is folded

export class Answer {
  tokens = []; // {text, logprob, span, means}
  prompt = []; // the same of the prompt as it was read, without logprob; for mixtures, at the end
  text = "";
  scalings = null; // [{mixture, experts, layers, shape, data}], of prompt and answer
  attention = null;
  ended = null; // null while it streams
  #aligner = new Aligner();
  #started = performance.now();
  #firstAt = null;
  #body = el("div", { className: "answer-text", tabIndex: 0 });
  #foot = el("p", { className: "answer-foot muted small" });
  #errors = el("div");
  #read = el("div", { className: "answer-text", tabIndex: 0 });
  #prompt = el("details", { className: "prompt-read", hidden: true });

  constructor(asked) {
    this.asked = asked; // {model, mixtures, seed, capture, ...}: what makes it again
    const isOne = asked.mixtures.length === 1;
    this.experts = asked.mixtures.flatMap(({ name, experts }) =>
      experts.map((expert) => (isOne ? shortName(expert) : `${name}: ${shortName(expert)}`)),
    );
    this.colors = expertColors(this.experts.length);
    this.#body.setAttribute("aria-label", `Answer of ${asked.model}`);
    this.#read.setAttribute("aria-label", "Prompt as it was read");
    this.element = el("article", { className: "answer" });
    this.element.append(this.#head(), this.#body, this.#errors, this.#prompt, this.#foot);
    for (const [part, tokens] of [[this.#body, this.tokens], [this.#read, this.prompt]]) {
      part.setAttribute("role", "group");
      Object.assign(part, { answer: this, tokens }); // the inspector finds them by a token's element
    }
    this.element.classList.add("streams");
  }

  #head() {
    const legend = this.experts.map((name, index) => {
      const swatch = el("span", { className: "swatch" });
      swatch.style.setProperty("--expert", this.colors[index]);
      return el("li", {}, swatch, name);
    });
    const list = legend.length ? el("ul", { className: "legend", "aria-label": "Experts" }, ...legend) : null;
    return el("header", { className: "answer-head" }, el("code", { textContent: this.asked.model }), list);
  }

  /** Take a chunk's choice. */
  add(choice) {
    const entries = choice.logprobs?.content ?? [];
    if (entries.length && this.#firstAt === null) this.#firstAt = performance.now();
    const first = this.tokens.length;
    for (const { token, logprob } of entries) this.tokens.push({ text: token, logprob, span: null, means: null });
    const text = choice.delta?.content ?? "";
    this.text += text;
    this.#place(this.#aligner.add(text, entries.map((entry) => entry.token)));
    // Each entry is of the token before: the one that was run to give this one.
    choice.token_scalings?.values.forEach((values, place) => this.#weigh(first + place - 1, values.flat()));
    if (choice.scalings) this.#keepScalings(choice.scalings);
    if (choice.captured_attention) this.#keepAttention(choice.captured_attention);
    if (choice.finish_reason) this.end(choice.finish_reason);
    else this.#tell();
  }

  /** `how`: the API's finish_reason, "stopped", or an error. */
  end(how) {
    if (this.ended !== null) return;
    this.#place(this.#aligner.finish());
    this.element.classList.remove("streams");
    this.ended = how instanceof Error ? "error" : how;
    this.#tell();
  }

  refuse(error, ...actions) {
    this.end(error);
    const { code, param, requestId } = error;
    const facts = [code, param && `field ${param}`, requestId && `request ${requestId}`];
    const told = facts.filter(Boolean).join(" · ");
    const text = el("p", { textContent: error.message });
    const details = told ? el("p", { className: "muted small", textContent: told }) : null;
    this.#errors.replaceChildren(el("div", { className: "refusal", role: "alert" }, text, details, ...actions));
  }

  /** The scalings in all layers of one of `tokens`: {mixture, experts, layers, values} for each mixture. */
  scalingsOf(tokens, index) {
    const row = tokens === this.prompt ? index : this.prompt.length + index;
    return (this.scalings ?? []).map(({ mixture, experts, layers, shape, data }) => {
      const size = shape[1] * shape[2];
      return { mixture, experts, layers, values: data.subarray(row * size, (row + 1) * size) };
    });
  }

  #place(found) {
    for (const [index, text] of found) {
      const token = this.tokens[index];
      if (token.span) token.span.append(text);
      else this.#body.append(this.#span(token, text, index));
    }
  }

  #span(token, text, index) {
    token.span = el("span", { className: "token", textContent: text });
    token.span.dataset.index = index;
    if (token.means) this.#paint(token);
    return token.span;
  }

  #weigh(index, values) {
    if (index < 0) return; // the prompt's last token
    this.tokens[index].means = values;
    this.#paint(this.tokens[index]);
  }

  #paint({ span, means }) {
    if (!span) return;
    const { index, margin } = leader(means);
    span.style.setProperty("--expert", this.colors[index]);
    span.style.setProperty("--margin", margin.toFixed(3));
    span.classList.add("led");
  }

  #keepScalings(rows) {
    if (!rows.length) return;
    this.scalings = rows.map(({ values, ...row }) => ({ ...row, ...decodeArray(values) }));
    const count = rows[0].tokens.length - (this.tokens.length - 1); // the answer's last token was never run
    rows[0].tokens.slice(0, count).forEach((text, index) => {
      this.prompt.push({ text, means: this.scalingsOf(this.prompt, index).flatMap(meanOfLayers) });
    });
    this.#read.append(...this.prompt.map((token, index) => this.#span(token, token.text, index)));
    const title = el("summary", { className: "muted small", textContent: `Prompt as read, ${count} tokens` });
    this.#prompt.append(title, this.#read);
    Object.assign(this.#prompt, { hidden: false, open: count <= SHORT_PROMPT });
  }

  #keepAttention({ layers, heads, query_positions: queries, tokens, weights }) {
    this.attention = { layers, heads, queries, tokens, ...decodeArray(weights) };
  }

  #tell() {
    const count = this.tokens.length;
    const seconds = this.#firstAt === null ? 0 : (performance.now() - this.#firstAt) / 1000;
    const facts = [];
    if (count) facts.push(`${count} ${count === 1 ? "token" : "tokens"}`);
    if (count > 1 && seconds > 0) facts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    if (this.#firstAt !== null) facts.push(`first after ${((this.#firstAt - this.#started) / 1000).toFixed(2)} s`);
    if (this.ended === null && !count) facts.push("waiting…");
    if (this.ended === "length") facts.push("cut at the most tokens");
    if (this.ended === "stopped") facts.push("stopped");
    if (this.ended !== null && this.asked.temperature !== 0) facts.push(`seed ${this.asked.seed}`);
    this.#foot.textContent = facts.join(" · ");
  }
}

/** An expert without the mixture that it came with. */
export const shortName = (expert) => expert.slice(expert.lastIndexOf("/") + 1);

/** One value for each expert. */
function meanOfLayers({ experts, layers, values }) {
  const count = experts.length;
  return experts.map((_, expert) => {
    let sum = 0;
    for (let layer = 0; layer < layers.length; layer += 1) sum += values[layer * count + expert];
    return sum / layers.length;
  });
}
