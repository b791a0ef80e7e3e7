// What the server offers (/v1/models), and the text that names a choice among it.

export const AUTO = "auto";
let offered = [];

export const models = {
  get all() { return offered; },
  set(data) { offered = data; },
  find: (name) => offered.find((model) => model.id === name),
  get base() { return offered.find((model) => model.kind === "base")?.id ?? ""; },
};

/** The API's `model` of a link's parts {name, weight}; of none it is the base model, or empty if the key has no right. */
export function modelText(parts) {
  if (!parts.length) return models.base;
  return parts.map(({ name, weight }) => (weight === 1 ? name : `${name}:${weight}`)).join("+");
}

/** The parts of such a text; what isn't offered any more stays, and is refused by the server. */
export function modelParts(text) {
  if (!text || text === models.base) return [];
  return text.split("+").map((part) => {
    const [name, weight] = part.split(":");
    const value = Number.parseFloat(weight ?? "1");
    return { name, weight: Number.isFinite(value) ? value : 1 };
  });
}

/** The mixtures of a choice with their experts, in the order of the answers' scalings. */
export function mixturesOf(text) {
  return modelParts(text)
    .map(({ name }) => models.find(name))
    .filter((model) => model?.kind === "mixture")
    .map((model) => ({ name: model.id, experts: model.experts }));
}
