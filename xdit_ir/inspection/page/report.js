"use strict";
// The report's tables, and every exchange with its bytes and the source line of the model that caused it.

const isSent = (line) => line.exchange && line.exchange.kind !== "buffer";

function tableOf(head, rows, empty) {
  if (!rows.length) return el("p", { class: "none" }, empty || "nothing");
  return el("div", { class: "card" }, el("table", { class: "plain" },
    el("thead", {}, el("tr", {}, head.map((text) => el("th", {}, text)))), el("tbody", {}, rows)));
}

/** Every exchange of the program: in bodies, and around them. */
function allExchanges() {
  const view = DATA.after;
  if (!view) return [];
  const inBodies = Object.values(view.bodies).flatMap((body) => body.lines.filter(isSent).map((line) => ({ line, place: body.name, times: body.calls, box: view.boxes.find((box) => box.block === body.name) })));
  const around = view.boxes.filter((box) => box.kind === "operators").flatMap((box) => box.lines.filter(isSent).map((line) => ({ line, place: box.title, times: 1, box })));
  return [...inBodies, ...around];
}

function drawReport() {
  const tables = DATA.tables.map((table) => [el("h3", {}, table.title), tableOf(table.head, table.rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell)))), table.empty)]);
  const rows = allExchanges().map(({ line, place, times, box }) => el("tr", { class: "link", title: "show it in its block", onclick: () => openValue(box && box.id, line.name) },
    el("td", {}, exchangeChip(line.exchange)), el("td", {}, `${times} × ${bytes(line.exchange.bytes)}`), el("td", { class: "code" }, `%${line.name}`, el("div", { class: "muted" }, place)), el("td", { class: "code" }, line.source || line.module || "at the border of the program")));
  const exchanges = DATA.after ? [el("h3", {}, "Every exchange, and the source line that caused it"), tableOf(["exchange", "times and bytes", "value", "source"], rows, "nothing is sent")] : [];
  const parts = [...tables.slice(0, 1).flat(), ...exchanges, ...tables.slice(1).flat()];
  byId("tab-report").replaceChildren(...(parts.length ? parts : [el("p", { class: "hint" }, "No degrees were given, so nothing is divided: give --ulysses 2, say.")]));
}
