// A token's scalings: layers down, experts across, each expert's modules side by side.

import { el } from "./dom.js";
import { canvasFill } from "./palette.js";

const GAP = 6; // between experts
const LABELS = 26; // for the numbers of blocks
const HEIGHT = 9; // of a row
const HEAD = 14; // for the experts' names

/** Layers by block and module; layers outside of blocks have rows of their own. */
export function layerGrid(layers) {
  const rows = [];
  const columns = [];
  const places = layers.map((name) => {
    const match = /(?:^|\.)(\d+)\.(.+)$/.exec(name);
    const label = match ? match[1] : name.slice(name.lastIndexOf(".") + 1);
    const module = match ? match[2].slice(match[2].lastIndexOf(".") + 1) : "";
    if (!rows.some((row) => row.label === label)) rows.push({ label, inBlock: Boolean(match) });
    if (match && !columns.includes(module)) columns.push(module);
    return { row: rows.findIndex((row) => row.label === label), module };
  });
  if (!columns.length) columns.push("");
  const column = (module) => Math.max(0, columns.indexOf(module));
  return { rows, columns, places: places.map(({ row, module }) => ({ row, column: column(module) })) };
}

export class HeatMap {
  #canvas = el("canvas", { className: "heat", tabIndex: 0, role: "img" });
  #readout = el("p", { className: "small mono readout" });
  #cell = { row: 0, column: 0, expert: 0 };

  constructor({ layers, values }, experts, looks) {
    Object.assign(this, { layers, values, experts, looks, grid: layerGrid(layers) });
    this.#canvas.setAttribute(
      "aria-label",
      `Scalings of ${layers.length} layers and ${experts.length} experts. Arrow keys read single cells.`,
    );
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("keydown", (event) => this.#step(event));
    this.#readout.setAttribute("aria-live", "polite");
    this.element = el("div", {}, this.#canvas, this.#readout);
    requestAnimationFrame(() => this.draw());
  }

  /** Whether the head gives all layers the same. */
  get isUniform() {
    const count = this.experts.length;
    return this.values.every((value, index) => Math.abs(value - this.values[index % count]) < 1e-6);
  }

  draw() {
    const width = this.element.clientWidth;
    const { rows, columns, places } = this.grid;
    const count = this.experts.length;
    const ratio = devicePixelRatio || 1;
    this.#canvas.width = width * ratio;
    const height = HEAD + rows.length * HEIGHT + 1;
    this.#canvas.height = height * ratio;
    this.#canvas.style.height = `${height}px`;
    const draw = this.#canvas.getContext("2d");
    draw.scale(ratio, ratio);
    this.band = (width - LABELS - GAP * (count - 1)) / count; // one expert's
    const cell = this.band / columns.length;
    draw.fillStyle = getComputedStyle(this.element).color;
    this.#label(draw, rows);
    const most = this.values.reduce((found, value) => Math.max(found, Math.abs(value)), 1);
    const fills = this.looks.map((look) => canvasFill(draw, look));
    places.forEach(({ row, column }, layer) => {
      fills.forEach((fill, expert) => {
        const value = this.values[layer * count + expert];
        const x = LABELS + expert * (this.band + GAP) + column * cell;
        draw.globalAlpha = 0.06 + 0.94 * Math.min(1, Math.abs(value) / most);
        draw.fillStyle = value < 0 ? "#888888" : fill; // a head without softmax may predict less than nothing
        draw.fillRect(x, HEAD + row * HEIGHT, Math.max(1, cell - 0.5), HEIGHT - 0.5);
      });
    });
  }

  #label(draw, rows) {
    draw.font = "10px system-ui, sans-serif";
    this.experts.forEach((name, expert) => {
      let shown = name;
      while (shown.length > 1 && draw.measureText(shown).width > this.band) shown = shown.slice(0, -1);
      draw.fillText(shown, LABELS + expert * (this.band + GAP), 9);
    });
    draw.font = "9px system-ui, sans-serif";
    draw.textAlign = "right";
    rows.forEach((row, place) => {
      const isTold = !row.inBlock || place % 5 === 0;
      if (isTold) draw.fillText(row.label.slice(0, 5), LABELS - 5, HEAD + (place + 1) * HEIGHT - 1);
    });
  }

  #point(event) {
    const { rows, columns } = this.grid;
    const x = event.offsetX - LABELS;
    const expert = Math.floor(x / (this.band + GAP));
    const column = Math.floor(((x - expert * (this.band + GAP)) / this.band) * columns.length);
    const row = Math.floor((event.offsetY - HEAD) / HEIGHT);
    const isWithin = (value, count) => value >= 0 && value < count;
    const isCell = isWithin(expert, this.experts.length) && isWithin(row, rows.length);
    if (isCell && isWithin(column, columns.length)) this.#tell({ row, column, expert });
  }

  #step(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const { rows, columns } = this.grid;
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    const from = this.#cell.expert * columns.length + this.#cell.column;
    const across = clamp(from + move[1], this.experts.length * columns.length - 1);
    this.#tell({
      row: clamp(this.#cell.row + move[0], rows.length - 1),
      column: across % columns.length,
      expert: Math.floor(across / columns.length),
    });
  }

  #tell(cell) {
    this.#cell = cell;
    const layer = this.grid.places.findIndex(({ row, column }) => row === cell.row && column === cell.column);
    const { label, inBlock } = this.grid.rows[cell.row];
    const place = inBlock ? `block ${label} ${this.grid.columns[cell.column]}` : label;
    const value = layer < 0 ? "not adapted" : this.values[layer * this.experts.length + cell.expert].toFixed(3);
    this.#readout.textContent = `${place} · ${this.experts[cell.expert]} ${value}`;
  }
}
