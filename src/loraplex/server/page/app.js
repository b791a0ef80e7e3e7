// Puts the parts of the page together.

import { apiKey, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { announce, byId } from "./dom.js";
import { Inspector } from "./inspector.js";
import { LinkEditor } from "./link.js";
import { Load } from "./load.js";
import { captureAsked, readSettings } from "./settings.js";

const links = [new LinkEditor(byId("link-a"), "A"), new LinkEditor(byId("link-b"), "B")];
const chat = new Chat();
const load = new Load();
const inspector = new Inspector(byId("turns"), (answer) => captureAgain(answer));
const prompt = byId("prompt");

// The prompt

function send() {
  const user = prompt.value.trim();
  if (!user || chat.busy) return;
  let settings;
  try {
    settings = readSettings();
  } catch (error) {
    notice(error.message);
    return;
  }
  const sides = links.slice(0, byId("compare").checked ? 2 : 1);
  if (sides.some((link) => !link.model)) {
    notice("Choose an adapter first.");
    return;
  }
  notice("");
  announce("Asking");
  chat.send(user, sides.map((link) => ({ ...settings, model: link.model, mixtures: link.mixtures })));
  prompt.value = "";
}

function captureAgain(answer) {
  try {
    chat.again(answer, { capture: captureAsked() });
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
byId("new-chat").addEventListener("click", () => {
  chat.clear();
  inspector.clear();
  notice("");
  prompt.focus();
});
chat.onBusy = () => {
  byId("stop").hidden = !chat.busy;
  byId("send").hidden = chat.busy;
  inspector.show();
  load.askAdaptersNow(); // what is in use has changed
};
chat.onRefused = (text) => { prompt.value ||= text; };
chat.onReplaced = (old, answer) => inspector.replace(old, answer);

// Models and keys

async function offerModels() {
  const { data } = await getJson("/v1/models");
  byId("base-name").textContent = data.find((model) => model.kind === "base")?.id ?? "";
  for (const link of links) link.offer(data);
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

function notice(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text;
}

// Setup

byId("compare").addEventListener("change", () => {
  const isOn = byId("compare").checked;
  byId("link-b").hidden = !isOn;
  document.body.classList.toggle("compares", isOn);
});
byId("capture").addEventListener("change", () => { byId("capture-fields").hidden = !byId("capture").checked; });

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
for (const button of panes) {
  button.addEventListener("click", () => {
    document.body.dataset.pane = button.dataset.pane;
    for (const other of panes) other.setAttribute("aria-pressed", String(other === button));
    inspector.show();
  });
}

load.start();
