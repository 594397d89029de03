"use strict";
// The panel beside the picture: the body of a block, or the operators of a box, before and after, and what goes in and out.

let panelTab = "body";

/** One value: name, type with layout, operator, arguments, and what it sends. */
function valueRow(line) {
  const args = line.args.split(/(%\w+)/).map((part) => (part.startsWith("%") ? el("span", { class: "use", "data-use": part.slice(1), onclick: () => lightUp(part.slice(1)) }, part) : part));
  return el("div", { class: "value", "data-value": line.name },
    el("span", { class: "name", title: "show where it is used", onclick: () => lightUp(line.name) }, `%${line.name}`), ": ", typeText(line.type),
    line.op === "input" ? "" : [" = ", el("span", { class: "op" }, line.op), "(", el("span", { class: "args" }, args), ")"],
    line.flops >= 1e6 ? el("span", { class: "muted" }, `  ${flops(line.flops)}`) : "",
    line.exchange ? exchangeChip(line.exchange) : "",
    line.fallback ? el("div", { class: "fallback" }, `gathered for want of a rule: ${line.fallback}`) : "");
}

function originRow(line) {
  const [, place, code] = line.source.match(/^(\S+:\d+): ?(.*)$/) || [null, line.source, ""];
  return el("div", { class: "origin" }, place, code ? ["  ", el("b", {}, code)] : "", line.module ? el("span", { class: "muted" }, `   ${line.module}`) : "");
}

/** Values under the source line of the model that they come from. */
function valueRows(lines) {
  let last = null;
  return lines.flatMap((line) => {
    const here = line.source ? `${line.source}|${line.module}` : null;
    const rows = here && here !== last ? [originRow(line), valueRow(line)] : [valueRow(line)];
    if (here) last = here;
    return rows;
  });
}

/** Mark a value, and where it is used, and bring it into view. */
function lightUp(name, scroll = true) {
  const panel = byId("panel");
  panel.querySelectorAll(".here, .lit").forEach((node) => node.classList.remove("here", "lit"));
  panel.querySelectorAll(`[data-use="${CSS.escape(name)}"]`).forEach((node) => node.classList.add("lit"));
  const row = panel.querySelector(`[data-value="${CSS.escape(name)}"]`);
  if (row) { row.classList.add("here"); if (scroll) row.scrollIntoView({ block: "center" }); }
}

function panelHead(box, call) {
  const body = program().bodies[box.block];
  const chips = [];
  const work = body ? body.flops : box.flops;
  if (box.kind === "call") chips.push(`${body.calls} calls of this body`);
  if (work >= 1e6) chips.push(`${flops(work)}${body ? " a call" : ""} on the slowest rank`);
  if (box.sent) chips.push(`${bytes(box.sent)} sent${body ? " a call" : ""}`);
  if (body && body.weight_bytes) chips.push(`${bytes(body.weight_bytes)} of weights a call`);
  const named = box.kind === "call" ? `block ${box.block}` : box.kind;
  return [
    el("h2", {}, call.title),
    el("p", { class: "muted" }, box.calls.length > 1 ? `${named}; one of ${box.calls.length} in a row, ${box.calls[0].title} to ${box.calls[box.calls.length - 1].title}` : named),
    el("div", { class: "chips" }, chips.map((text) => el("span", { class: "chip" }, text)),
      box.stage >= 0 && DATA.stages.length ? el("span", { class: "chip dim", style: `--swatch: ${stageColour(box.stage)}` }, `stage ${box.stage}`) : null,
      box.dims.map((dim) => el("span", { class: `chip dim ${dim}` }, `divided over ${dim}`))),
  ];
}

function bodyTab(box, call) {
  const body = program().bodies[box.block];
  if (!body) return el("div", { class: "lines" }, valueRows(call.lines));
  const results = el("div", { class: "value" }, "return ", el("span", { class: "args" }, body.results.map((name, i) => [i ? ", " : "", el("span", { class: "use", "data-use": name, onclick: () => lightUp(name) }, `%${name}`)]).flat()));
  return el("div", { class: "lines" }, el("h3", {}, "Inputs"), valueRows(body.inputs), el("h3", {}, "Body"), valueRows(body.lines), results,
    el("h3", {}, `Results of ${call.title}`), valueRows(call.lines));
}

const textOf = (line) => `  %${line.name}: ${line.type}` + (line.op === "input" ? "" : ` = ${line.op}(${line.args})`);

