"use strict";
// The picture: boxes laid out by dagre, drawn as SVG; pan with the pointer, zoom with the wheel or two fingers.

const picture = { side: "after", open: new Set(), boxes: [], edges: [], selected: null, view: null, moved: false };
const canvasSvg = byId("graph");
const CHAR = 7.1;

const program = () => (picture.side === "after" && DATA.after) || DATA.before;

/** Calls in a row are one box unless opened. */
function shownBoxes() {
  const members = new Map();
  for (const box of program().boxes) {
    const key = box.run >= 0 && !picture.open.has(box.run) ? `run ${box.run}` : box.id;
    if (!members.has(key)) members.set(key, []);
    members.get(key).push(box);
  }
  return [...members.values()].map((calls) => ({ ...calls[0], calls }));
}

function boxTexts(box) {
  const many = box.calls.length > 1;
  const last = box.calls[box.calls.length - 1].title;
  const title = many ? `${box.calls[0].title} … ${last.split(".").pop()}` : box.title;
  const work = box.calls.reduce((sum, one) => sum + one.flops, 0), sent = box.calls.reduce((sum, one) => sum + one.sent, 0);
  const figures = [work >= 1e6 ? flops(work) : "", sent ? `${bytes(sent)} sent` : ""].filter(Boolean).join(" · ");
  const what = box.kind === "call" ? box.block + (many ? ` × ${box.calls.length}` : "") : box.kind === "operators" ? `${box.lines.length} operators${many ? ` × ${box.calls.length}` : ""}` : "";
  return { title, small: [what, figures].filter(Boolean) };
}

function layoutGraph() {
  const graph = new dagre.graphlib.Graph({ multigraph: false }).setGraph({ rankdir: "TB", nodesep: 14, ranksep: 32, marginx: 16, marginy: 16 });
  graph.setDefaultEdgeLabel(() => ({}));
  picture.boxes = shownBoxes();
  const home = new Map();
  for (const box of picture.boxes) {
    box.calls.forEach((call) => home.set(call.id, box));
    box.texts = boxTexts(box);
    const head = box.texts.title.length * CHAR * 1.1 + (box.dims.length ? 12 + 11 * box.dims.length : 0);
    const width = Math.max(head, ...box.texts.small.map((text) => text.length * CHAR * 0.88)) + 26;
    graph.setNode(box.id, { width: Math.min(Math.max(width, 90), 400), height: 24 + 15 * box.texts.small.length + (box.texts.small.length ? 5 : 6) });
  }
  const edges = new Map();
  for (const edge of program().edges) {
    const from = home.get(edge.source), to = home.get(edge.target);
    if (!from || !to || from === to) continue;
    const key = `${from.id} ${to.id}`;
    if (!edges.has(key)) edges.set(key, { from, to, values: new Set(), dims: new Set() });
    edge.values.forEach((value) => edges.get(key).values.add(value));
    edge.dims.forEach((dim) => edges.get(key).dims.add(dim));
  }
  picture.edges = [...edges.values()];
  picture.edges.forEach((edge) => graph.setEdge(edge.from.id, edge.to.id, { weight: edge.dims.size ? 4 : 1 }));
  dagre.layout(graph);
  picture.boxes.forEach((box) => Object.assign(box, graph.node(box.id)));
  picture.edges.forEach((edge) => { edge.points = graph.edge(edge.from.id, edge.to.id).points; });
  picture.size = graph.graph();
}

function edgePath(points) {
  let path = `M${points[0].x},${points[0].y}`;
  for (let i = 1; i < points.length - 1; i++) {
    const next = points[i + 1], last = i === points.length - 2;
    const x = last ? next.x : (points[i].x + next.x) / 2, y = last ? next.y : (points[i].y + next.y) / 2;
    path += ` Q${points[i].x},${points[i].y} ${x},${y}`;
  }
  return points.length === 2 ? `${path} L${points[1].x},${points[1].y}` : path;
}

function drawEdge(edge) {
  const path = edgePath(edge.points);
  const dim = [...edge.dims].pop();
  const text = `${edge.from.texts.title} → ${edge.to.texts.title}\n${[...edge.values].join("\n")}`;
  edge.node = el("path", { class: `edge ${dim ? `divided ${dim}` : ""}`, d: path, "marker-end": "url(#arrow)" });
  return el("g", { onmousemove: (event) => showTip(event, text), onmouseleave: hideTip }, edge.node, el("path", { class: "hit", d: path }));
}

function drawBox(box) {
  const x = box.x - box.width / 2, y = box.y - box.height / 2;
  const staged = box.stage >= 0 && DATA.stages.length > 0;
  const group = el("g", {
    class: ["box", box.kind, staged ? "staged" : "", box.calls.length > 1 ? "shadowed" : ""].join(" "),
    "data-id": box.id, tabindex: 0, role: "button", "aria-label": box.texts.title,
    style: staged ? `--swatch: ${stageColour(box.stage)}` : "",
    onclick: () => { if (!picture.moved) selectBox(box.id); },
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); selectBox(box.id); } },
  });
  if (box.calls.length > 1) {
    group.append(el("rect", { class: "behind", x: x + 6, y: y + 6, width: box.width, height: box.height, rx: 8 }),
      el("rect", { class: "behind", x: x + 3, y: y + 3, width: box.width, height: box.height, rx: 8 }));
  }
  group.append(el("rect", { class: "body", x, y, width: box.width, height: box.height, rx: 8 }));
  const fits = (text) => (text.length * CHAR > 380 ? `${text.slice(0, 50)}…` : text);
  group.append(el("text", { class: "title", x: x + 12, y: y + 19 }, fits(box.texts.title)));
  box.texts.small.forEach((text, i) => group.append(el("text", { class: "small", x: x + 12, y: y + 34 + 15 * i }, fits(text))));
  box.dims.forEach((dim, i) => group.append(el("circle", { class: dim, cx: x + box.width - 11 - 11 * i, cy: y + 12, r: 4, fill: "var(--swatch)" }, el("title", {}, `divided over ${dim}`))));
  box.node = group;
  return group;
}

