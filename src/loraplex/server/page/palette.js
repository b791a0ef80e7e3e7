// One look for each expert, in head order: twelve colours, and from the thirteenth expert on patterns over them.

// Each has a contrast of 4.5 or more against the page's grounds, and any two are 0.1 apart in OKLab, in both themes.
const LIGHT = [
  "#084e6c", "#86440a", "#04693d", "#c8039b", "#706d06", "#290e9b",
  "#aa4049", "#207582", "#5862a7", "#532543", "#333d01", "#950681",
];
const DARK = [
  "#4c9cc6", "#d77526", "#99f6bd", "#ec98cd", "#eae637", "#a6b2f7",
  "#f47a81", "#58e0f6", "#7783fe", "#fb5fca", "#adc367", "#b97aaa",
];
const NUM_PATTERNS = 4; // none, stripes, dots, bars
const CELL = 6; // pixels after which a canvas' pattern repeats

/** Of each expert its index among the colours, and its pattern. */
export function expertLooks(count) {
  return Array.from({ length: count }, (_, index) => ({
    light: LIGHT[index % LIGHT.length],
    dark: DARK[index % DARK.length],
    pattern: Math.floor(index / LIGHT.length) % NUM_PATTERNS,
  }));
}

/** Give an element an expert's colour (`--expert`) and pattern. */
export function wear(element, look) {
  element.style.setProperty("--expert", `light-dark(${look.light}, ${look.dark})`);
  for (let pattern = 1; pattern < NUM_PATTERNS; pattern += 1) {
    element.classList.toggle(`pattern-${pattern}`, look.pattern === pattern);
  }
}

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** What a canvas fills an expert's areas with. */
export function canvasFill(context, look) {
  const color = isDark() ? look.dark : look.light;
  if (!look.pattern) return color;
  const tile = document.createElement("canvas");
  tile.width = tile.height = CELL;
  const draw = tile.getContext("2d");
  draw.fillStyle = color;
  draw.fillRect(0, 0, CELL, CELL);
  draw.fillStyle = draw.strokeStyle = isDark() ? "#141517" : "#f7f7f5";
  draw.beginPath();
  if (look.pattern === 1) for (const at of [-CELL, 0, CELL]) { draw.moveTo(at, CELL); draw.lineTo(at + CELL, 0); }
  if (look.pattern === 2) draw.arc(CELL / 2, CELL / 2, 1.4, 0, 7);
  if (look.pattern === 3) draw.rect(0, 0, CELL, 2);
  if (look.pattern === 1) draw.stroke();
  else draw.fill();
  return context.createPattern(tile, "repeat");
}

/** Which expert leads, and by how much: 0 is a tie, 1 leaves nothing to the second. */
export function leader(values) {
  let first = 0;
  values.forEach((value, index) => { if (value > values[first]) first = index; });
  const top = Math.max(0, values[first]);
  const rest = values.filter((_, index) => index !== first);
  const second = Math.max(0, ...rest);
  const margin = rest.length ? (top - second) / (top + second || 1) : Math.min(1, top);
  return { index: first, margin };
}
