"use strict";
// Two texts side by side. Lines are aligned by the value that they define: values keep their names through all passes.

const lineKey = (line) => (line.match(/^(\s*%\w+|program |block )/) || [line])[0];

/** Pairs [before, after] of lines; undefined where one side has none. */
function alignLines(before, after) {
  const rows = before.length + 1, columns = after.length + 1;
  const a = before.map(lineKey), b = after.map(lineKey);
  const length = new Uint32Array(rows * columns);
  for (let i = rows - 2; i >= 0; i--) {
    for (let j = columns - 2; j >= 0; j--) {
      length[i * columns + j] = a[i] === b[j]
        ? length[(i + 1) * columns + j + 1] + 1
        : Math.max(length[(i + 1) * columns + j], length[i * columns + j + 1]);
    }
  }
  const pairs = [];
  let i = 0, j = 0;
  while (i < before.length || j < after.length) {
    if (i < before.length && j < after.length && a[i] === b[j]) pairs.push([before[i++], after[j++]]);
    else if (j >= after.length || (i < before.length && length[(i + 1) * columns + j] >= length[i * columns + j + 1])) pairs.push([before[i++], undefined]);
    else pairs.push([undefined, after[j++]]);
  }
  return pairs;
}

/** The words of a line, those marked that the other one lacks. */
function markedWords(line, other) {
  const known = new Set(other.split(/([\s,()[\]])/));
  return line.split(/([\s,()[\]])/).map((word) => (known.has(word) ? word : el("mark", {}, word)));
}

function diffRow([before, after], moved) {
  if (before === after) return el("tr", {}, el("td", { class: "equal" }, before), el("td", { class: "equal" }, after));
  if (before === undefined) return el("tr", {}, el("td"), el("td", { class: moved.has(after) ? "moved" : "new" }, after));
  if (after === undefined) return el("tr", {}, el("td", { class: moved.has(before) ? "moved" : "gone" }, before), el("td"));
  return el("tr", {}, el("td", { class: "gone" }, markedWords(before, after)), el("td", { class: "new" }, markedWords(after, before)));
}

/** How many lines differ, not counting those that only moved. */
function countChanges(before, after) {
  const left = new Set(before), right = new Set(after);
  return Math.max(before.filter((line) => !right.has(line)).length, after.filter((line) => !left.has(line)).length);
}

/** A table of both texts; long equal stretches are folded. */
function diffTable(before, after, heads) {
  const pairs = alignLines(before, after);
  const left = new Set(before), moved = new Set(after.filter((line) => left.has(line)));
  const near = pairs.map((_, i) => pairs.slice(Math.max(0, i - 2), i + 3).some(([a, b]) => a !== b));
  const body = el("tbody");
  for (let i = 0; i < pairs.length;) {
    if (near[i] || pairs.length < 12) { body.append(diffRow(pairs[i++], moved)); continue; }
    const start = i;
    while (i < pairs.length && !near[i]) i++;
    const hidden = pairs.slice(start, i);
    const row = el("tr", {}, el("td", { class: "skip", colspan: 2 }, el("button", {
      type: "button", onclick: () => row.replaceWith(...hidden.map((pair) => diffRow(pair, moved))),
    }, `${hidden.length} equal lines`)));
    body.append(row);
  }
  return el("table", { class: "diff" }, el("thead", {}, el("tr", {}, heads.map((head) => el("th", {}, head)))), body);
}
