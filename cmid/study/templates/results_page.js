"use strict";
// Filters, sorting and the plot. Text from the studies only ever becomes textContent or an attribute: none is markup.
const rows = JSON.parse(document.getElementById("rows").textContent);
const table = document.getElementById("scores");
const body = table.tBodies[0];
const lines = Array.from(body.rows);
const chosen = { study: "", dataset: "", task: "", method: "", backbone: "" };
const names = { study: "study", dataset: "data set", task: "score", method: "method", backbone: "backbone" };
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a4fbf"];
const plot = { cost: "seen", group: "" };

function make(name, attributes, text, parent) {
  const svg = ["svg", "line", "circle", "text", "title", "g"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined && text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function select(label, options, value, change, parent) {
  const box = make("label", {}, label + " ", parent);
  const field = make("select", {}, null, box);
  for (const [key, text] of options) make("option", { value: key }, text, field);
  field.value = value;
  field.addEventListener("change", () => change(field.value));
  return field;
}

function choice(row, key) {
  return "=" + (row[key] ?? "");  // never empty, which is all rows
}

function fits(row, besides) {
  return Object.entries(chosen).every(([key, value]) => key === besides || !value || choice(row, key) === value);
}

function shown() {
  return rows.filter((row) => fits(row));
}

function drawFilters() {
  const form = document.getElementById("filters");
  form.replaceChildren();
  form.hidden = false;
  for (const key of Object.keys(chosen)) {
    const values = [...new Set(rows.filter((row) => fits(row, key)).map((row) => choice(row, key)))].sort();
    const options = [["", "all"], ...values.map((value) => [value, value.slice(1) || "none"])];
    select(names[key], options, chosen[key], (value) => { chosen[key] = value; update(); }, form);
  }
}

function drawRows() {
  lines.forEach((line) => { line.hidden = !fits(rows[line.dataset.row]); });
  document.getElementById("count").textContent = `${shown().length} of ${rows.length} rows`;
}

const sorted = ["study", "dataset", "task", "method", "backbone", "score", "low", "difference", "seen", "seconds", "device"];

function sortBy(key, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (line) => rows[line.dataset.row][key];
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);  // what has none comes last, either way
    const difference = typeof x === "number" ? x - y : String(x).localeCompare(String(y));
    return down ? -difference : difference;
  };
  body.append(...[...lines].sort(order));
}

function makeSortable() {
  lines.forEach((line, i) => { line.dataset.row = i; });
  Array.from(table.tHead.rows[0].cells).forEach((head, i) => {
    const text = head.textContent;
    head.textContent = "";
    make("button", { type: "button" }, text, head).addEventListener("click", () => sortBy(sorted[i], head));
  });
}

function groupName(row) {
  return [row.study, row.dataset, row.task].filter(Boolean).join(" · ");
}

function groups() {
  const found = new Map();
  for (const row of shown()) {
    if (!found.has(groupName(row))) found.set(groupName(row), []);
    found.get(groupName(row)).push(row);
  }
  return found;
}

function drawAxes(svg, x, y, costs, low, high) {
  for (let i = 0; i <= 4; i++) {
    const score = low + (i * (high - low)) / 4;
    make("line", { x1: 60, x2: 700, y1: y(score), y2: y(score), class: "axis" }, null, svg);
    make("text", { x: 52, y: y(score) + 4, "text-anchor": "end", class: "faint" }, (100 * score).toFixed(0), svg);
  }
  make("text", { x: 52, y: 14, "text-anchor": "end", class: "faint" }, "%", svg);
  for (const cost of new Set(costs)) {
    make("line", { x1: x(cost), x2: x(cost), y1: 320, y2: 325, class: "axis" }, null, svg);
  }
  const [least, most] = [Math.min(...costs), Math.max(...costs)];
  for (const cost of new Set([least, most])) {
    make("text", { x: x(cost), y: 340, "text-anchor": "middle", class: "faint" }, Math.round(cost).toLocaleString("en"), svg);
  }
  const words = plot.cost === "seen" ? "images seen in pretraining" : "seconds of pretraining";
  make("text", { x: 380, y: 358, "text-anchor": "middle", class: "faint" }, `${words} (log; equal ones side by side)`, svg);
}

