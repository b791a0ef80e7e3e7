// One answer: its tokens as they come, what came with them at the end, and what can be done with it.

import { Aligner } from "./align.js";
import { TokenText } from "./answer_text.js";
import { decodeArray } from "./arrays.js";
import { button, copyButton, el, tell } from "./dom.js";
import { mixturesOf } from "./models.js";
import { expertLooks, wear } from "./palette.js";

const PRECISION = 1e4;
const rounded = (value) => Math.round(value * PRECISION) / PRECISION;

export class Answer {
  tokens = []; // {text, logprob, top, start, end, spans, means, differs}
  prompt = []; // the same of the prompt as it was read, without logprob; for mixtures, at the end
  text = "";
  scalings = null; // [{mixture, experts, layers, shape, data}], of prompt and answer
  attention = null;
  ended = null; // null while it streams
  chosen = null; // by `auto`: {model, score}
  format = "plain";
  #aligner = new Aligner();
  #started = performance.now();
  #firstAt = null;
  #lastAt = null;
  #head = el("header", { className: "answer-head" });
  #foot = el("p", { className: "answer-foot muted small" });
  #changes = el("p", { className: "changes small", hidden: true });
  #errors = el("div");
  #prompt = el("details", { className: "prompt-read", hidden: true });
  #tools = el("div", { className: "tools" });

  constructor(asked) {
    this.asked = asked; // {column, model, messages, mixtures, seed, steer, ...}: what makes it again
    this.body = new TokenText(`Answer of ${asked.model}`, this.tokens, []);
    this.read = new TokenText("Prompt as it was read", this.prompt, []);
    this.element = el("article", { className: "answer streams", "aria-label": `${asked.model}` });
    const below = el("div", { className: "answer-below" }, this.#errors, this.#changes, this.#prompt, this.#foot, this.#tools);
    this.element.append(this.#head, this.body.element, below);
    for (const part of [this.body, this.read]) part.element.answer = this;
    this.#useMixtures(asked.mixtures);
    this.#showTools();
  }

  /** As `record` has kept it. */
  static from(record) {
    const answer = new Answer(record.asked);
    answer.text = answer.body.text = record.text;
    for (const [text, logprob, start, end, means, top] of record.tokens) {
      answer.tokens.push({ text, logprob, start: start ?? undefined, end: end ?? undefined, means, top, spans: [] });
    }
    answer.chosen = record.chosen;
    if (record.chosen) answer.#useMixtures(record.mixtures);
    if (record.error) answer.refuse(new Error(record.error));
    answer.end(record.error ? "error" : (record.ended ?? "stopped"));
    return answer;
  }

  /** What the browser keeps of it: neither scalings of single layers nor attention. */
  record() {
    const tokens = this.tokens.map(({ text, logprob, start, end, means, top }) => [
      text, rounded(logprob), start ?? null, end ?? null, means?.map(rounded) ?? null,
      top?.map(([other, value]) => [other, rounded(value)]) ?? null,
    ]);
    const { asked, text, ended, chosen, mixtures } = this;
    const error = ended === "error" ? this.#errors.textContent && this.error : null;
    return { asked: { ...asked, capture: null }, text, tokens, ended, chosen, mixtures, error };
  }

  /** Take a chunk's choice. */
  add(choice) {
    if (choice.auto && !this.chosen) this.#choose(choice.auto);
    const entries = choice.logprobs?.content ?? [];
    if (entries.length) this.#lastAt = performance.now();
    if (entries.length && this.#firstAt === null) this.#firstAt = this.#lastAt;
    const first = this.tokens.length;
    for (const { token, logprob, top_logprobs: top } of entries) {
      const others = (top ?? []).map((one) => [one.token, one.logprob]);
      this.tokens.push({ text: token, logprob, top: others, start: undefined, end: undefined, spans: [], means: null });
    }
    const text = choice.delta?.content ?? "";
    this.text += text;
    this.body.text = this.text;
    this.#place(this.#aligner.add(text, entries.map((entry) => entry.token)));
    // Each entry is of the token before: the one that was run to give this one.
    choice.token_scalings?.values.forEach((values, place) => this.#weigh(first + place - 1, values.flat()));
    if (choice.scalings) this.#keepScalings(choice.scalings);
    if (choice.captured_attention) this.#keepAttention(choice.captured_attention);
    if (choice.finish_reason) this.end(choice.finish_reason);
    else {
      this.body.draw(this.format, false);
      this.#tell();
    }
  }

  /** `how`: the API's finish_reason, "stopped", or an error. */
  end(how) {
    if (this.ended !== null) return;
    this.#place(this.#aligner.finish());
    this.element.classList.remove("streams");
    this.ended = how instanceof Error ? "error" : how;
    this.body.draw(this.format, true);
    this.#tell();
    this.#showTools();
  }

  show(format) {
    this.format = format;
    this.body.draw(format, this.ended !== null);
  }

  refuse(error, ...actions) {
    this.end(error);
    const { code, param, requestId } = error;
    this.error = error.message;
    const facts = [code, param && `field ${param}`, requestId && `request ${requestId}`];
    const told = facts.filter(Boolean).join(" · ");
    const text = el("p", { textContent: error.message });
    const details = told ? el("p", { className: "muted small", textContent: told }) : null;
    const again = button("Try again", () => tell(this.element, "again", { answer: this, changes: {} }));
    const row = el("div", { className: "row" }, again, ...actions);
    this.#errors.replaceChildren(el("div", { className: "refusal", role: "alert" }, text, details, row));
  }

  /** Mark what differs from the reference: {ranges, words, first, isSame}, or null for nothing. */
  mark(changes, name) {
    const ranges = changes?.ranges ?? [];
    let at = 0;
    for (const token of this.tokens) {
      while (at < ranges.length && ranges[at][1] <= token.start) at += 1;
      token.differs = at < ranges.length && token.end > ranges[at][0] && token.start < ranges[at][1];
      this.body.paint(token);
    }
    this.#changes.hidden = !changes;
    if (!changes) return;
    const counts = ranges.length ? `${ranges.length} of ${changes.words} words` : "words are left out";
    const told = `Differs from ${name}: ${counts}, from word ${changes.first + 1} on`;
    this.#changes.textContent = changes.isSame ? `The same words as ${name}` : told;
  }

  /** The scalings in all layers of one of `tokens`: {mixture, experts, layers, values} for each mixture. */
  scalingsOf(tokens, index) {
    const row = tokens === this.prompt ? index : this.prompt.length + index;
    return (this.scalings ?? []).map(({ mixture, experts, layers, shape, data }) => {
      const size = shape[1] * shape[2];
      return { mixture, experts, layers, values: data.subarray(row * size, (row + 1) * size) };
    });
  }

  #useMixtures(mixtures) {
    this.mixtures = mixtures;
    this.experts = expertNames(mixtures);
    this.looks = this.body.looks = this.read.looks = expertLooks(this.experts.length);
    this.#showHead();
  }

  #choose(chosen) {
    this.chosen = chosen;
    this.#useMixtures(mixturesOf(chosen.model));
  }

  #showHead() {
    const legend = this.experts.map((name, index) => {
      const swatch = el("span", { className: "swatch" });
      wear(swatch, this.looks[index]);
      return el("li", {}, swatch, name);
    });
    const list = legend.length ? el("ul", { className: "legend", "aria-label": "Experts" }, ...legend) : null;
    const { model, steer } = this.asked;
    const auto = this.chosen ? ` → ${this.chosen.model} (${this.chosen.score.toFixed(2)})` : "";
    const steered = steer.map(({ text, strength }) => `“${text.slice(0, 40)}” × ${strength}`).join(", ");
    const note = steered ? el("span", { className: "steered small", textContent: `steered: ${steered}` }) : null;
    this.#head.replaceChildren(...[el("code", { textContent: model + auto }), note, list].filter(Boolean));
  }

  #showTools() {
    const { model } = this.asked;
    const does = (name, changes) => tell(this.element, name, { answer: this, changes });
    const curl = button("curl", () => does("curl"), { label: `Show the answer of ${model} as curl`, className: "quiet" });
    const seed = () => does("again", { seed: Math.floor(Math.random() * 2 ** 31) });
    const all = [curl];
    if (this.ended !== null) {
      all.unshift(
        copyButton(`Copy the answer of ${model}`, () => this.text),
        button("Regenerate", seed, { label: `Regenerate the answer of ${model}`, className: "quiet" }),
      );
      all.push(button("Remove", () => does("remove"), { label: `Remove the answer of ${model}`, className: "quiet" }));
    }
    this.#tools.replaceChildren(...all);
  }

