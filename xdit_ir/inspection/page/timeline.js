"use strict";
// The ranks over time, on a canvas: what each computes, and what is on its way meanwhile.

const GAP = 10, LEFT = 74, TOP = 26;
const timeView = { start: 0, end: 1, hits: [], lane: 17 };

function spanColour(span) {
  if (span.lane === "link") return css(linkColour(span.kind));
  if (span.patch >= 0) return css(`--stage-${span.patch % 8}`);
  return css(span.name === "around the blocks" ? "--faint" : "--stage-0");
}

function rowOf(span) { return TOP + span.rank * (2 * timeView.lane + GAP) + (span.lane === "link" ? timeView.lane + 1 : 0); }

function drawTimeline() {
  const canvas = byId("timeline").firstElementChild, data = DATA.timeline;
  const width = byId("timeline").clientWidth, ranks = data.busy.length;
  if (!width) return;
  timeView.lane = Math.max(15, Math.min(30, ((innerHeight - 330) / ranks - GAP) / 2));
  const lane = timeView.lane, height = TOP + ranks * (2 * lane + GAP) + 6, ratio = devicePixelRatio || 1;
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  draw.clearRect(0, 0, width, height);
  const scale = (width - LEFT - 10) / (timeView.end - timeView.start), at = (t) => LEFT + (t - timeView.start) * scale;
  timeView.scale = scale;
  drawAxis(draw, at, width, height);
  timeView.hits = [];
  draw.save();
  draw.beginPath();
  draw.rect(LEFT, 0, width - LEFT - 8, height);
  draw.clip();
  draw.font = "11px system-ui, sans-serif";
  for (const span of data.spans) {
    const x = at(span.start), w = Math.max((span.end - span.start) * scale, 0.6);
    if (x + w < LEFT || x > width) continue;
    const y = rowOf(span), h = span.lane === "link" ? lane - 5 : lane;
    draw.globalAlpha = span.lane === "link" ? 0.9 : 0.85;
    draw.fillStyle = spanColour(span);
    draw.fillRect(x, y, Math.max(w - (w > 3 ? 0.8 : 0), 0.6), h);
    timeView.hits.push({ x, y, w, h, span });
    const label = span.patch >= 0 && span.lane === "compute" ? `p${span.patch} ${span.name}` : span.name;
    if (w > 34 && span.lane === "compute") {
      draw.globalAlpha = 1;
      draw.fillStyle = css("--card");
      const left = Math.max(x, LEFT), room = Math.floor((x + w - left - 8) / 6.1);
      draw.fillText(label.length > room ? `${label.slice(0, Math.max(room - 1, 0))}…` : label, left + 4, y + lane / 2 + 4);
    }
  }
  draw.restore();
}

function drawAxis(draw, at, width, height) {
  draw.font = "11px system-ui, sans-serif";
  draw.strokeStyle = css("--line");
  const span = timeView.end - timeView.start;
  const raw = span / Math.max(width / 110, 2), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  draw.fillStyle = css("--muted");
  for (let t = Math.ceil(timeView.start / step) * step; t <= timeView.end; t += step) {
    draw.beginPath();
    draw.moveTo(at(t), TOP - 6);
    draw.lineTo(at(t), height);
    draw.stroke();
    draw.fillText(t === 0 ? "0" : time(t), at(t) + 3, 14);
  }
  DATA.timeline.busy.forEach((busy, rank) => {
    const y = TOP + rank * (2 * timeView.lane + GAP);
    draw.fillStyle = css("--text");
    draw.fillText(`rank ${rank}`, 10, y + 12.5);
    draw.fillStyle = css("--muted");
    draw.fillText(`${Math.round(busy * 100)} % busy`, 10, y + 27);
  });
}

function clampTime(start, span) {
  const total = DATA.timeline.total, width = Math.min(Math.max(span, total / 5000), total);
  timeView.start = Math.min(Math.max(start, 0), total - width);
  timeView.end = timeView.start + width;
  drawTimeline();
}

function zoomTime(factor, middle = (timeView.start + timeView.end) / 2) {
  const span = (timeView.end - timeView.start) * factor;
  clampTime(middle - (middle - timeView.start) * factor, span);
}

function spanTip({ span }) {
  const where = [`rank ${span.rank}`, span.stage >= 0 ? `stage ${span.stage}` : "", span.patch >= 0 ? `patch ${span.patch}` : "", DATA.timeline.steps.length > 1 ? DATA.timeline.steps[span.step] : ""].filter(Boolean).join(", ");
  const what = span.lane === "link" ? `${span.kind} ${span.bytes ? bytes(span.bytes) : ""}` : "computes";
  return `${span.name}\n${what} for ${time(span.end - span.start)}, from ${time(span.start)}\n${where}`;
}

function listenToTimeline() {
  const data = DATA.timeline, canvas = byId("timeline").firstElementChild;
  Object.assign(timeView, { start: 0, end: data.total });
  byId("timeline-note").textContent = `${data.note} ${data.steps.length > 1 ? `${data.steps.join("; ")}.` : ""} Upper lane of a rank: computes; lower lane: sends. Scroll to move, Ctrl and scroll to zoom.`;
  const patches = [...new Set(data.spans.map((span) => span.patch))].filter((patch) => patch >= 0).sort();
  const keys = patches.length ? patches.map((patch) => [`patch ${patch}`, stageColour(patch)]) : [["blocks", "var(--stage-0)"], ["around the blocks", "var(--faint)"]];
  const kinds = [...new Set(data.spans.filter((span) => span.lane === "link").map((span) => span.kind))];
  byId("timeline-legend").replaceChildren(...[...keys, ...kinds.map((kind) => [kind, `var(${linkColour(kind)})`])].map(([text, colour]) => el("span", { class: "key", style: `--swatch: ${colour}` }, text)));
  byId("zoom-in").addEventListener("click", () => zoomTime(0.5));
  byId("zoom-out").addEventListener("click", () => zoomTime(2));
  byId("zoom-all").addEventListener("click", () => clampTime(0, data.total));
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, start: timeView.start }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) { clampTime(drag.start - (event.clientX - drag.x) / timeView.scale, timeView.end - timeView.start); return; }
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const hit = timeView.hits.findLast((one) => x >= one.x && x <= one.x + Math.max(one.w, 2) && y >= one.y && y <= one.y + one.h);
    if (hit) showTip(event, spanTip(hit)); else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("wheel", (event) => {
    const x = event.clientX - canvas.getBoundingClientRect().left, middle = timeView.start + (x - LEFT) / timeView.scale;
    if (event.ctrlKey || event.metaKey) { event.preventDefault(); zoomTime(Math.exp(event.deltaY / 220), middle); }
    else if (event.deltaX) { event.preventDefault(); clampTime(timeView.start + event.deltaX / timeView.scale, timeView.end - timeView.start); }
  }, { passive: false });
  addEventListener("resize", drawTimeline);
}
