// One colour for each expert, in head order; the same as in the pictures of `loraplex scalings`.

// Okabe and Ito's, and CARTO's Safe for more experts: the colour-blind tell them apart.
const EIGHT = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#777777"];
const TWELVE = [
  "#88ccee", "#cc6677", "#ddcc77", "#117733", "#332288", "#aa4499",
  "#44aa99", "#999933", "#882255", "#661100", "#6699cc", "#888888",
];

export function expertColors(count) {
  if (count <= EIGHT.length) return EIGHT.slice(0, count);
  return Array.from({ length: count }, (_, index) => TWELVE[index % TWELVE.length]);
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
