// The page: filters, sorting and selection; everything is drawn again when they change.
"use strict";

const data = JSON.parse(document.getElementById("payload").textContent);
const byName = new Map(data.runs.map((run) => [run.run, run]));
const families = [...new Set(data.runs.map((run) => run.family))].sort();
const state = { sorted: SORTED, descending: true, picked: [], everything: false, opened: null };
const AXES_OF_PAGE = ["axis", "upward"];
const FILTERS = {
  "filter-model": (run) => [run.model],
  "filter-tasks": (run) => [taskNames(run)],
  "filter-machine": (run) => [run.machine],
  "filter-family": (run) => [run.family],
  "filter-method": (run) => run.methods,
  "filter-runtime": (run) => [run.runtime],
};

// Charts further down are drawn when they become visible or are printed, so that the first chart appears sooner.
const LATENCY = [{ name: "median", of: (run) => run.latency_ms }, { name: "99th percentile", of: (run) => run.p99_ms }];
const MEMORY = [{ name: "on disk", of: (run) => run.bytes }, { name: "loaded", of: (run) => run.loaded_bytes }, { name: "peak", of: (run) => run.peak_bytes }];
const BELOW = {
  tasks,
  fidelity,
  latency: (runs) => bars("latency", runs, LATENCY, "ms", (value) => number(value, 1)),
  memory: (runs) => bars("memory", runs, MEMORY, "bytes", bytes),
  cost,
  sensitivity: () => heatMaps("sensitivity", data.sensitivities),
};
const stale = new Set();
const seen = new Set();

function drawSeen(all) {
  const runs = shownRuns();
  for (const id of [...stale]) {
    if (!all && !seen.has(id)) continue;
    stale.delete(id);
    BELOW[id](runs);
  }
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) seen.add(entry.target.id);
    else seen.delete(entry.target.id);
  }
  drawSeen();
}, { rootMargin: "300px" });

function taskNames(run) {
  const names = data.groups[run.group].tasks;
  return names.length ? `${names.length}: ${names.join(", ")}` : "no accuracy";
}

function fillFilters() {
  for (const [id, values] of Object.entries(FILTERS)) {
    const counts = new Map();
    for (const run of data.runs) for (const value of new Set(values(run))) counts.set(value, (counts.get(value) || 0) + 1);
    const options = [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => {
      const shown = value.length > 46 ? `${value.slice(0, 45)}…` : value;
      return made("option", { value, title: value }, `${shown} (${count})`);
    });
    document.getElementById(id).replaceChildren(made("option", { value: "" }, "all"), ...options);
  }
}

// The runs that the filters leave; the answer is found among these.
function filteredRuns() {
  const wanted = Object.entries(FILTERS).map(([id, values]) => [document.getElementById(id).value, values]);
  const part = document.getElementById("filter-name").value.trim().toLowerCase();
  return data.runs.filter((run) => wanted.every(([value, values]) => !value || values(run).includes(value)) && (!part || run.run.toLowerCase().includes(part)));
}

// The runs of everything below the answer.
function shownRuns() {
  const runs = filteredRuns();
  return document.getElementById("apply").checked ? runs.filter((run) => holds(run)) : runs;
}

function open(name) {
  state.opened = name;
  openRun(byName.get(name));
  writeAddress(state);
}

function closed() {
  state.opened = null;
  writeAddress(state);
}

// The page as its address says, when it is opened and when the address is changed by hand or by a link.
function arrive() {
  if (!readAddress(state)) return;
  const [name, dialog, missing] = [state.opened, document.getElementById("run"), document.getElementById("missing")];
  const there = name === null || byName.has(name);
  missing.hidden = there;
  missing.textContent = there ? "" : `The run ${name} is not on this page.`;
  if (dialog.open) dialog.close();
  showBounds();
  refresh();
  if (name !== null && there) open(name);
}

function changed(what) {
  Object.assign(state, what);
  const runs = shownRuns();
  listRuns(runs, state, changed, open);
  writeAddress(state);
  sideBySide(state.picked.map((name) => byName.get(name)));
}

function refresh() {
  answers(filteredRuns(), data.groups, open);
  const runs = shownRuns();
  const groups = new Set(runs.map((run) => run.group));
  document.getElementById("count").textContent = `${runs.length} of ${data.runs.length} runs`;
  const axis = document.getElementById("axis").value;
  const drawn = scatter(runs, axis, document.getElementById("upward").value, families, open);
  const notes = [];
  if (drawn < runs.length) notes.push(`${runs.length - drawn} of these runs have no score or no value on this axis.`);
  if (runs.some((run) => run.imported)) notes.push("Imported models were measured elsewhere: their data, prompts and packages may differ, and they have no interval.");
  if (groups.size > 1) notes.push(`These runs form ${groups.size} sets that are not comparable (model, tasks, machine or packages differ); each set has its own line.`);
  document.getElementById("scatter-note").textContent = notes.join(" ");
  for (const id of Object.keys(BELOW)) stale.add(id);
  drawSeen();
  changed({});
}

// Many events in a row, as from a slider that is dragged, draw once.
let waiting = 0;
function soonRefresh() {
  clearTimeout(waiting);
  waiting = setTimeout(refresh, 60);
}

// Whoever moves a bound wants to see what it leaves.
function bounded() {
  document.getElementById("apply").checked = true;
  answers(filteredRuns(), data.groups, open);
  soonRefresh();
}

function everyRun() {
  document.getElementById("filters").reset();
  document.getElementById("apply").checked = false;
  refresh();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  refresh();
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  const own = data.runs.filter((run) => !run.imported);
  const models = new Set(own.map((run) => run.model));
  const [sets, imported] = [new Set(own.map((run) => run.group)).size, data.runs.length - own.length];
  document.getElementById("summary").textContent = `${own.length} runs of ${models.size} model${models.size === 1 ? "" : "s"}, ${sets} comparable set${sets === 1 ? "" : "s"}${imported ? `, ${imported} imported` : ""}`;
  document.getElementById("footer").textContent = `Made by compress dashboard, ${data.generated}.`;
  const reasons = Object.entries(data.broken);
  document.getElementById("broken-section").hidden = !reasons.length;
  document.getElementById("broken").replaceChildren(...reasons.map(([place, reason]) => made("li", {}, `${place}: ${reason}`)));
  fillFilters();
  document.getElementById("sensitivity-section").hidden = !data.sensitivities.length;
  for (const id of [...Object.keys(FILTERS), ...AXES_OF_PAGE]) document.getElementById(id).addEventListener("change", refresh);
  fillBounds(data.runs, bounded);
  document.getElementById("filter-name").addEventListener("input", soonRefresh);
  document.getElementById("apply").addEventListener("change", refresh);
  for (const id of ["filters", "asking"]) document.getElementById(id).addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("every").addEventListener("click", everyRun);
  document.getElementById("more").addEventListener("click", () => changed({ everything: !state.everything }));
  document.getElementById("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.getElementById("close").addEventListener("click", () => document.getElementById("run").close());
  document.getElementById("run").addEventListener("close", closed);
  document.getElementById("csv").addEventListener("click", () => saveCsv(ordered(shownRuns(), state)));
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  addEventListener("hashchange", arrive);
  arrive();
  if (location.hash && !location.hash.includes("=")) refresh();
  for (const id of Object.keys(BELOW)) watcher.observe(document.getElementById(id));
  addEventListener("beforeprint", () => drawSeen(true));
  const watched = document.documentElement.dataset.watched;
  if (watched) setInterval(async () => { if ((await (await fetch("/state")).text()) !== watched) location.reload(); }, 2000);
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start();
