// Elements without HTML strings: whatever a model or the server says is text.

export const byId = (id) => document.getElementById(id);

/** Make an element. Properties go to the element, `aria-*`, `data-*` and `role` to its attributes. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A button; `label` is what a screen reader says where the text alone isn't clear. */
export function button(text, onClick, { label = "", className = "" } = {}) {
  const made = el("button", { type: "button", textContent: text, className });
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

/** A button that puts a text on the clipboard. */
export function copyButton(label, text) {
  const made = button("Copy", async () => {
    await copyText(text());
    made.textContent = "Copied";
    announce("Copied");
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  }, { label, className: "quiet" });
  return made;
}

async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = el("textarea", { value: text, className: "hidden" }); // over plain HTTP there is no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Let the browser save a text as a file. */
export function saveFile(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Tell whoever listens around an element. */
export function tell(element, name, detail) {
  element.dispatchEvent(new CustomEvent(name, { bubbles: true, detail }));
}

/** Tell a screen reader, and nobody else. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A token's text as one can see it: line breaks as signs, spaces alone as an open box. */
export function visible(token) {
  const shown = token.replaceAll("\n", "↵").replaceAll("\t", "→");
  return shown.trim() ? shown : "␣".repeat(Math.max(1, shown.length));
}