function describe(row) {
  const device = plot.cost === "seconds" && row.trained_on ? `, ${row.trained_on}` : "";
  const cost = row[plot.cost] ? `${Math.round(row[plot.cost]).toLocaleString("en")} ${plot.cost === "seen" ? "images" : "s"}` : "no pretraining here";
  const interval = row.low === null ? "" : ` (${(100 * row.low).toFixed(1)} to ${(100 * row.high).toFixed(1)})`;
  return `${row.init}: ${(100 * row.score).toFixed(1)} %${interval}, ${cost}${device}, commit ${row.commit || "unknown"}`;
}

function drawPoint(svg, row, at, y, colour) {
  const group = make("g", {}, null, svg);
  make("title", {}, describe(row), group);
  if (row.low !== null) make("line", { x1: at, x2: at, y1: y(row.low), y2: y(row.high), stroke: colour, "stroke-width": 2 }, null, group);
  make("circle", { cx: at, cy: y(row.score), r: 5, fill: colour }, null, group);
}

function drawLine(svg, row, y) {
  const group = make("g", {}, null, svg);
  make("title", {}, describe(row), group);
  make("line", { x1: 60, x2: 700, y1: y(row.score), y2: y(row.score), stroke: "#888888", "stroke-dasharray": "4 4" }, null, group);
}

function drawLabels(svg, labels) {
  let last = -Infinity;
  for (const [wanted, text, colour] of labels.sort((a, b) => a[0] - b[0])) {
    last = Math.max(wanted, last + 14);
    make("text", { x: 712, y: last + 4, fill: colour }, text, svg);
  }
}

function drawScores(found, figure) {
  const svg = make("svg", { viewBox: "0 0 900 365", role: "img", "aria-label": "score against cost; the numbers are in the table" }, null, figure);
  const costly = found.filter((row) => row[plot.cost]);
  const free = found.filter((row) => !row[plot.cost]);
  const ends = found.flatMap((row) => [row.low ?? row.score, row.high ?? row.score]);
  const [low, high] = [Math.max(0, Math.min(...ends) - 0.02), Math.min(1, Math.max(...ends) + 0.02)];
  const y = (score) => 320 - (300 * (score - low)) / (high - low);
  const logs = costly.map((row) => Math.log(row[plot.cost]));
  const [least, most] = [Math.min(...logs), Math.max(...logs)];
  const x = (cost) => (most > least ? 110 + (540 * (Math.log(cost) - least)) / (most - least) : 380);
  drawAxes(svg, x, y, costly.map((row) => row[plot.cost]), low, high);
  const methods = [...new Set(found.map((row) => row.method))];
  const colour = (row) => colours[methods.indexOf(row.method) % colours.length];
  free.forEach((row) => drawLine(svg, row, y));
  const beside = new Map();
  for (const row of costly) {
    const at = beside.get(row[plot.cost]) || 0;
    beside.set(row[plot.cost], at + 1);
    drawPoint(svg, row, x(row[plot.cost]) + 9 * Math.ceil(at / 2) * (at % 2 ? 1 : -1), y, colour(row));
  }
  drawLabels(svg, found.map((row) => [y(row.score), row.init, row[plot.cost] ? colour(row) : "#888888"]));
}

function drawPlot() {
  const figure = document.getElementById("plot");
  figure.replaceChildren();
  const found = groups();
  const all = (row) => !row.task.includes("of the labels");
  const weight = (list) => new Set(list.map((row) => row[plot.cost])).size * 1000 + list.length + all(list[0]) / 2;
  const usable = [...found].filter(([, list]) => list.some((row) => row[plot.cost]));
  figure.hidden = !usable.length;
  if (!usable.length) return;
  if (!usable.some(([name]) => name === plot.group)) {
    plot.group = usable.reduce((best, next) => (weight(next[1]) > weight(best[1]) ? next : best))[0];
  }
  const head = make("figcaption", {}, null, figure);
  const costs = [["seen", "images seen"], ["seconds", "seconds, on the device that each point names"]];
  select("score", usable.map(([name]) => [name, name]), plot.group, (value) => { plot.group = value; drawPlot(); }, head);
  select("against", costs, plot.cost, (value) => { plot.cost = value; drawPlot(); }, head);
  drawScores(found.get(plot.group), figure);
}

function update() {
  drawFilters();
  drawRows();
  drawPlot();
}

makeSortable();
update();
