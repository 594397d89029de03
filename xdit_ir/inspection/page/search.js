"use strict";
// Search over boxes, values, operators and source lines.

let searchItems = null;
let searchAt = 0;

function buildSearch() {
  const view = program();
  const items = view.boxes.map((box) => ({ text: box.title, about: box.kind === "call" ? `block ${box.block}` : box.kind, box: box.id, rank: 0 }));
  for (const body of Object.values(view.bodies)) {
    const box = view.boxes.find((one) => one.block === body.name);
    items.push({ text: body.name, about: `block, ${body.calls} calls`, box: box && box.id, rank: 0 });
    for (const line of [...body.inputs, ...body.lines]) items.push(valueItem(line, body.name, box && box.id));
  }
  for (const box of view.boxes) if (box.kind !== "call") for (const line of box.lines) items.push(valueItem(line, box.title, box.id));
  items.forEach((item) => { item.all = `${item.text} ${item.about} ${item.more || ""}`.toLowerCase(); });
  return items;
}

function valueItem(line, place, box) {
  return { text: `%${line.name}`, about: `${line.op} in ${place}${line.source ? ` · ${line.source}` : ""}`, more: `${line.type} ${line.module} ${line.exchange ? line.exchange.kind : ""}`, box, value: line.name, rank: 1 };
}

function findItems(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const score = (item) => item.rank + (item.text.toLowerCase().replace("%", "").startsWith(words[0]) ? 0 : item.text.toLowerCase().includes(words[0]) ? 2 : 4);
  return searchItems.filter((item) => words.every((word) => item.all.includes(word))).sort((a, b) => score(a) - score(b)).slice(0, 40);
}

function openItem(item) {
  byId("found").hidden = true;
  openValue(item.box, item.value);
}

function openValue(box, value) {
  if (!box) return;
  openTab("graph");
  selectBox(box, { value });
}

function drawFound(items) {
  const list = byId("found");
  list.hidden = !byId("search").value.trim();
  list.replaceChildren(...(items.length ? items.map((item, i) => el("li", { "aria-selected": String(i === searchAt), onmousedown: (event) => { event.preventDefault(); openItem(item); } }, el("b", {}, item.text), el("small", {}, item.about))) : [el("li", { class: "muted" }, "nothing found")]));
  const chosen = list.children[searchAt];
  if (chosen) chosen.scrollIntoView({ block: "nearest" });
}

function listenToSearch() {
  const input = byId("search");
  let items = [];
  const update = () => { searchItems = searchItems && searchItems.side === picture.side ? searchItems : Object.assign(buildSearch(), { side: picture.side }); items = findItems(input.value); drawFound(items); };
  input.addEventListener("input", () => { searchAt = 0; update(); });
  input.addEventListener("focus", update);
  input.addEventListener("blur", () => { byId("found").hidden = true; });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      searchAt = Math.max(0, Math.min(items.length - 1, searchAt + (event.key === "ArrowDown" ? 1 : -1)));
      drawFound(items);
    } else if (event.key === "Enter" && items[searchAt]) openItem(items[searchAt]);
    else if (event.key === "Escape") { input.value = ""; byId("found").hidden = true; }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== input) { event.preventDefault(); input.focus(); }
  });
}
