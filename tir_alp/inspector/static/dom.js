// Makes elements. Text goes into text nodes alone, and what would be invisible or would change the
// order of what is read is shown as an escape: this is the only place through which text passes.

const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}\ud800-\udfff]/gu;

function escapeOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}

export function visible(text) {
  return String(text).replace(UNSEEN, escapeOf);
}

const ATTRIBUTES = new Set(
  "id class type title value name for role tabindex min max step placeholder selected checked open disabled scope colspan href download lang hidden".split(" "),
);

// h("button", {class: "x", onclick: f, "aria-label": "y"}, "text", child, [children])
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("data-") || name.startsWith("aria-") || ATTRIBUTES.has(name))
      element.setAttribute(name, value === true ? "" : visible(value));
    else throw new Error(`the attribute ${name} is not allowed`);
  }
  append(element, children);
  return element;
}

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren();
  return append(element, children);
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value)) return String(value);
  return String(+value.toPrecision(digits));
}

export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// The place in the page is in the part of the address after "#": "#tokens?run=0&step=3".
export function place() {
  const [view, query = ""] = location.hash.slice(1).split("?");
  return { view: view || "runs", query: new URLSearchParams(query) };
}

export function address(view, query) {
  return `#${view}?${new URLSearchParams(query)}`;
}
