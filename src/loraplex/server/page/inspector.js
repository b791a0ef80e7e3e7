// The token under the pointer or the keyboard, and what its panel shows.

import { shortName } from "./answer.js";
import { AttentionView } from "./attention.js";
import { announce, button, byId, el, visible } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { leader, wear } from "./palette.js";
import { ShareChart } from "./share.js";

export class Inspector {
  #panel = byId("token-panel");
  #share = byId("share-panel");
  #tapped = byId("tapped");
  #chart = null; // of #answer
  #answer = null;
  #tokens = null; // its tokens, or its prompt's
  #index = null;
  #isHeld = false; // chosen by a click or Enter: the pointer doesn't change it until the next
  #keptView = { layer: "", head: "", skipFirst: true };
  #frame = 0;

  /** `onCapture(answer)` is called to get an answer again with its attention. */
  constructor(turns, onCapture) {
    this.onCapture = onCapture;
    turns.addEventListener("pointerover", (event) => this.#pointed(event, false));
    turns.addEventListener("click", (event) => this.#pointed(event, true));
    turns.addEventListener("keydown", (event) => this.#key(event));
    turns.addEventListener("focusin", (event) => this.#focused(event));
    addEventListener("resize", () => this.show());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.show());
  }

  /** An answer was asked for again: the same place of the new one. */
  replace(old, answer) {
    if (this.#answer !== old) return;
    this.#tokens = this.#tokens === old.prompt ? answer.prompt : answer.tokens;
    this.#answer = answer;
    this.show();
  }

  clear() {
    this.#unmark();
    this.#answer = this.#tokens = this.#index = this.#chart = null;
    this.#isHeld = false;
    this.#panel.replaceChildren(el("p", { className: "muted", textContent: "Point at a token of an answer." }));
    this.#share.replaceChildren(note("Of an answer that a mixture gave."));
    this.#tapped.hidden = true;
  }

  /** What is looked at, for a link: {answer, isPrompt, token, view}, or null. */
  get focus() {
    if (this.#index === null || !this.#isHeld) return null;
    const isPrompt = this.#tokens === this.#answer.prompt;
    return { answer: this.#answer, isPrompt, token: this.#index, view: { ...this.#keptView } };
  }

  /** Look at the same in an answer. */
  look(answer, { isPrompt, token, view }) {
    Object.assign(this.#keptView, view);
    const tokens = isPrompt ? answer.prompt : answer.tokens;
    if (tokens[token]) this.#choose(answer, tokens, token, true);
  }

  #focused({ target }) {
    const { answer, tokens } = target;
    const isNew = tokens?.length && this.#tokens !== tokens;
    if (isNew && target.matches(":focus-visible")) this.#choose(answer, tokens, step(tokens, -1, 1), false);
  }

  #pointed(event, isClick) {
    const span = event.target.closest?.(".token");
    if (!span) {
      if (isClick && !event.target.closest("button, summary, input, textarea, select, a")) this.#isHeld = false;
      return;
    }
    if (this.#isHeld && !isClick) return;
    const index = Number(span.dataset.index);
    const { answer, tokens } = span.closest(".answer-text");
    const isSame = isClick && this.#isHeld && this.#tokens === tokens && this.#index === index;
    this.#choose(answer, tokens, index, isClick && !isSame);
  }

  #key(event) {
    const { answer, tokens } = event.target;
    if (!tokens?.length || event.altKey || event.ctrlKey || event.metaKey) return;
    const at = this.#tokens === tokens ? this.#index : -1;
    const targets = {
      ArrowRight: () => step(tokens, at, 1),
      ArrowLeft: () => step(tokens, at, -1),
      Home: () => step(tokens, -1, 1),
      End: () => step(tokens, tokens.length, -1),
      Enter: () => at,
    };
    if (!targets[event.key]) return;
    event.preventDefault();
    const index = targets[event.key]();
    if (index < 0) return;
    this.#choose(answer, tokens, index, event.key === "Enter" || this.#isHeld);
    announce(this.#said());
  }

  #choose(answer, tokens, index, isHeld) {
    this.#unmark();
    if (this.#answer !== answer) this.#chart = null;
    this.#answer = answer;
    this.#tokens = tokens;
    this.#index = index;
    this.#isHeld = isHeld;
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.show());
  }

  #unmark() {
    for (const span of this.#tokens?.[this.#index]?.spans ?? []) span.classList.remove("held", "current");
  }

  /** The token in words, for a screen reader. */
  #said() {
    const { text, means } = this.#tokens[this.#index];
    if (!means) return visible(text);
    const { index } = leader(means);
    return `${visible(text)}: ${this.#answer.experts[index]} ${means[index].toFixed(2)}`;
  }

  show() {
    const token = this.#tokens?.[this.#index];
    if (!token) return;
    this.#unmark();
    for (const span of token.spans) span.classList.add(this.#isHeld ? "held" : "current");
    const isPrompt = this.#tokens === this.#answer.prompt;
    const place = `${isPrompt ? "prompt token" : "token"} ${this.#index + 1}`;
    const chance = isPrompt ? "" : `, probability ${Math.exp(token.logprob).toFixed(3)}`;
    const parts = [
      el("p", { className: "token-head" }, el("code", { textContent: visible(token.text) }),
        el("span", { className: "muted small", textContent: place + chance })),
      ...alternatives(token),
      ...this.#means(token),
      ...(isPrompt ? [] : this.#attention()),
      ...(token.means ? this.#heat() : []),
    ];
    this.#panel.replaceChildren(...parts);
    this.#showShare(isPrompt);
    this.#showTapped(chance);
  }

  #showShare(isPrompt) {
    const isOld = this.#chart?.answer !== this.#answer || this.#answer.ended === null;
    if (isOld || !this.#chart.element.isConnected) {
      const answer = this.#answer;
      this.#chart = new ShareChart(answer, (index) => this.#choose(answer, answer.tokens, index, true));
      const hasAny = this.#chart.weighed.length > 0;
      this.#share.replaceChildren(hasAny ? this.#chart.element : note("Of an answer that a mixture gave."));
    }
    this.#chart.draw(isPrompt ? null : this.#index);
  }

  /** In a line where one types, for small screens. */
  #showTapped(chance) {
    this.#tapped.hidden = false;
    byId("tapped-text").textContent = this.#said() + chance;
  }

  #means(token) {
    const { experts, looks, mixtures, ended } = this.#answer;
    if (!mixtures.length) return [];
    if (!token.means) {
      const isLast = "The last token was never run, so it has no scalings.";
      return [note(ended === null ? "Its scalings come with the next token." : isLast)];
    }
    const bars = el("ul", { className: "bars", "aria-label": "Mean scalings over layers" });
    const lead = leader(token.means);
    token.means.forEach((value, index) => bars.append(bar(experts[index], value, looks[index], index === lead.index)));
    return [el("h3", { textContent: "Scalings of the experts, mean over layers" }), bars];
  }

  #heat() {
    const { looks, ended } = this.#answer;
    const all = this.#answer.scalingsOf(this.#tokens, this.#index);
    if (!all.length) {
      const kept = "Layer by layer only for answers that were asked for since the page was opened: regenerate it.";
      return [note(ended === null ? "Layer by layer when the answer is finished." : kept)];
    }
    let first = 0;
    return all.flatMap((scalings) => {
      const stop = first + scalings.experts.length;
      const map = new HeatMap(scalings, scalings.experts.map(shortName), looks.slice(first, stop));
      first = stop;
      const { columns, rows } = map.grid;
      const across = columns.length > 1 ? `, within an expert its ${columns.length} modules` : "";
      const same = map.isUniform ? " This mixture's head predicts one scaling for all layers." : "";
      const name = all.length > 1 ? `${scalings.mixture}. ` : "";
      const text = `${name}Down: ${rows.length} blocks. Across: experts${across}.${same}`;
      return [note(text), map.element];
    });
  }

  #attention() {
    const { attention, ended } = this.#answer;
    if (attention && this.#index < attention.queries.length) {
      const view = new AttentionView(attention, this.#index, this.#keptView);
      requestAnimationFrame(() => view.overview.draw());
      const again = attention.heads || ended === null ? null : this.#again("Answer again with each head");
      return [el("h3", { textContent: "What it looked at" }), view.element, again].filter(Boolean);
    }
    if (!this.#isHeld) return [note("Click it, or press Enter, to hold it and to see what the model looked at.")];
    if (ended === null) return [note("Attention can be asked for when the answer is finished.")];
    return [this.#again("Answer again with attention")];
  }

  #again(text) {
    return button(text, () => this.onCapture(this.#answer));
  }
}

/** The next token with a text, or `from`. */
function step(tokens, from, by) {
  let index = from + by;
  while (tokens[index] && !tokens[index].spans.length) index += by;
  return tokens[index] ? index : from;
}

const note = (text) => el("p", { className: "muted small", textContent: text });

/** The likeliest tokens at a place, the chosen one among them. */
function alternatives({ text, logprob, top }) {
  if (!top?.length) return [];
  const list = el("ul", { className: "bars alternatives", "aria-label": "Likeliest tokens here" });
  const isTold = top.some(([other]) => other === text);
  const rows = isTold ? top : [...top, [text, logprob]];
  for (const [other, value] of rows) list.append(bar(visible(other), Math.exp(value), null, other === text));
  return [el("h3", { textContent: "Likeliest tokens here" }), list];
}

function bar(name, value, look, leads) {
  const fill = el("span", { className: "bar" });
  fill.style.setProperty("--value", Math.max(0, Math.min(1, value)));
  if (look) wear(fill, look);
  return el("li", { className: leads ? "leads" : "" },
    el("span", { className: "bar-name", textContent: name }), el("span", { className: "track" }, fill),
    el("span", { className: "number", textContent: value.toFixed(3) }));
}
