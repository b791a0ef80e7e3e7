// Conversations that this browser keeps, and conversations as files.

import { announce, button, byId, el, saveFile } from "./dom.js";

const CHATS = "loraplex-chats";
const KEEPS = "loraplex-keeps-chats";
const MAX_CHARACTERS = 3_000_000; // of all; a browser gives a page some five million
const LONGEST_TITLE = 60;

export class SavedChats {
  #list = byId("saved-list");
  #keeps = byId("keep-chats");
  #id = null; // of the chat that is shown
  onOpen = () => {};

  constructor() {
    this.#keeps.checked = localStorage.getItem(KEEPS) !== "no";
    this.#keeps.addEventListener("change", () => {
      localStorage.setItem(KEEPS, this.#keeps.checked ? "yes" : "no");
    });
    byId("forget-chats").addEventListener("click", () => {
      this.#write([]);
      announce("All chats of this browser are deleted");
    });
    addEventListener("storage", ({ key }) => { if (key === CHATS) this.#show(); }); // another tab's
    this.#show();
  }

  /** From now on another chat is shown. */
  begin() {
    this.#id = null;
    this.#show();
  }

  /** Keep the turns of the chat that is shown, as Chat.record gives them. */
  keep(turns) {
    if (!this.#keeps.checked || !turns.length) return;
    this.#id ??= crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
    const others = read().filter(({ id }) => id !== this.#id);
    this.#write([{ id: this.#id, at: Date.now(), title: turns[0].user.slice(0, LONGEST_TITLE), turns }, ...others]);
  }

  /** Newest first; the oldest go where there is no room. */
  #write(chats) {
    const kept = [];
    let size = 0;
    for (const chat of chats) {
      size += JSON.stringify(chat).length;
      if (size > MAX_CHARACTERS) break;
      kept.push(chat);
    }
    while (!store(kept)) kept.pop();
    this.#show();
  }

  #show() {
    const chats = read();
    const rows = chats.map((chat) => {
      const open = button(chat.title, () => {
        this.#id = chat.id;
        this.#show();
        this.onOpen(chat.turns);
      }, { className: "saved-title" });
      open.title = new Date(chat.at).toLocaleString();
      if (chat.id === this.#id) open.setAttribute("aria-current", "true");
      const remove = button("×", () => {
        if (chat.id === this.#id) this.#id = null;
        this.#write(read().filter(({ id }) => id !== chat.id));
      }, { className: "icon", label: `Delete the chat ${chat.title}` });
      return el("li", {}, open, remove);
    });
    this.#list.replaceChildren(...rows);
    byId("no-chats").hidden = rows.length > 0;
    byId("forget-chats").hidden = !rows.length;
  }
}

/** Turns as a file: all that is known of them, or to read. */
export function exportChat(turns, format) {
  const name = `loraplex-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}`;
  if (format === "json") saveFile(`${name}.json`, JSON.stringify({ format: "loraplex-chat", version: 1, turns }, null, 1), "application/json");
  else saveFile(`${name}.md`, asMarkdown(turns), "text/markdown");
}

function asMarkdown(turns) {
  const parts = turns.map(({ user, answers }) => {
    const told = answers.map(({ asked, text, chosen, error }) => {
      const steered = asked.steer.map(({ text: part, strength }) => `, “${part}” × ${strength}`).join("");
      const auto = chosen ? ` → ${chosen.model}` : "";
      const facts = `temperature ${asked.temperature ?? "the model's"}, seed ${asked.seed}`;
      return `### ${asked.model}${auto}${steered}\n\n${error ? `Error: ${error}` : text}\n\n*${facts}*\n`;
    });
    return [`## ${user}\n`, ...told].join("\n");
  });
  return `${parts.join("\n")}`;
}

function read() {
  try {
    const chats = JSON.parse(localStorage.getItem(CHATS) ?? "[]");
    return Array.isArray(chats) ? chats : [];
  } catch {
    return []; // of another version, or written by hand
  }
}

/** Whether there was room. */
function store(chats) {
  try {
    localStorage.setItem(CHATS, JSON.stringify(chats));
    return true;
  } catch (error) {
    if (!chats.length) throw error;
    return false;
  }
}