function drawGraph() {
  layoutGraph();
  const arrow = el("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" }, el("path", { class: "arrow", d: "M0,0 L8,4 L0,8 z" }));
  const world = el("g", { id: "world" }, picture.edges.map(drawEdge), picture.boxes.map(drawBox));
  canvasSvg.replaceChildren(el("defs", {}, arrow), world);
  byId("expand").textContent = picture.open.size ? "fold layers" : "show every layer";
  byId("expand").hidden = !program().boxes.some((box) => program().boxes.some((other) => other !== box && other.run === box.run && box.run >= 0));
  choice(byId("sides"), DATA.after ? [["before", "before"], ["after", "after"]] : [["before", "as traced"]], DATA.after ? picture.side : "before", (side) => { picture.side = side; redraw(); });
  markSelected();
}

function redraw() {
  const id = picture.selected;
  drawGraph();
  fitGraph();
  if (id) selectBox(id, { quiet: true });
}

function place() {
  const { x, y, scale } = picture.view;
  byId("world").setAttribute("transform", `translate(${x},${y}) scale(${scale})`);
}

/** All in view where it can then be read; else the top, with the most work in the middle. */
function fitGraph() {
  const space = canvasSvg.getBoundingClientRect();
  if (!space.width) return;
  const scale = Math.max(Math.min(space.width / picture.size.width, space.height / picture.size.height, 1.1), 0.6);
  const work = (box) => box.calls.reduce((sum, call) => sum + call.flops, 0);
  const first = picture.boxes.reduce((most, box) => (work(box) > work(most) ? box : most), picture.boxes[0]);
  const over = picture.size.width * scale - space.width;
  const x = over > 0 ? -Math.min(Math.max(first.x * scale - space.width / 2, 0), over) : -over / 2;
  picture.view = { x, y: 0, scale };
  place();
}

function zoomAt(x, y, factor) {
  const view = picture.view, scale = Math.min(4, Math.max(0.05, view.scale * factor));
  view.x = x - (x - view.x) * (scale / view.scale);
  view.y = y - (y - view.y) * (scale / view.scale);
  view.scale = scale;
  place();
}

function centreOn(box) {
  const space = canvasSvg.getBoundingClientRect(), view = picture.view;
  const x = box.x * view.scale + view.x, y = box.y * view.scale + view.y;
  if (x > 40 && x < space.width - 40 && y > 30 && y < space.height - 30) return;
  view.x = space.width / 2 - box.x * view.scale;
  view.y = space.height / 2 - box.y * view.scale;
  place();
}

function markSelected() {
  for (const box of picture.boxes) box.node.classList.toggle("selected", box.calls.some((call) => call.id === picture.selected));
  for (const edge of picture.edges) {
    edge.node.classList.toggle("near", [edge.from, edge.to].some((box) => box.calls.some((call) => call.id === picture.selected)));
  }
}

/** Show a box in the panel; `value`: one of its values. */
function selectBox(id, { value = null, quiet = false } = {}) {
  const box = picture.boxes.find((one) => one.calls.some((call) => call.id === id));
  if (!box) { picture.selected = null; return; }
  picture.selected = id;
  markSelected();
  if (!quiet) centreOn(box);
  showPanel(box, id, value);
  if (!quiet && matchMedia("(max-width: 820px)").matches && !value) byId("panel").scrollIntoView({ behavior: "smooth" });
}

function listenToGraph() {
  const pointers = new Map();
  canvasSvg.addEventListener("pointerdown", (event) => { pointers.set(event.pointerId, event); picture.moved = false; });
  addEventListener("pointerup", (event) => pointers.delete(event.pointerId));
  addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
    if (!picture.moved && Math.hypot(dx, dy) < 4) return;
    picture.moved = true;
    hideTip();
    const space = canvasSvg.getBoundingClientRect();
    if (pointers.size === 2) {
      const other = [...pointers.values()].find((one) => one.pointerId !== event.pointerId);
      const gap = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      zoomAt((event.clientX + other.clientX) / 2 - space.left, (event.clientY + other.clientY) / 2 - space.top, gap(event) / Math.max(gap(before), 1));
    } else { picture.view.x += dx; picture.view.y += dy; place(); }
    pointers.set(event.pointerId, event);
  });
  canvasSvg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const space = canvasSvg.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) zoomAt(event.clientX - space.left, event.clientY - space.top, Math.exp(-event.deltaY / 180));
    else { picture.view.x -= event.deltaX; picture.view.y -= event.deltaY; place(); }
  }, { passive: false });
  canvasSvg.addEventListener("keydown", (event) => {
    const space = canvasSvg.getBoundingClientRect();
    const steps = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] };
    if (steps[event.key]) { event.preventDefault(); picture.view.x += steps[event.key][0]; picture.view.y += steps[event.key][1]; place(); }
    if (event.key === "+" || event.key === "-") zoomAt(space.width / 2, space.height / 2, event.key === "+" ? 1.25 : 0.8);
  });
  byId("fit").addEventListener("click", fitGraph);
  byId("expand").addEventListener("click", () => {
    picture.open = picture.open.size ? new Set() : new Set(program().boxes.map((box) => box.run));
    redraw();
  });
  addEventListener("resize", fitGraph);
}
