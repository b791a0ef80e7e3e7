// Each expert's share over an answer: tokens across, the experts' mean scalings stacked.

import { el } from "./dom.js";
import { canvasFill, wear } from "./palette.js";

const HEIGHT = 72;
const MARK = 4; // above, for the token that is looked at

export class ShareChart {
  #canvas = el("canvas", { className: "heat share", tabIndex: 0, role: "img" });

  /** `onChoose(index)`: a token was pointed out. */
  constructor(answer, onChoose) {
    Object.assign(this, { answer, onChoose });
    this.weighed = answer.tokens.map((token, index) => ({ token, index })).filter(({ token }) => token.means);
    this.shares = this.weighed.map(({ token }) => sharesOf(token.means));
    const means = meanShares(this.shares, answer.experts.length);
    const told = means.map((share, expert) => `${answer.experts[expert]} ${percent(share)}`);
    this.#canvas.setAttribute("aria-label", `Share of each expert over the answer: ${told.join(", ")}. Arrow keys choose tokens.`);
    this.#canvas.addEventListener("click", (event) => this.#point(event));
    this.#canvas.addEventListener("keydown", (event) => this.#step(event));
    const list = el("ul", { className: "shares" }, ...means.map((share, expert) => {
      const swatch = el("span", { className: "swatch" });
      wear(swatch, answer.looks[expert]);
      return el("li", {}, swatch, el("span", { textContent: answer.experts[expert] }),
        el("span", { className: "number", textContent: percent(share) }));
    }));
    this.element = el("div", {}, this.#canvas, list);
    requestAnimationFrame(() => this.draw());
  }

  /** `current`: the index of the token that is looked at. */
  draw(current = this.current) {
    this.current = current;
    const width = this.element.clientWidth;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.#canvas, { width: width * ratio, height: HEIGHT * ratio });
    this.#canvas.style.height = `${HEIGHT}px`;
    const draw = this.#canvas.getContext("2d");
    draw.scale(ratio, ratio);
    const fills = this.answer.looks.map((look) => canvasFill(draw, look));
    const step = width / Math.max(1, this.shares.length);
    this.shares.forEach((shares, place) => {
      let top = HEIGHT;
      shares.forEach((share, expert) => {
        const height = share * (HEIGHT - MARK - 2);
        top -= height;
        draw.fillStyle = fills[expert];
        draw.fillRect(place * step, top, Math.max(1, step - (step > 4 ? 1 : 0)), height);
      });
    });
    const at = this.weighed.findIndex(({ index }) => index === current);
    draw.fillStyle = getComputedStyle(this.element).color;
    if (at >= 0) draw.fillRect(at * step, 0, Math.max(2, step - 1), MARK - 1);
  }

  #point(event) {
    const place = Math.floor((event.offsetX / this.#canvas.clientWidth) * this.weighed.length);
    this.#choose(place);
  }

  #step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    this.#choose(this.weighed.findIndex(({ index }) => index === this.current) + by);
  }

  #choose(place) {
    const index = this.weighed[Math.max(0, Math.min(this.weighed.length - 1, place))]?.index;
    if (index !== undefined) this.onChoose(index);
  }
}

const percent = (share) => `${Math.round(100 * share)} %`;

/** Of the experts that add something; what a head predicts below nothing has no share. */
function sharesOf(means) {
  const positive = means.map((value) => Math.max(0, value));
  const sum = positive.reduce((a, b) => a + b, 0);
  return positive.map((value) => (sum ? value / sum : 0));
}

function meanShares(all, count) {
  return Array.from({ length: count }, (_, expert) =>
    all.reduce((sum, shares) => sum + shares[expert], 0) / Math.max(1, all.length));
}
