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

/** Tell a screen reader, and nobody else. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A token's text as one can see it: line breaks as signs, spaces alone as an open box. */
export function visible(token) {
  const shown = token.replaceAll("\n", "↵").replaceAll("\t", "→");
  return shown.trim() ? shown : "␣".repeat(Math.max(1, shown.length));
}
