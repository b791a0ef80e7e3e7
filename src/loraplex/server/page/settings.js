// What the setup's fields say, checked.

import { byId } from "./dom.js";

const LARGEST_SEED = 2 ** 31;

/** Raises an error that says which field is wrong. */
export function readSettings() {
  return {
    // Nothing is the server's default, which is the model's.
    temperature: byId("temperature").value === "" ? null : number("temperature", "Temperature"),
    maxTokens: number("max-tokens", "Most tokens"),
    // One seed for all sides, and told, so that an answer can be had again.
    seed: byId("seed").value === "" ? Math.floor(Math.random() * LARGEST_SEED) : number("seed", "Seed"),
    system: byId("system").value.trim(),
    capture: byId("capture").checked ? captureAsked() : null,
  };
}

/** The API's capture_attention. */
export function captureAsked() {
  const asked = { queries: "generated", dtype: "float16", encoding: "base64" };
  const layers = parseLayers(byId("capture-layers").value);
  if (layers) asked.layers = layers;
  if (byId("capture-heads").value === "mean") asked.reduce = "mean";
  return asked;
}

/** "0-2, 5" is [0, 1, 2, 5]; nothing or "all" is null. */
export function parseLayers(text) {
  const trimmed = text.trim().toLowerCase();
  if (!trimmed || trimmed === "all") return null;
  const layers = new Set();
  for (const part of trimmed.split(",")) {
    const match = /^\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?$/.exec(part);
    if (!match) throw new Error(`Layers: “${part.trim()}” is no number and no range such as 0-5.`);
    const last = Number(match[2] ?? match[1]);
    for (let layer = Number(match[1]); layer <= last; layer += 1) layers.add(layer);
  }
  if (!layers.size) throw new Error(`Layers: “${text}” names no layer.`);
  return [...layers].sort((a, b) => a - b);
}

function number(id, name) {
  const field = byId(id);
  const isGood = field.validity.valid && field.value !== "";
  if (!isGood) throw new Error(`${name}: ${field.validationMessage || "give a number."}`);
  return Number(field.value);
}
