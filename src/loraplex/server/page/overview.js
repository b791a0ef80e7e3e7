// Attention of every layer and head at a glance (after BertViz's model view): layers down, heads across.

import { el } from "./dom.js";
import { isDark } from "./palette.js";

const LABELS = 24; // for the numbers of layers
const HEAD = 13;
const SMALLEST = 10; // of a cell, which is the answer's tokens down and what they look at across
const pictures = new WeakMap(); // attention -> {size, canvas}: redrawn for each token, painted once

export class AttentionOverview {
  #canvas = el("canvas", { className: "heat overview", tabIndex: 0, role: "img" });
  #readout = el("p", { className: "small mono readout" });

  /** `chosen`: {layer, head}, indices or "" for all; `onChoose(layer, head)` tells others. */
  constructor(attention, index, chosen, onChoose) {
    Object.assign(this, { attention, index, chosen, onChoose });
    const [layers, heads] = attention.shape;
    this.#canvas.setAttribute(
      "aria-label", `Attention of ${layers} layers and ${heads} heads. Arrow keys choose one, Escape all.`,
    );
    this.#readout.setAttribute("aria-live", "polite");
    this.#canvas.addEventListener("pointermove", (event) => this.#tell(this.#cellAt(event)));
    this.#canvas.addEventListener("click", (event) => this.#choose(this.#cellAt(event)));
    this.#canvas.addEventListener("keydown", (event) => this.#step(event));
    this.element = el("div", {}, this.#canvas, this.#readout);
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    const [layers, heads] = this.attention.shape;
    const width = this.element.clientWidth;
    if (width <= LABELS) return;
    this.cell = { width: (width - LABELS) / heads };
    this.cell.height = Math.max(SMALLEST, Math.min(40, this.cell.width * 0.75));
    const height = HEAD + layers * this.cell.height;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.#canvas, { width: width * ratio, height: height * ratio });
    this.#canvas.style.height = `${height}px`;
    const draw = this.#canvas.getContext("2d");
    draw.scale(ratio, ratio);
    draw.drawImage(this.#picture(width - LABELS, layers * this.cell.height), LABELS, HEAD);
    draw.fillStyle = draw.strokeStyle = getComputedStyle(this.element).color;
    this.#label(draw, layers, heads);
    this.#mark(draw, layers, heads);
  }

  #label(draw, layers, heads) {
    draw.font = "9px system-ui, sans-serif";
    draw.textAlign = "right";
    const every = this.cell.height < 12 ? 5 : 1;
    for (let layer = 0; layer < layers; layer += every) {
      draw.fillText(this.attention.layers[layer], LABELS - 5, HEAD + (layer + 0.5) * this.cell.height + 3);
    }
    draw.textAlign = "center";
    const across = Math.ceil(14 / this.cell.width);
    for (let head = 0; head < heads; head += across) {
      const name = this.attention.heads?.[head] ?? "mean";
      draw.fillText(name, LABELS + (head + 0.5) * this.cell.width, 9);
    }
  }

