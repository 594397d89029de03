"use strict";
// Puts the page together: head, tabs, theme.

const TABS = [["graph", "Graph"], ["passes", "Passes"], ["report", "Report"], ["timeline", "Timeline"]].filter(([key]) => key !== "timeline" || DATA.timeline);
const drawn = new Set();
let passesOpened = false;

function openTab(chosen) {
  byId("tabs").replaceChildren(...TABS.map(([key, label]) => el("button", { type: "button", role: "tab", id: `to-${key}`, "aria-selected": String(key === chosen), onclick: () => openTab(key) }, label)));
  for (const key of ["graph", "passes", "report", "timeline"]) byId(`tab-${key}`).hidden = key !== chosen;
  hideTip();
  if (chosen === "passes" && !drawn.has("passes")) {
    const first = DATA.passes.findIndex((step, index) => step.name === "shard-tokens" || (!DATA.after && index > 0 && changesOf(index).length));
    showPass(Math.max(first, 0));
  }
  if (chosen === "report" && !drawn.has("report")) drawReport();
  if (chosen === "timeline") { if (!drawn.has("timeline")) listenToTimeline(); drawTimeline(); }
  drawn.add(chosen);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  if (drawn.has("timeline")) drawTimeline();
}

function drawHead() {
  document.title = `${DATA.model}, ${DATA.degrees} · xdit-ir`;
  byId("title").textContent = DATA.title;
  byId("subtitle").textContent = `${DATA.model}, ${DATA.degrees}`;
  byId("facts").replaceChildren(...DATA.facts.map((fact) => el("div", {}, el("b", {}, fact.value), el("span", {}, [fact.name, fact.more].filter(Boolean).join(", ")))));
  byId("facts").hidden = !DATA.facts.length;
  const stages = DATA.stages.map((stage) => el("span", { class: "key", style: `--swatch: ${stageColour(stage.number)}` }, `stage ${stage.number}`));
  const dims = Object.entries(DATA.legend).map(([dim, says]) => el("span", { class: `key ${dim}`, title: says }, `${dim} ${DATA.mesh[dim]}`));
  byId("legend").replaceChildren(...stages, ...dims);
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
picture.side = DATA.after ? "after" : "before";
drawHead();
openTab("graph");
drawGraph();
fitGraph();
emptyPanel();
listenToGraph();
listenToSearch();
document.documentElement.dataset.ready = "true";
