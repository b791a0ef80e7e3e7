// An address that opens the same view: questions, choices, settings, and the token that is looked at.

const PREFIX = "#view=";
const LONGEST = 200_000; // characters
const MAX_TURNS = 64;
const MAX_COLUMNS = 64;
const ASKED = ["column", "model", "temperature", "topP", "maxTokens", "seed", "system", "stop", "schema", "capture", "steer"];

/** The address of a chat with a focus {answer, isPrompt, token, view} or null. */
export function viewAddress(turns, focus) {
  const picked = wanted(turns, focus);
  const view = {
    version: 1,
    turns: picked.map(({ user, context, answers }) => ({
      user, context, answers: answers.map(({ asked }) => Object.fromEntries(ASKED.map((name) => [name, asked[name]]))),
    })),
  };
  if (focus) {
    const turn = picked.findIndex(({ answers }) => answers.includes(focus.answer));
    const answer = picked[turn].answers.indexOf(focus.answer);
    view.focus = { turn, answer, isPrompt: focus.isPrompt, token: focus.token, view: focus.view };
  }
  return `${location.origin}${location.pathname}${PREFIX}${encode(JSON.stringify(view))}`;
}

/** What an address holds, or null. Raises an error that says what is wrong with it. */
export function readView(hash) {
  if (!hash.startsWith(PREFIX)) return null;
  let view;
  try {
    view = JSON.parse(decode(hash.slice(PREFIX.length, LONGEST)));
  } catch {
    throw new Error("The link to a view is damaged, or was cut off.");
  }
  if (!isView(view)) throw new Error("The link to a view is of another version of this page.");
  return view;
}

/** The turn that is looked at, or the last; with those that it goes on from. */
function wanted(turns, focus) {
  const found = focus ? turns.findIndex(({ answers }) => answers.includes(focus.answer)) : turns.length - 1;
  const goesOn = turns[found].context !== "fresh";
  return turns.slice(goesOn ? 0 : found, found + 1);
}

function isView(view) {
  const isText = (value) => typeof value === "string";
  const isAnswer = (one) => one && isText(one.model) && isText(one.column) && isText(one.system) &&
    Number.isFinite(one.maxTokens) && Number.isFinite(one.seed) && Array.isArray(one.stop) && Array.isArray(one.steer) &&
    one.steer.every((mark) => mark && isText(mark.text) && Number.isFinite(mark.strength));
  const isTurn = (turn) => turn && isText(turn.user) && ["fresh", "own", "shared"].includes(turn.context) &&
    Array.isArray(turn.answers) && turn.answers.length > 0 && turn.answers.length <= MAX_COLUMNS && turn.answers.every(isAnswer);
  return view?.version === 1 && Array.isArray(view.turns) && view.turns.length > 0 &&
    view.turns.length <= MAX_TURNS && view.turns.every(isTurn);
}

// Base64 with the letters of addresses.
function encode(text) {
  const bytes = new TextEncoder().encode(text);
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function decode(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(binary, (char) => char.charCodeAt(0)));
}
