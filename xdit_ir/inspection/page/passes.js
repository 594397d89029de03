"use strict";
// What each pass changed: the list of passes, and one graph before and after a pass.

const passView = { index: 0, graph: "" };

/** The text of every graph after each pass, as arrays of lines. */
function passHistory() {
  let now = {};
  return DATA.passes.map((step) => {
    now = { ...now };
    for (const name of step.gone) delete now[name];
    for (const [name, places] of Object.entries(step.graphs)) now[name] = places.map((place) => DATA.lines[place]);
    return now;
  });
}

const history_ = passHistory();
const graphName = (name) => name || "outer graph";

function changesOf(index) {
  if (index === 0) return [];
  const before = history_[index - 1], after = history_[index];
  return [...new Set([...Object.keys(before), ...Object.keys(after)])]
    .filter((name) => before[name] !== after[name])
    .map((name) => ({ name, count: countChanges(before[name] || [], after[name] || []) }));
}

function drawPassList() {
  byId("pass-list").replaceChildren(...DATA.passes.map((step, index) => {
    const changes = changesOf(index);
    const counts = changes.map(({ name, count }) => `${graphName(name)} ${count || "order"}`).join(", ");
    const said = index === 0 ? step.does : changes.length ? `changed: ${counts}` : "changed nothing in the text";
    return el("li", { role: "option", tabindex: 0, class: index && !changes.length ? "none" : "", "aria-selected": String(index === passView.index), onclick: () => showPass(index), onkeydown: (event) => { if (event.key === "Enter") showPass(index); } },
      el("b", {}, step.name), " ", el("span", { class: "chip" }, step.numerics), el("small", {}, said));
  }));
}

function showPass(index, graph = null) {
  const changes = changesOf(index);
  passView.index = index;
  const names = index === 0 ? Object.keys(history_[0]) : changes.map(({ name }) => name);
  passView.graph = graph !== null ? graph : names.includes(passView.graph) ? passView.graph : names[0] ?? "";
  drawPassList();
  const step = DATA.passes[index], view = byId("pass-view");
  const graphs = el("div", { class: "choice subtabs" });
  choice(graphs, names.map((name) => [name, graphName(name)]), passView.graph, (name) => showPass(index, name));
  view.replaceChildren(el("h2", {}, step.name), el("p", { class: "muted" }, step.does), names.length ? graphs : el("p", { class: "hint" }, "This pass left the text as it was."));
  if (!names.length) return;
  const after = history_[index][passView.graph] || [];
  const before = index ? history_[index - 1][passView.graph] || [] : after;
  view.append(diffTable(before, after, index ? [`after ${DATA.passes[index - 1].name}`, `after ${step.name}`] : ["as traced", "as traced"]));
  view.scrollTop = 0;
}