  /** The row of the token that is held, in each cell, and a frame around the chosen one. */
  #mark(draw, layers, heads) {
    const { width, height } = this.cell;
    const numQueries = this.attention.shape[2];
    const row = ((this.index + 0.5) / numQueries) * (height - 1);
    for (let layer = 0; layer < layers; layer += 1) {
      for (let head = 0; head < heads; head += 1) {
        draw.fillRect(LABELS + head * width, HEAD + layer * height + row, 3, 1);
      }
    }
    const { layer, head } = this.chosen;
    if (layer === "" && head === "") return;
    const [x, across] = head === "" ? [0, heads * width] : [Number(head) * width, width];
    const [y, down] = layer === "" ? [0, layers * height] : [Number(layer) * height, height];
    draw.lineWidth = 2;
    draw.strokeRect(LABELS + x + 1, HEAD + y + 1, across - 2, down - 2);
  }

  #picture(width, height) {
    const size = `${Math.round(width)}x${Math.round(height)} ${isDark()}`;
    const known = pictures.get(this.attention);
    if (known?.size === size) return known.canvas;
    const canvas = paint(this.attention, Math.round(width), Math.round(height));
    pictures.set(this.attention, { size, canvas });
    return canvas;
  }

  #cellAt(event) {
    const [layers, heads] = this.attention.shape;
    const head = Math.floor((event.offsetX - LABELS) / this.cell.width);
    const layer = Math.floor((event.offsetY - HEAD) / this.cell.height);
    return layer >= 0 && layer < layers && head >= 0 && head < heads ? { layer, head } : null;
  }

  #choose(cell) {
    const isSame = !cell || (String(cell.layer) === this.chosen.layer && String(cell.head) === this.chosen.head);
    this.chosen = isSame ? { layer: "", head: "" } : { layer: String(cell.layer), head: String(cell.head) };
    this.onChoose(this.chosen.layer, this.chosen.head);
    this.draw();
    this.#tell(cell);
  }

  #step(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Escape: null };
    const move = moves[event.key];
    if (move === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    if (!move) return this.#choose(null);
    const [layers, heads] = this.attention.shape;
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    const isNew = this.chosen.layer === "";
    const layer = clamp(Number(this.chosen.layer || 0) + (isNew ? 0 : move[0]), layers);
    const head = clamp(Number(this.chosen.head || 0) + (isNew ? 0 : move[1]), heads);
    this.chosen = { layer: "", head: "" };
    return this.#choose({ layer, head });
  }

  #tell(cell) {
    if (!cell) return;
    const { layers, heads } = this.attention;
    const { share, key } = this.#most(cell);
    const name = heads ? `head ${heads[cell.head]}` : "mean of heads";
    this.#readout.textContent = `layer ${layers[cell.layer]} ${name} · ${(100 * share).toFixed(0)} % on “${key}”`;
  }

  /** What the held token looks at most in a cell, the first token left out. */
  #most({ layer, head }) {
    const { shape, data, queries, tokens } = this.attention;
    const start = ((layer * shape[1] + head) * shape[2] + this.index) * shape[3];
    let best = Math.min(1, queries[this.index]);
    for (let key = best; key <= queries[this.index]; key += 1) if (data[start + key] > data[start + best]) best = key;
    return { share: data[start + best], key: tokens[best].trim() || "␣" };
  }
}

/** All cells: each pixel is the largest weight that falls on it, as a part of the cell's largest. */
function paint({ shape, data }, width, height) {
  const [layers, heads, queries, keys] = shape;
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const draw = canvas.getContext("2d");
  const image = draw.createImageData(width, height);
  const [red, green, blue] = isDark() ? [143, 177, 255] : [39, 87, 196];
  for (let layer = 0; layer < layers; layer += 1) {
    const [top, bottom] = [Math.round((layer * height) / layers), Math.round(((layer + 1) * height) / layers) - 1];
    for (let head = 0; head < heads; head += 1) {
      const [left, right] = [Math.round((head * width) / heads), Math.round(((head + 1) * width) / heads) - 1];
      const size = [Math.max(1, right - left), Math.max(1, bottom - top)];
      const pixels = pooled(data.subarray((layer * heads + head) * queries * keys), queries, keys, ...size);
      const most = pixels.reduce((a, b) => Math.max(a, b), 1e-9);
      pixels.forEach((value, place) => {
        const at = 4 * ((top + Math.floor(place / size[0])) * width + left + (place % size[0]));
        image.data.set([red, green, blue, 20 + 235 * Math.sqrt(value / most)], at);
      });
    }
  }
  draw.putImageData(image, 0, 0);
  return canvas;
}

/** [queries, keys] as [height, width] largest values; the first key, where unused attention goes, is left out. */
function pooled(data, queries, keys, width, height) {
  const pixels = new Float32Array(width * height);
  const first = keys > 1 ? 1 : 0;
  for (let row = 0; row < Math.max(queries, height); row += 1) {
    const query = Math.min(queries - 1, Math.floor((row * queries) / Math.max(queries, height)));
    const y = Math.min(height - 1, Math.floor((row * height) / Math.max(queries, height)));
    const across = Math.max(keys - first, width);
    for (let column = 0; column < across; column += 1) {
      const key = first + Math.floor((column * (keys - first)) / across);
      const at = y * width + Math.floor((column * width) / across);
      pixels[at] = Math.max(pixels[at], data[query * keys + key]);
    }
  }
  return pixels;
}
