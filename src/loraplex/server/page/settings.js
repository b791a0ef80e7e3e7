// What the setup's fields say, checked.

import { byId } from "./dom.js";

const LARGEST_SEED = 2 ** 31;

/** Raises an error that says which field is wrong. */
export function readSettings() {
  return {
    // Nothing is the server's default, which is the model's.
    temperature: optional("temperature", "Temperature"),
    topP: optional("top-p", "Top p"),
    maxTokens: number("max-tokens", "Max tokens"),
    // One seed for all columns, and told, so that an answer can be had again.
    seed: optional("seed", "Seed") ?? Math.floor(Math.random() * LARGEST_SEED),
    system: byId("system").value.trim(),
    stop: byId("stop-texts").value.split("\n").filter(Boolean).map(unescaped),
    schema: schema(),
    capture: byId("capture").checked ? captureAsked() : null,
  };
}

/** Fill the fields with what an answer was asked with. */
export function writeSettings(asked) {
  const put = (id, value) => { byId(id).value = value ?? ""; };
  put("temperature", asked.temperature);
  put("top-p", asked.topP);
  put("max-tokens", asked.maxTokens);
  put("seed", asked.seed);
  put("system", asked.system);
  put("stop-texts", asked.stop.map(escaped).join("\n"));
  put("schema", asked.schema ? JSON.stringify(asked.schema, null, 2) : "");
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

function schema() {
  const text = byId("schema").value.trim();
  if (!text) return null;
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`JSON schema: ${error.message}.`, { cause: error });
  }
  if (typeof found !== "object" || !found || Array.isArray(found)) {
    throw new Error('JSON schema: give an object, such as {"type": "object"}.');
  }
  return found;
}

// A stop text stands in one line, so line breaks and tabs are written \n and \t.
const unescaped = (text) => text.replace(/\\([nt\\])/g, (_, sign) => ({ n: "\n", t: "\t", "\\": "\\" })[sign]);
const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");

const optional = (id, name) => (byId(id).value === "" && byId(id).validity.valid ? null : number(id, name));

function number(id, name) {
  const field = byId(id);
  const isGood = field.validity.valid && field.value !== "";
  if (!isGood) throw new Error(`${name}: ${field.validationMessage || "give a number."}`);
  return Number(field.value);
}
