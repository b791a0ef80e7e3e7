// A text whose pieces are its tokens' elements, as it is or with its markdown shown.

import { el } from "./dom.js";
import { markdown } from "./markdown.js";
import { leader, wear } from "./palette.js";

const REDRAW_MS = 120; // while it streams, a text with markdown is drawn anew this often

export class TokenText {
  #timer = 0;
  #drawn = 0; // characters, of a text as it is
  #format = "";
  element = el("div", { className: "answer-text", tabIndex: 0, role: "group" });
  text = "";

  /** `tokens`: {start, end, means, spans, differs}, whose places are known as far as they have an `end`. */
  constructor(label, tokens, looks) {
    Object.assign(this, { tokens, looks });
    this.element.setAttribute("aria-label", label);
    this.element.tokens = tokens; // the inspector finds them by a token's element
  }

  /** Show what is known now. `format`: "markdown" or "plain". */
  draw(format, isWhole) {
    if (format === "plain" && this.#format === "plain") return this.#append(isWhole);
    if (format === "plain" || isWhole || this.#format !== format) return this.#redraw(format, isWhole);
    this.#timer ||= setTimeout(() => this.#redraw(format, false), REDRAW_MS);
    return undefined;
  }

  /** A token's colour and marks, on all its elements. */
  paint(token) {
    for (const span of token.spans) {
      span.classList.toggle("differs", Boolean(token.differs));
      if (!token.means) continue;
      const { index, margin } = leader(token.means);
      wear(span, this.looks[index]);
      span.style.setProperty("--margin", margin.toFixed(3));
      span.classList.add("led");
    }
  }

  #redraw(format, isWhole) {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#format = format;
    for (const token of this.tokens) token.spans = [];
    this.#drawn = 0;
    this.element.classList.toggle("formatted", format === "markdown");
    if (format === "plain") {
      this.element.replaceChildren();
      this.#append(isWhole);
    } else {
      this.element.replaceChildren(...markdown(this.text, (start, stop) => this.#pieces(start, stop)));
    }
  }

  #append(isWhole) {
    const known = isWhole ? this.text.length : (this.tokens.findLast(({ end }) => end !== undefined)?.end ?? 0);
    if (known <= this.#drawn) return;
    const last = this.element.lastChild;
    const [first, ...rest] = this.#pieces(this.#drawn, known);
    const isMore = last?.dataset?.index !== undefined && last.dataset.index === first.dataset?.index;
    if (isMore) {
      const token = this.tokens[first.dataset.index];
      token.spans.splice(token.spans.indexOf(first), 1);
      last.append(first.textContent);
    } else this.element.append(first);
    this.element.append(...rest);
    this.#drawn = known;
  }

  /** The elements of a range; what belongs to no token is text alone. */
  #pieces(start, stop) {
    const made = [];
    let at = start;
    for (let index = this.#firstBehind(start); index < this.tokens.length && at < stop; index += 1) {
      const token = this.tokens[index];
      if (token.end === undefined || token.end <= at) continue;
      if (token.start >= stop) break;
      if (token.start > at) made.push(this.text.slice(at, token.start));
      const from = Math.max(at, token.start);
      at = Math.min(stop, token.end);
      made.push(this.#span(token, index, this.text.slice(from, at)));
    }
    if (at < stop) made.push(this.text.slice(at, stop));
    return made;
  }

  /** A place in the tokens at or before the first that ends behind `start`. */
  #firstBehind(start) {
    let [low, high] = [0, this.tokens.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((this.tokens[middle].end ?? 0) > start) high = middle;
      else if (this.tokens[middle].end === undefined) return 0; // tokens without a text are between others
      else low = middle + 1;
    }
    return low;
  }

  #span(token, index, text) {
    const span = el("span", { className: "token", textContent: text });
    span.dataset.index = index;
    token.spans.push(span);
    this.paint(token);
    return span;
  }
}
