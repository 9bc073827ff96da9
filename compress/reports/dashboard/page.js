// The page: filters, sorting and selection; everything is drawn again when they change.
"use strict";

const data = JSON.parse(document.getElementById("payload").textContent);
const byName = new Map(data.runs.map((run) => [run.run, run]));
const families = [...new Set(data.runs.map((run) => run.family))].sort();
const state = { sorted: "kept", descending: true, picked: [] };
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

function shownRuns() {
  const wanted = Object.entries(FILTERS).map(([id, values]) => [document.getElementById(id).value, values]);
  const part = document.getElementById("filter-name").value.trim().toLowerCase();
  return data.runs.filter((run) => wanted.every(([value, values]) => !value || values(run).includes(value)) && (!part || run.run.toLowerCase().includes(part)));
}

function open(name) {
  openRun(byName.get(name));
}

function changed(what) {
  Object.assign(state, what);
  const runs = shownRuns();
  listRuns(runs, state, changed, open);
  sideBySide(state.picked.map((name) => byName.get(name)));
}

function refresh() {
  const runs = shownRuns();
  const groups = new Set(runs.map((run) => run.group));
  document.getElementById("count").textContent = `${runs.length} of ${data.runs.length} runs`;
  const axis = document.getElementById("axis").value;
  const drawn = scatter(runs, axis, families, open);
  const notes = [];
  if (drawn < runs.length) notes.push(`${runs.length - drawn} of these runs have no score or no value on this axis.`);
  if (groups.size > 1) notes.push(`These runs form ${groups.size} sets that are not comparable (model, tasks, machine or packages differ); each set has its own line.`);
  document.getElementById("scatter-note").textContent = notes.join(" ");
  for (const id of Object.keys(BELOW)) stale.add(id);
  drawSeen();
  changed({});
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  refresh();
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  const models = new Set(data.runs.map((run) => run.model));
  document.getElementById("summary").textContent = `${data.runs.length} runs of ${models.size} model${models.size === 1 ? "" : "s"}, ${data.groups.length} comparable set${data.groups.length === 1 ? "" : "s"}`;
  document.getElementById("footer").textContent = `Made by compress dashboard, ${data.generated}.`;
  const reasons = Object.entries(data.broken);
  document.getElementById("broken-section").hidden = !reasons.length;
  document.getElementById("broken").replaceChildren(...reasons.map(([place, reason]) => made("li", {}, `${place}: ${reason}`)));
  fillFilters();
  for (const id of [...Object.keys(FILTERS), "axis"]) document.getElementById(id).addEventListener("change", refresh);
  document.getElementById("filter-name").addEventListener("input", refresh);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("every").addEventListener("click", () => { document.getElementById("filters").reset(); refresh(); });
  document.getElementById("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.getElementById("close").addEventListener("click", () => document.getElementById("run").close());
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  refresh();
  for (const id of Object.keys(BELOW)) watcher.observe(document.getElementById(id));
  addEventListener("beforeprint", () => drawSeen(true));
  const watched = document.documentElement.dataset.watched;
  if (watched) setInterval(async () => { if ((await (await fetch("/state")).text()) !== watched) location.reload(); }, 2000);
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start();
