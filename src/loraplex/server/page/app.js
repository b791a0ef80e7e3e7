// Puts the parts of the page together.

import { apiKey, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { Columns } from "./columns.js";
import { announce, button, byId, copyButton, el } from "./dom.js";
import { Inspector } from "./inspector.js";
import { Load } from "./load.js";
import { mixturesOf, models } from "./models.js";
import { asCurl } from "./request.js";
import { exportChat, SavedChats } from "./saved.js";
import { captureAsked, readSettings, writeSettings } from "./settings.js";
import { readView, viewAddress } from "./view_link.js";

const columns = new Columns();
const chat = new Chat();
const load = new Load();
const saved = new SavedChats();
const inspector = new Inspector(byId("turns"), (answer) => captureAgain(answer));
const prompt = byId("prompt");

// The prompt

/** What each column's request needs, or null after telling what is missing. */
function askedNow() {
  let settings;
  try {
    settings = readSettings();
  } catch (error) {
    notice(error.message);
    return null;
  }
  const { choices } = columns;
  if (choices.some(({ model }) => !model)) {
    notice("Choose an adapter first.");
    return null;
  }
  notice("");
  return choices.map((choice) => ({ ...settings, ...choice }));
}

function send() {
  const user = prompt.value.trim();
  if (!user || chat.busy) return;
  const asked = askedNow();
  if (!asked) return;
  announce("Asking");
  chat.send(user, byId("context").value, asked);
  prompt.value = "";
}

function captureAgain(answer) {
  try {
    chat.again(answer, { capture: { ...captureAsked(), reduce: undefined } });
  } catch (error) {
    notice(error.message);
  }
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.busy) stop();
});
function stop() {
  chat.stop();
  announce("Stopped");
  prompt.focus();
}
byId("stop").addEventListener("click", stop);

function newChat() {
  chat.clear();
  saved.begin();
  inspector.clear();
  notice("");
  prompt.focus();
}
byId("new-chat").addEventListener("click", newChat);
byId("turns").addEventListener("reask", ({ detail: { turn, user } }) => {
  const asked = askedNow();
  if (asked) chat.rewrite(turn, user, asked);
});
byId("turns").addEventListener("curl", ({ detail: { answer } }) => {
  const text = asCurl(answer.asked, { origin: location.origin, hasKey: Boolean(apiKey.get()) });
  showText(`The answer of ${answer.asked.model} as curl`, text);
});
chat.onBusy = () => {
  byId("stop").hidden = !chat.busy;
  byId("send").hidden = chat.busy;
  for (const id of ["copy-link", "export-markdown", "export-json"]) byId(id).disabled = chat.busy || !chat.turns.length;
  inspector.show();
  load.askAdaptersNow(); // what is in use has changed
  if (!chat.busy) saved.keep(chat.record());
};
chat.onRefused = (text) => { prompt.value ||= text; };
chat.onReplaced = (old, answer) => inspector.replace(old, answer);
chat.onDrawn = () => inspector.show();