function textLines(view, box) {
  const body = view && view.bodies[box.block];
  if (body) return [...body.inputs, ...body.lines].map(textOf);
  if (box.kind === "call") return [];
  const names = new Set(box.lines.map((line) => line.name));
  const found = (view ? view.boxes : []).flatMap((one) => (one.kind === "call" ? [] : one.lines));
  return [...new Map(found.filter((line) => names.has(line.name)).map((line) => [line.name, textOf(line)])).values()];
}

function beforeAfterTab(box) {
  const before = textLines(DATA.before, box), after = textLines(DATA.after, box);
  const note = before.length ? "" : el("p", { class: "hint" }, "There is nothing of this name in the program as traced: a pass made it. The passes tab shows which.");
  return el("div", {}, note, diffTable(before, after, ["as traced", "after all passes"]));
}

function edgesTab(box) {
  const list = (title, edges, other) => [el("h3", {}, title), edges.length ? edges.map((edge) => el("div", {},
    el("p", {}, el("button", { type: "button", onclick: () => selectBox(edge[other].id) }, edge[other].texts.title)),
    [...edge.values].map((value) => el("div", { class: "value" }, typeText(value))))) : el("p", { class: "muted" }, "nothing")];
  return el("div", {}, list("From", picture.edges.filter((edge) => edge.to === box), "from"), list("To", picture.edges.filter((edge) => edge.from === box), "to"));
}

function runTab(box, id) {
  return el("div", { class: "card" }, el("table", { class: "plain" }, el("tbody", {}, box.calls.map((call) =>
    el("tr", { class: "link", onclick: () => { picture.open.add(box.run); redraw(); selectBox(call.id); } },
      el("td", {}, call.id === id ? el("b", {}, call.title) : call.title), el("td", {}, call.lines.map((line) => el("div", { class: "code" }, typeText(line.type)))))))));
}

/** Fill the panel for a box; `id` is the call that was meant, `value` the value. */
function showPanel(box, id, value = null) {
  const call = box.calls.find((one) => one.id === id) || box;
  if (value) panelTab = "body";
  const tabs = [["body", box.kind === "call" ? "body" : "values"], ...(DATA.after ? [["diff", "before and after"]] : []), ["edges", "in and out"], ...(box.calls.length > 1 ? [["run", `${box.calls.length} layers`]] : [])];
  if (!tabs.some(([key]) => key === panelTab)) panelTab = "body";
  const content = { body: () => bodyTab(box, call), diff: () => beforeAfterTab(call), edges: () => edgesTab(box), run: () => runTab(box, id) }[panelTab]();
  const buttons = el("div", { class: "choice subtabs", role: "group" });
  choice(buttons, tabs, panelTab, (key) => { panelTab = key; showPanel(box, id); });
  byId("panel").replaceChildren(...panelHead(box, call), buttons, content);
  byId("panel").scrollTop = 0;
  if (value) lightUp(value);
}

/** What is there before a box is selected: the blocks and the stages. */
function emptyPanel() {
  const view = program();
  const blocks = Object.values(view.bodies).map((body) => {
    const sent = body.lines.reduce((sum, line) => sum + (line.exchange ? line.exchange.bytes : 0), 0);
    const box = view.boxes.find((one) => one.block === body.name);
    return el("tr", { class: "link", onclick: () => box && selectBox(box.id) }, [el("b", {}, body.name), body.calls, body.lines.length, flops(body.flops * body.calls), sent ? bytes(sent * body.calls) : "nothing", bytes(body.weight_bytes * body.calls)].map((cell) => el("td", {}, cell)));
  });
  const stages = DATA.stages.map((stage) => el("tr", {},
    el("td", {}, el("span", { class: "key", style: `--swatch: ${stageColour(stage.number)}` }, `stage ${stage.number}`), DATA.stages.some((one) => one.place !== one.number) ? el("div", { class: "muted" }, `at pipefusion ${stage.place}`) : ""),
    el("td", {}, `${stage.calls} block calls, ${stage.operators} operators`),
    el("td", { class: "code" }, stage.sends.length ? stage.sends.map((value) => el("div", {}, typeText(value))) : "nothing", stage.holds.map((value) => el("div", {}, "holds ", typeText(value))))));
  byId("panel").replaceChildren(
    el("h2", {}, "Blocks"), el("p", { class: "muted" }, "Select one, or a box of the picture: its body, every value with its layout, what is sent, and the source line of the model behind it. Work and bytes: of the busiest rank, all calls together."), el("h3"),
    tableOf(["block", "calls", "operators", "work", "sent", "weights"], blocks, "no layer of the model is repeated"),
    ...(stages.length ? [el("h3", {}, "Stages, and what each sends to the next one for each patch"), tableOf(["stage", "computes", "sends"], stages)] : []));
}