  #place(found) {
    for (const [index, text] of found) {
      const token = this.tokens[index];
      token.start ??= this.#placed;
      this.#placed += text.length;
      token.end = this.#placed;
    }
  }
  #placed = 0;

  #weigh(index, values) {
    if (index < 0 || !values.length) return; // the prompt's last token; no mixture
    this.tokens[index].means = values;
    this.body.paint(this.tokens[index]);
  }

  #keepScalings(rows) {
    if (!rows.length) return;
    this.scalings = rows.map(({ values, ...row }) => ({ ...row, ...decodeArray(values) }));
    const count = rows[0].tokens.length - (this.tokens.length - 1); // the answer's last token was never run
    rows[0].tokens.slice(0, count).forEach((text, index) => {
      const means = this.scalingsOf(this.prompt, index).flatMap(meanOfLayers);
      const start = this.read.text.length;
      this.read.text += text;
      this.prompt.push({ text, means, start, end: this.read.text.length, spans: [] });
    });
    this.read.draw("plain", true);
    const title = el("summary", { className: "muted small", textContent: `Prompt as read, ${count} tokens` });
    this.#prompt.replaceChildren(title, this.read.element);
    this.#prompt.hidden = false;
  }

  #keepAttention({ layers, heads, query_positions: queries, tokens, weights }) {
    this.attention = { layers, heads, queries, tokens, ...decodeArray(weights) };
  }

  #tell() {
    const count = this.tokens.length;
    const seconds = this.#firstAt === null ? 0 : (this.#lastAt - this.#firstAt) / 1000;
    const facts = [];
    if (count) facts.push(`${count} ${count === 1 ? "token" : "tokens"}`);
    if (count > 1 && seconds > 0) facts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    if (this.#firstAt !== null) facts.push(`first after ${((this.#firstAt - this.#started) / 1000).toFixed(2)} s`);
    if (this.ended === null && !count) facts.push("waiting…");
    if (this.ended === "length") facts.push("cut at the max tokens");
    if (this.ended === "stopped") facts.push("stopped");
    if (this.ended !== null && this.asked.temperature !== 0) facts.push(`seed ${this.asked.seed}`);
    this.#foot.textContent = facts.join(" · ");
  }
}

/** An expert without the mixture that it came with. */
export const shortName = (expert) => expert.slice(expert.lastIndexOf("/") + 1);

const expertNames = (mixtures) =>
  mixtures.flatMap(({ name, experts }) =>
    experts.map((expert) => (mixtures.length === 1 ? shortName(expert) : `${name}: ${shortName(expert)}`)),
  );

/** One value for each expert. */
function meanOfLayers({ experts, layers, values }) {
  const count = experts.length;
  return experts.map((_, expert) => {
    let sum = 0;
    for (let layer = 0; layer < layers.length; layer += 1) sum += values[layer * count + expert];
    return sum / layers.length;
  });
}
