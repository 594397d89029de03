"use strict";
// What every part of the page uses: the data, elements, numbers for people, tooltips.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MESH_DIMS = Object.keys(DATA.mesh);
const byId = (id) => document.getElementById(id);

/** An element with attributes (or properties, or listeners `onclick`) and children. */
function el(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "path", "text", "title", "defs", "marker", "circle"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// Each mesh dim in its colour of the style sheet, where it has one.
document.head.append(el("style", {}, ...MESH_DIMS.map((dim) => `.${dim} { --swatch: var(--${dim}, var(--accent)); } `)));

/** A row of buttons of which one is pressed. */
function choice(target, options, chosen, choose) {
  target.replaceChildren(...options.map(([key, label]) =>
    el("button", { type: "button", "aria-pressed": String(key === chosen), onclick: () => choose(key) }, label)));
}

function bytes(count) {
  for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= size) return `${+(count / size).toPrecision(3)} ${unit}`;
  }
  return `${count} B`;
}

function flops(count) {
  for (const [size, unit] of [[1e12, "TFLOP"], [1e9, "GFLOP"], [1e6, "MFLOP"]]) {
    if (count >= size) return `${+(count / size).toPrecision(3)} ${unit}`;
  }
  return `${count} FLOP`;
}

function time(microseconds) {
  return microseconds >= 1000 ? `${+(microseconds / 1000).toPrecision(4)} ms` : `${+microseconds.toPrecision(3)} µs`;
}

/** A type with the mesh dims in their colours. */
function typeText(text) {
  const parts = MESH_DIMS.length ? text.split(new RegExp(`\\b(${MESH_DIMS.join("|")})\\b`)) : [text];
  return el("span", { class: "type" }, parts.map((part) => (MESH_DIMS.includes(part) ? el("b", { class: part }, part) : part)));
}

function exchangeChip(exchange) {
  const first = exchange.over.split("*")[0];
  if (exchange.kind === "buffer") return el("span", { class: `exchange ${first}` }, "other patches, from a buffer");
  return el("span", { class: `exchange ${first}` }, `${exchange.kind} over ${exchange.over} · ${bytes(exchange.bytes)}`);
}

const tip = byId("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}
function hideTip() { tip.hidden = true; }

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const stageColour = (stage) => `var(--stage-${stage % 8})`;
const linkColour = (kind) => ({ all_to_all: "--stage-1", ring_attention: "--ring", gather: "--cfg", all_reduce: "--stage-3", halo_exchange: "--stage-6", send: "--stage-4" })[kind] || "--muted";
