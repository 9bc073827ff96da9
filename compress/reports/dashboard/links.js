// What leaves the page: its address, which holds what is shown, and the runs as CSV.
"use strict";

const UNBOUNDED = "any";

// Everything that is not as the page opens: `run=NAME`, filters by their names, bounds, the axes and the order of the table.
function addressOf(state) {
  const said = new URLSearchParams();
  if (state.opened) said.set("run", state.opened);
  for (const id of [...Object.keys(FILTERS), "filter-name"]) {
    const value = document.getElementById(id).value;
    if (value) said.set(id.replace("filter-", ""), value);
  }
  for (const [name, value] of Object.entries(bounds)) {
    if (value !== ASKED[name]) said.set(`bound-${name}`, value === null ? UNBOUNDED : value);
  }
  if (document.getElementById("apply").checked) said.set("only", "1");
  for (const id of AXES_OF_PAGE) {
    const choice = document.getElementById(id);
    if (choice.selectedIndex > 0) said.set(id, choice.value);
  }
  if (state.sorted !== SORTED || !state.descending) said.set("sort", `${state.descending ? "-" : ""}${state.sorted}`);
  return said.toString();
}

function writeAddress(state) {
  const said = addressOf(state);
  if (said !== location.hash.slice(1)) history.replaceState(null, "", said ? `#${said}` : location.pathname + location.search);
}

// Put the page into the state that its address says. The address of a part of the page (#table-section) says nothing of it.
function readAddress(state) {
  const text = location.hash.slice(1);
  if (text && !text.includes("=")) return false;
  const said = new URLSearchParams(text);
  for (const id of [...Object.keys(FILTERS), "filter-name"]) document.getElementById(id).value = said.get(id.replace("filter-", "")) || "";
  for (const name of Object.keys(bounds)) {
    const given = said.get(`bound-${name}`);
    const value = Number(given);
    if (given === null) bounds[name] = ASKED[name];
    else bounds[name] = given !== UNBOUNDED && Number.isFinite(value) && value > 0 ? value : null;
  }
  document.getElementById("apply").checked = said.get("only") === "1";
  for (const id of AXES_OF_PAGE) {
    const choice = document.getElementById(id);
    choice.value = said.get(id);
    if (choice.selectedIndex < 0) choice.selectedIndex = 0;
  }
  const sort = said.get("sort") || `-${SORTED}`;
  const sorted = sort.replace(/^-/, "");
  state.sorted = COLUMNS.some((one) => one.name === sorted) ? sorted : SORTED;
  state.descending = sort.startsWith("-");
  state.opened = said.get("run");
  return true;
}

const CSV = [
  ["run", (run) => run.run], ["recipe", (run) => run.recipe], ["model", (run) => run.model], ["machine", (run) => run.machine],
  ["tasks", (run) => data.groups[run.group].tasks.join(" ")], ["methods", (run) => run.methods.join(" ")], ["family", (run) => run.family],
  ["weights", (run) => run.weights], ["activations", (run) => run.activations], ["runtime", (run) => run.runtime],
  ["kept", (run) => run.kept], ["kept_low", (run) => run.low], ["kept_high", (run) => run.high], ["verdict", (run) => run.verdict],
  ["regressed", (run) => run.regressed.join(" ")], ["cosine", (run) => run.cosine], ["overlap_at_10", (run) => run.overlap],
  ["bytes", (run) => run.bytes], ["speedup", (run) => run.speedup], ["texts_per_second", (run) => run.texts_per_second],
  ["latency_p50_ms", (run) => run.latency_ms], ["latency_p99_ms", (run) => run.p99_ms], ["loaded_bytes", (run) => run.loaded_bytes],
  ["peak_bytes", (run) => run.peak_bytes], ["pareto_optimal", (run) => run.optimal],
  ["mean_score", (run) => run.mean], ["imported_from", (run) => (run.imported ? run.imported.source : null)],
];

// RFC 4180. A text that a spreadsheet would take for a formula gets an apostrophe, which spreadsheets do not show.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "string") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv(runs) {
  return [CSV.map(([name]) => name), ...runs.map((run) => CSV.map(([, of]) => of(run)))].map((row) => `${row.map(csvCell).join(",")}\r\n`).join("");
}

function saveCsv(runs) {
  const address = URL.createObjectURL(new Blob([csv(runs)], { type: "text/csv" }));
  made("a", { href: address, download: "runs.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
