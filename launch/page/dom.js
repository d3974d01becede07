// Elements. All text enters the page as text nodes, so that no text of a model or of data can become markup.

const SVG = "http://www.w3.org/2000/svg";
// Control characters, and those that change the direction of what follows: shown by their numbers.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u202a-\u202e\u2066-\u2069\ufeff]/g;

// An element with attributes and children. An attribute "onclick" is a listener; false and null leave one out.
function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Text of a model or of data: its own direction, and nothing unseen.
function said(text, attributes = {}) {
  return make("bdi", attributes, visible(text));
}

function visible(text) {
  return String(text ?? "").replace(UNSEEN, (sign) => `⟨U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A token as it is shown: spaces and ends of lines can be seen.
function tokenText(text) {
  return visible(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";
}

function table(heads, rows, attributes = {}) {
  const head = make("tr", {}, heads.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([first, ...rest]) =>
    make("tr", {}, make("th", { scope: "row" }, first), rest.map((cell) => make("td", {}, cell))));
  const inner = make("table", attributes, make("thead", {}, head), make("tbody", {}, body));
  return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": attributes["aria-label"] ?? "table" }, inner);
}

function choose(label, options, value, onchange) {
  const choices = options.map(([key, text]) => make("option", { value: key, selected: key === value }, text));
  return make("label", {}, label, make("select", { onchange: (event) => onchange(event.target.value) }, choices));
}

// Numbers

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return Number(value.toPrecision(digits)).toString();
}

function fixed(value, digits = 6) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 10 ** -digits * 10 ? value.toExponential(3) : value.toFixed(digits);
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`;
}

function signed(value) {
  return value > 0 ? `+${number(value, 3)}` : number(value, 3);
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
