// The token under the pointer or the keyboard, and what its panel shows.

import { shortName } from "./answer.js";
import { AttentionView } from "./attention.js";
import { announce, byId, el, visible } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { leader } from "./palette.js";

export class Inspector {
  #panel = byId("token-panel");
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
    this.#answer = this.#tokens = this.#index = null;
    this.#isHeld = false;
    this.#panel.replaceChildren(el("p", { className: "muted", textContent: "Point at a token of an answer." }));
  }

  #focused({ target }) {
    const isNew = target.tokens?.length && this.#tokens !== target.tokens;
    if (isNew && target.matches(":focus-visible")) this.#choose(target, step(target.tokens, -1, 1), false);
  }

  #pointed(event, isClick) {
    const span = event.target.closest?.(".token");
    if (!span) {
      if (isClick) this.#isHeld = false;
      return;
    }
    if (this.#isHeld && !isClick) return;
    const index = Number(span.dataset.index);
    const isSame = isClick && this.#isHeld && this.#tokens === span.parentElement.tokens && this.#index === index;
    this.#choose(span.parentElement, index, isClick && !isSame);
  }

  #key(event) {
    const { tokens } = event.target;
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
    this.#choose(event.target, index, event.key === "Enter" || this.#isHeld);
    announce(this.#said());
  }

  #choose({ answer, tokens }, index, isHeld) {
    this.#unmark();
    this.#answer = answer;
    this.#tokens = tokens;
    this.#index = index;
    this.#isHeld = isHeld;
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.show());
  }

  #unmark() {
    this.#tokens?.[this.#index]?.span?.classList.remove("held", "current");
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
    token.span?.classList.add(this.#isHeld ? "held" : "current");
    const isPrompt = this.#tokens === this.#answer.prompt;
    const place = `${isPrompt ? "prompt token" : "token"} ${this.#index + 1}`;
    const chance = isPrompt ? "" : `, probability ${Math.exp(token.logprob).toFixed(3)}`;
    const parts = [
      el("p", { className: "token-head" }, el("code", { textContent: visible(token.text) }),
        el("span", { className: "muted small", textContent: place + chance })),
      ...this.#means(token),
      ...(isPrompt ? [] : this.#attention()),
      ...(token.means ? this.#heat() : []),
    ];
    this.#panel.replaceChildren(...parts);
  }

  #means(token) {
    const { experts, colors, asked, ended } = this.#answer;
    if (!asked.mixtures.length) return [];
    if (!token.means) {
      const isLast = "The last token was never run, so it has no scalings.";
      return [note(ended === null ? "Its scalings come with the next token." : isLast)];
    }
    const bars = el("ul", { className: "bars", "aria-label": "Mean scalings over layers" });
    const lead = leader(token.means);
    token.means.forEach((value, index) => bars.append(bar(experts[index], value, colors[index], index === lead.index)));
    return [bars];
  }

  #heat() {
    const { colors, ended } = this.#answer;
    const all = this.#answer.scalingsOf(this.#tokens, this.#index);
    if (!all.length) {
      return [note(`Layer by layer ${ended === null ? "when the answer is finished" : "only for finished answers"}.`)];
    }
    let first = 0;
    return all.flatMap((scalings) => {
      const stop = first + scalings.experts.length;
      const map = new HeatMap(scalings, scalings.experts.map(shortName), colors.slice(first, stop));
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
      return [el("h3", { textContent: "What it looked at" }), view.element];
    }
    if (!this.#isHeld) return [note("Click it, or press Enter, to hold it and to see what the model looked at.")];
    if (ended === null) return [note("Attention can be asked for when the answer is finished.")];
    const button = el("button", { type: "button", textContent: "Answer again with attention" });
    button.addEventListener("click", () => this.onCapture(this.#answer));
    return [button];
  }
}

/** The next token with a text, or `from`. */
function step(tokens, from, by) {
  let index = from + by;
  while (tokens[index] && !tokens[index].span) index += by;
  return tokens[index] ? index : from;
}

const note = (text) => el("p", { className: "muted small", textContent: text });

function bar(name, value, color, leads) {
  const fill = el("span", { className: "bar" });
  fill.style.setProperty("--value", Math.max(0, Math.min(1, value)));
  fill.style.setProperty("--expert", color);
  return el("li", { className: leads ? "leads" : "" },
    el("span", { className: "bar-name", textContent: name }), el("span", { className: "track" }, fill),
    el("span", { className: "number", textContent: value.toFixed(3) }));
}
