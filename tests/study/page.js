"use strict";
// As much of a page as the script asks for.
class Element {
  constructor(name) {
    Object.assign(this, { name, children: [], dataset: {}, listeners: {}, attributes: {}, hidden: false, textContent: "" });
  }
  get rows() { return this.children; }
  get cells() { return this.children; }
  setAttribute(key, value) { this.attributes[key] = value; }
  getAttribute(key) { return this.attributes[key]; }
  removeAttribute(key) { delete this.attributes[key]; }
  append(...added) { this.children.push(...added); }
  replaceChildren() { this.children = []; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
}
const named = { rows: new Element("script"), scores: new Element("table") };
for (const name of ["filters", "plot", "count"]) named[name] = new Element("div");
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
named.rows.textContent = JSON.stringify(given.rows);
named.scores.tHead = { rows: [{ cells: [] }] };
named.scores.tBodies = [new Element("tbody")];
for (const row of given.rows) named.scores.tBodies[0].append(new Element("tr"));
globalThis.document = {
  getElementById: (name) => named[name],
  createElement: (name) => new Element(name),
  createElementNS: (space, name) => new Element(name),
};
(0, eval)(given.script);
const fields = () => named.filters.children.map((label) => label.children[0]);
const field = fields()[given.filter];
const option = field.children.find((one) => one.textContent === given.choice);
field.value = option.attributes.value;
field.listeners.change();
console.log(JSON.stringify(named.scores.tBodies[0].children.map((line) => !line.hidden)));