/** A text to copy, in a dialog. */
function showText(title, text) {
  const close = button("Close", () => dialog.close());
  const head = el("div", { className: "row between" }, el("h2", { textContent: title }), copyButton("Copy the text", () => text), close);
  const dialog = el("dialog", {}, head, el("pre", { className: "text", textContent: text, tabIndex: 0 }));
  dialog.setAttribute("aria-label", title);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// Chats that are kept, files, and links

saved.onOpen = (turns) => {
  chat.restore(turns);
  inspector.clear();
  chat.onBusy();
};
byId("export-markdown").addEventListener("click", () => exportChat(chat.record(), "markdown"));
byId("export-json").addEventListener("click", () => exportChat(chat.record(), "json"));
byId("copy-link").addEventListener("click", () => {
  showText("A link that opens this view", viewAddress(chat.turns, inspector.focus));
});

/** Fill the setup with what a link asks for, and ask when the user says so: an address alone runs nothing. */
function offerView() {
  let view;
  try {
    view = readView(location.hash);
  } catch (error) {
    notice(error.message);
  }
  if (!view) return;
  const last = view.turns.at(-1);
  columns.use(last.answers.filter(({ steer }) => !steer.length).map(({ model }) => model));
  writeSettings(last.answers[0]);
  byId("context").value = last.context;
  const count = view.turns.reduce((sum, { answers }) => sum + answers.length, 0);
  const open = button(`Ask for ${count === 1 ? "the answer" : `the ${count} answers`}`, () => openView(view), { className: "primary" });
  notice(`This link opens: “${last.user.slice(0, 200)}”`, open);
}

async function openView(view) {
  history.replaceState(null, "", location.pathname);
  newChat();
  for (const { user, context, answers } of view.turns) {
    await chat.send(user, context, answers.map((asked) => ({ ...asked, mixtures: mixturesOf(asked.model) })));
  }
  const { focus } = view;
  const answer = focus && chat.turns[focus.turn]?.answers[focus.answer];
  if (answer) inspector.look(answer, focus);
}
addEventListener("hashchange", offerView);

// Models and keys

let isFirstOffer = true;

async function offerModels() {
  const { data } = await getJson("/v1/models");
  models.set(data);
  byId("base-name").textContent = models.base;
  columns.refresh();
  if (isFirstOffer) offerView();
  isFirstOffer = false;
}

function askForKey(text) {
  showKeyForm(true);
  notice(text || "This server needs an API key.");
}

function showKeyForm(isShown) {
  byId("key-form").hidden = !isShown;
  byId("key-button").setAttribute("aria-expanded", String(isShown));
  if (isShown) {
    byId("key").value = apiKey.get();
    byId("key").focus();
  }
}

function useKey(key) {
  apiKey.set(key);
  showKeyForm(false);
  notice("");
  load.start();
}

byId("key-button").addEventListener("click", () => showKeyForm(byId("key-form").hidden));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  prompt.focus();
});
byId("key-forget").addEventListener("click", () => useKey(""));
load.onModels = offerModels;
load.onUnauthorized = () => askForKey(apiKey.get() ? "The server refuses this API key." : "");
load.onError = notice;
chat.onUnauthorized = askForKey;

function notice(text, ...actions) {
  byId("notice").hidden = !text;
  byId("notice").replaceChildren(text, ...actions);
}

// Setup

columns.onChange = () => {
  const chips = columns.choices.map(({ model }) => el("code", { textContent: model || "nothing chosen" }));
  byId("chosen").replaceChildren(...chips);
};
columns.onChange();
byId("capture").addEventListener("change", () => { byId("capture-fields").hidden = !byId("capture").checked; });
byId("formatted").addEventListener("change", () => { chat.format = byId("formatted").checked ? "markdown" : "plain"; });
byId("mark-differences").addEventListener("change", () => {
  document.body.classList.toggle("marks", byId("mark-differences").checked);
});

const themes = ["auto", "light", "dark"];
function showTheme() {
  byId("theme-button").textContent = `Theme: ${document.documentElement.dataset.theme ?? "auto"}`;
}
byId("theme-button").addEventListener("click", () => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % themes.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("loraplex-theme", next);
  showTheme();
  inspector.show();
});
showTheme();

const panes = document.querySelectorAll(".panes button");
function showPane(name) {
  document.body.dataset.pane = name;
  for (const other of panes) other.setAttribute("aria-pressed", String(other.dataset.pane === name));
  inspector.show();
}
for (const pane of panes) pane.addEventListener("click", () => showPane(pane.dataset.pane));
byId("chosen-button").addEventListener("click", () => showPane("setup"));
byId("tapped").addEventListener("click", () => showPane("look"));

// Wide screens have room for all three; more columns want the sides' room.
for (const side of ["setup", "look"]) {
  const toggle = byId(`${side}-toggle`);
  toggle.addEventListener("click", () => {
    const isHidden = document.body.classList.toggle(`without-${side}`);
    toggle.setAttribute("aria-pressed", String(!isHidden));
    inspector.show();
  });
}

load.start();
