// Markdown as elements. marked finds what is what; no HTML is made of it, so whatever a model writes stays text.

import { lexer } from "./vendor/marked.js";
import { copyButton, el } from "./dom.js";

const LONGEST = 30_000; // characters; a longer text is shown as it is
const DEEPEST = 40; // levels of lists, quotes and emphasis
const SAFE = ["http:", "https:", "mailto:"];
const INLINE = { strong: "strong", em: "em", del: "del", codespan: "code" };

/** Elements for a text; `piece(start, stop)` gives the nodes of a range of it. What can't be read stays as it is. */
export function markdown(text, piece) {
  if (text.length > LONGEST) return piece(0, text.length);
  let tokens;
  try {
    tokens = lexer(text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // thousands of levels are too deep for the stack
    return piece(0, text.length);
  }
  return new Builder(text, piece).blocks(tokens);
}

class Builder {
  #at = 0; // all before it has been shown, or is a mark
  #depth = 0;

  constructor(text, piece) {
    Object.assign(this, { text, piece });
  }

  blocks(tokens) {
    return this.#nested(tokens, (token) => this.#block(token));
  }

  /** What is nested too deep is shown as it is. */
  #nested(tokens, build) {
    if (this.#depth >= DEEPEST) return tokens.flatMap(({ raw }) => this.#leaf(raw));
    this.#depth += 1;
    const made = tokens.flatMap((token) => this.#within(token, () => build(token)));
    this.#depth -= 1;
    return made;
  }

  /** Go to where a token begins, and behind it afterwards; one whose text was indented differently is met on the way. */
  #within(token, build) {
    const start = this.text.indexOf(token.raw, this.#at);
    if (start >= 0) this.#at = start;
    const made = build();
    if (start >= 0) this.#at = Math.max(this.#at, start + token.raw.length);
    return made;
  }

  #block(token) {
    switch (token.type) {
      case "space":
      case "def":
        return [];
      case "hr":
        return [el("hr")];
      case "heading":
        return [el("p", { className: "heading", role: "heading", "aria-level": token.depth + 2 }, ...this.#inline(token))];
      case "paragraph":
        return [el("p", {}, ...this.#inline(token))];
      case "text":
        return token.tokens ? this.#inline(token) : this.#leaf(token.text);
      case "blockquote":
        return [el("blockquote", {}, ...this.blocks(token.tokens))];
      case "code":
        return [this.#code(token)];
      case "list":
        return [this.#list(token)];
      case "table":
        return [this.#table(token)];
      default:
        return this.#inlineToken(token);
    }
  }

  #code({ text, lang }) {
    const language = el("span", { className: "muted small", textContent: (lang ?? "").slice(0, 40) });
    const head = el("div", { className: "code-head" }, language, copyButton("Copy the code", () => text));
    return el("div", { className: "code" }, head, el("pre", { tabIndex: 0 }, el("code", {}, ...this.#leaf(text))));
  }

  #list({ ordered, start, items }) {
    const rows = items.map((item) => this.#within(item, () => {
      const box = item.task ? [item.checked ? "☑ " : "☐ "] : [];
      return el("li", {}, ...box, ...this.blocks(item.tokens.filter(({ type }) => type !== "checkbox")));
    }));
    return ordered ? el("ol", { start: Number(start) || 1 }, ...rows) : el("ul", {}, ...rows);
  }

  #table({ header, rows }) {
    const cells = (tag, row) => el("tr", {}, ...row.map((cell) => el(tag, {}, ...this.#inline(cell))));
    const head = el("thead", {}, cells("th", header));
    const body = el("tbody", {}, ...rows.map((row) => cells("td", row)));
    return el("div", { className: "wide", tabIndex: 0 }, el("table", {}, head, body));
  }

  #inline({ tokens, text }) {
    if (!tokens?.length) return text ? this.#leaf(text) : [];
    return this.#nested(tokens, (token) => this.#inlineToken(token));
  }

  #inlineToken(token) {
    switch (token.type) {
      case "br":
        return [el("br")];
      case "link":
        return [this.#link(token)];
      case "strong":
      case "em":
      case "del":
        return [el(INLINE[token.type], {}, ...this.#inline(token))];
      case "codespan":
        return [el("code", {}, ...this.#leaf(token.text))];
      case "escape":
        return this.#leaf(token.text);
      case "text":
        return token.tokens ? this.#inline(token) : this.#leaf(token.text);
      default: // HTML and images: as they were written
        return this.#leaf(token.raw);
    }
  }

  #link(token) {
    const children = this.#inline(token);
    const isSafe = SAFE.includes(protocolOf(token.href));
    if (!isSafe) return el("span", { title: token.href }, ...children);
    return el("a", { href: token.href, target: "_blank", rel: "noopener noreferrer" }, ...children);
  }

  /** Text without marks, line by line, as marks such as an item's indentation may stand between them. */
  #leaf(text) {
    return text.split(/(?<=\n)/).flatMap((line) => {
      const start = this.text.indexOf(line, this.#at);
      if (!line || start < 0) return line ? [line] : [];
      this.#at = start + line.length;
      return this.piece(start, this.#at);
    });
  }
}

function protocolOf(href) {
  try {
    return new URL(href).protocol;
  } catch {
    return ""; // relative: it would lead into this server
  }
}
