// Tables and number formats: the list of runs, the record of a run, the comparison of two runs.
"use strict";

const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(2)} %`);
const times = (ratio) => (ratio === null ? "not timed" : `${ratio.toFixed(2)}x`);
const signed = (points) => (points > 0 ? "+" : points < 0 ? "−" : "±") + Math.abs(points).toFixed(2);
const interval = (run) => (run.low === null ? "no interval" : `${(100 * run.low).toFixed(2)} to ${(100 * run.high).toFixed(2)}`);
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function bytes(count) {
  if (count === null || count === undefined) return "–";
  return count >= 1e9 ? `${(count / 1e9).toFixed(2)} GB` : `${(count / 1e6).toFixed(1)} MB`;
}

// Make an element with text or children. Text is never parsed as HTML, whatever a record contains.
function made(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Weights and activations; a name may break after its underscores.
const precision = (run) => (run.activations === "none" ? run.weights : `${run.weights} x ${run.activations}`);
const breakable = (text) => text.replaceAll("_", "_\u200b");

// The most important come first: a narrow screen shows the others to the right.
const COLUMNS = [
  { name: "recipe", of: (run) => run.recipe, left: true },
  { name: "model", of: (run) => run.model, left: true },
  { name: "kept", of: (run) => run.kept, show: (run) => percent(run.kept) },
  { name: "95 % interval", of: (run) => run.low, show: (run) => (run.low === null ? "–" : interval(run)) },
  { name: "verdict", of: (run) => run.verdict || "", left: true },
  { name: "faster", of: (run) => run.speedup, show: (run) => (run.speedup === null ? "–" : times(run.speedup)) },
  { name: "on disk", of: (run) => run.bytes, show: (run) => bytes(run.bytes) },
  { name: "p50 ms", of: (run) => run.latency_ms, show: (run) => number(run.latency_ms, 1) },
  { name: "peak memory", of: (run) => run.peak_bytes, show: (run) => bytes(run.peak_bytes) },
  { name: "cosine", of: (run) => run.cosine, show: (run) => number(run.cosine, 4) },
  { name: "stored as", of: (run) => precision(run), left: true, plan: true },
  { name: "runtime", of: (run) => run.runtime, left: true },
];
const shownIn = (column, run) => (column.show ? column.show(run) : String(column.of(run)));
const SORTED = "kept";
const FIRST_ROWS = 25;

function ordered(runs, state) {
  const column = COLUMNS.find((one) => one.name === state.sorted) || COLUMNS.find((one) => one.name === SORTED);
  return [...runs].sort((a, b) => {
    const [x, y] = [column.of(a), column.of(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (state.descending ? -1 : 1);
  });
}

function listRuns(runs, state, changed, open) {
  const order = ordered(runs, state);
  const head = made("tr", {}, made("th", { scope: "col" }, made("span", { class: "hidden" }, "compare")), ...COLUMNS.map((one) => {
    const own = one.name === state.sorted;
    const sort = () => changed({ sorted: one.name, descending: own ? !state.descending : !one.left });
    return made("th", { scope: "col", class: one.left ? "left" : null, "aria-sort": own ? (state.descending ? "descending" : "ascending") : null },
      made("button", { type: "button", "data-key": `sort ${one.name}`, onclick: sort }, one.name + (own ? (state.descending ? " ↓" : " ↑") : "")));
  }));
  const focused = document.activeElement && document.activeElement.dataset.key;
  document.querySelector("#table thead").replaceChildren(head);
  document.querySelector("#table tbody").replaceChildren(...order.slice(0, state.everything ? order.length : FIRST_ROWS).map((run) => {
    const tick = made("input", { type: "checkbox", "data-key": `tick ${run.run}`, "aria-label": `compare ${run.run}`, onchange: () => changed({ picked: picked(state.picked, run.run) }) });
    tick.checked = state.picked.includes(run.run);
    return made("tr", {}, made("td", {}, tick), ...COLUMNS.map((one) => {
      if (one.name !== "recipe") return made("td", { class: one.left ? (one.plan ? "left plan" : "left") : null }, one.plan ? breakable(one.of(run)) : shownIn(one, run));
      const star = run.optimal ? made("span", { class: "star", title: "Pareto-optimal among comparable runs" }, " ★") : null;
      return made("td", { class: "left" }, made("button", { type: "button", "data-run": run.run, onclick: () => open(run.run) }, run.recipe), star);
    }));
  }));
  const more = document.getElementById("more");
  more.hidden = order.length <= FIRST_ROWS;
  more.textContent = state.everything ? `Show the first ${FIRST_ROWS} only` : `Show all ${order.length} runs`;
  // Those who sort or tick with the keyboard stay where they were: the elements are new.
  if (focused) [...document.querySelectorAll("#table [data-key]")].find((element) => element.dataset.key === focused)?.focus();
}

// The two runs that were ticked last.
function picked(before, name) {
  return before.includes(name) ? before.filter((other) => other !== name) : [...before, name].slice(-2);
}

function sideBySide(runs) {
  const place = document.getElementById("pair");
  if (runs.length !== 2) {
    place.replaceChildren();
    return;
  }
  const [a, b] = runs;
  const rows = COLUMNS.map((one) => [one.name, shownIn(one, a), shownIn(one, b), ""]);
  const theirs = new Map(b.record.tasks.map((task) => [task.task, task.variant]));
  for (const task of a.record.tasks) {
    if (!theirs.has(task.task)) continue;
    const [x, y] = [100 * task.variant, 100 * theirs.get(task.task)];
    rows.push([task.task, x.toFixed(2), y.toFixed(2), signed(y - x)]);
  }
  const apart = a.group === b.group ? null
    : made("p", { class: "note" }, "These two are not comparable: their model, tasks, machine or packages differ.");
  place.replaceChildren(made("h3", {}, `${a.recipe} and ${b.recipe}`), ...(apart ? [apart] : []), table(["", a.run, b.run, "difference"], rows));
}

function table(headings, rows) {
  return made("table", {}, made("thead", {}, made("tr", {}, ...headings.map((name, place) => made("th", { scope: "col", class: place ? null : "left" }, name)))),
    made("tbody", {}, ...rows.map((row) => made("tr", {}, ...row.map((cell, place) => made("td", { class: place ? null : "left" }, cell))))));
}

function openRun(run) {
  const record = run.record;
  if (run.imported) {
    openImported(run);
    return;
  }
  headed(run);
  const facts = {
    verdict: record.verdict, model: `${record.model.name}, ${(record.model.parameters / 1e6).toFixed(1)} M parameters, licence ${record.model.licence || "unknown"}`,
    baseline: record.baseline, "measured on": record.measured_on, made: record.created, command: record.command,
    machine: `${record.machine.gpu || record.machine.cpu}, ${record.machine.cores} cores, ${record.machine.instructions.join(" ")}`,
    packages: Object.entries(record.versions).map(([name, version]) => `${name} ${version}`).join(", "),
  };
  const body = document.getElementById("run-body");
  body.replaceChildren(
    made("dl", {}, ...Object.entries(facts).flatMap(([name, value]) => [made("dt", {}, name), made("dd", {}, value)])),
    made("h3", {}, "Steps"), scrolled(table(["step", "seconds", ""], record.steps.map((step) => [step.config.method, step.seconds.toFixed(1), step.note]))),
    made("h3", {}, "Tasks"), scrolled(table(["task", "metric", "baseline", "variant", "difference", "95 % interval", "verdict"], record.tasks.map(taskRow))),
    made("h3", {}, "Embedders"), scrolled(table(["", "on disk", "texts/s", "p50 ms", "p99 ms", "peak memory"], record.rows.map(embedderRow))),
    ...charts(record),
    ...heatMapsOf(record),
    made("details", {}, made("summary", {}, "The record as JSON"), made("pre", { tabindex: "0" }, JSON.stringify(record, null, 1))),
  );
  for (const cell of body.querySelectorAll("td:last-child")) if (cell.textContent.length > 60) cell.className = "wrap";
  document.getElementById("run").showModal();
  plotRun(record);
  if (document.getElementById("run-sensitivity")) heatMaps("run-sensitivity", sensitivitiesOf(record));
}

function headed(run) {
  document.getElementById("run-title").textContent = run.run;
  document.getElementById("run-link").href = `#${new URLSearchParams({ run: run.run })}`;
}

// An imported model: where it is from and its tasks; nothing else was measured.
function openImported(run) {
  headed(run);
  const facts = {
    model: run.model, "imported from": `results of ${run.imported.source}, revision ${run.imported.revision}`,
    "in the set of": data.groups[run.group].title, size: run.bytes === null ? "unknown" : `${bytes(run.bytes)}, ${run.weights}`,
    "mean score": number(100 * run.mean, 2), kept: run.kept === null ? "no baseline to compare with" : percent(run.kept),
  };
  document.getElementById("run-body").replaceChildren(
    made("dl", {}, ...Object.entries(facts).flatMap(([name, value]) => [made("dt", {}, name), made("dd", {}, value)])),
    made("p", { class: "note" }, "Measured elsewhere: data, prompts and packages may differ from those of the runs, and there is no interval."),
    made("h3", {}, "Tasks"), scrolled(table(["task", "metric", "baseline", "model", "difference"], run.record.tasks.map((task) => [
      task.task, task.metric, task.baseline === null ? "–" : (100 * task.baseline).toFixed(2), (100 * task.variant).toFixed(2),
      task.baseline === null ? "–" : signed(100 * (task.variant - task.baseline))]))),
  );
  document.getElementById("run").showModal();
}

const scrolled = (inside) => made("div", { class: "scroll" }, inside);

function taskRow(task) {
  const ends = task.interval ? `${signed(100 * task.interval.low)} to ${signed(100 * task.interval.high)}` : "–";
  return [task.task, task.metric, (100 * task.baseline).toFixed(2), (100 * task.variant).toFixed(2), signed(100 * (task.variant - task.baseline)), ends, task.verdict || "–"];
}

function embedderRow(row) {
  const speed = row.speed;
  const name = row.role === "baseline" ? row.name : `${row.weights} x ${row.activations}`;
  if (!speed) return [name, bytes(row.size_bytes), "–", "–", "–", "–"];
  const peak = speed.gpu_peak_bytes === null ? speed.peak_bytes : speed.gpu_peak_bytes;
  return [name, bytes(row.size_bytes), speed.texts_per_second.toFixed(0), number(speed.latency_p50_ms, 1), number(speed.latency_p99_ms, 1), bytes(peak)];
}

// Elements for a run's own charts, where the record has their data.
function charts(record) {
  const wanted = [
    ["run-cosines", "Cosine to the baseline's vectors", (record.fidelity && record.fidelity.cosines || []).length],
    ["run-curve", "Training", curves(record).length],
    ["run-cells", "Throughput by batch size and length, texts per second", cells(record).length],
  ];
  return wanted.filter(([, , any]) => any).flatMap(([id, title]) => [made("h3", {}, title), made("div", { id, class: "chart" })]);
}

const curves = (record) => record.steps.filter((step) => step.found && step.found.curve && step.found.curve.length).map((step) => step.found.curve);
const cells = (record) => record.rows.filter((row) => row.speed && row.speed.cells && row.speed.cells.length);

// Values counted in intervals of equal width; where all are equal, in one.
function binned(values, most) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const count = high > low ? most : 1;
  const width = (high - low || 1e-6) / count;
  const bins = Array.from({ length: count }, (_, place) => ({ low: low + place * width, high: low + (place + 1) * width, middle: low + (place + 0.5) * width, count: 0 }));
  for (const value of values) bins[Math.min(count - 1, Math.floor((value - low) / width))].count += 1;
  return bins;
}

// The learning curves of a run's steps: what each training judged on held-out texts, and its loss.
function plotCurves(found) {
  const judged = (curve) => Object.keys(curve[0]).find((name) => !["step", "loss", "seconds"].includes(name));
  const name = (place) => (found.length > 1 ? ` ${place + 1}` : "");
  const traces = found.flatMap((curve, place) => [
    { x: curve.map((look) => look.step), y: curve.map((look) => look[judged(curve)]), name: `held-out ${judged(curve)}${name(place)}`, line: { color: COLOURS[(2 * place) % COLOURS.length] } },
    { x: curve.map((look) => look.step), y: curve.map((look) => look.loss), name: `loss${name(place)}`, yaxis: "y2", line: { color: COLOURS[(2 * place + 1) % COLOURS.length], dash: "dash" } },
  ]);
  draw("run-curve", traces, {
    height: 340, xaxis: { title: { text: "step" } }, yaxis: { title: { text: `held-out ${judged(found[0])}` } },
    yaxis2: { overlaying: "y", side: "right", title: { text: "loss" }, showgrid: false, automargin: true }, ...LEGEND_ABOVE, margin: { l: 50, r: 50, t: 40, b: 50 },
  }, () => [["training", "step", "held-out", "loss", "seconds"], found.flatMap((curve, place) => curve.map((look) => [String(place + 1), String(look.step), number(look[judged(curve)], 5), number(look.loss, 5), number(look.seconds, 0)]))]);
}

function plotRun(record) {
  if (document.getElementById("run-cosines")) {
    const bins = binned(record.fidelity.cosines, 40);
    draw("run-cosines", [{ type: "bar", x: bins.map((bin) => bin.middle), y: bins.map((bin) => bin.count), width: bins.map((bin) => bin.high - bin.low), marker: { color: COLOURS[0] }, hovertemplate: "%{x:.5f}: %{y} texts<extra></extra>" }],
      { height: 300, xaxis: { title: { text: "cosine" } }, yaxis: { title: { text: "texts" } } },
      () => [["cosine from", "to", "texts"], bins.filter((bin) => bin.count).map((bin) => [bin.low.toFixed(5), bin.high.toFixed(5), String(bin.count)])]);
  }
  if (document.getElementById("run-curve")) plotCurves(curves(record));
  if (document.getElementById("run-cells")) {
    const traces = cells(record).flatMap((row, place) => [...new Set(row.speed.cells.map((cell) => cell.length))].map((length, turn) => {
      const own = row.speed.cells.filter((cell) => cell.length === length);
      return {
        x: own.map((cell) => cell.batch), y: own.map((cell) => cell.batch / cell.seconds), mode: "lines+markers", name: `${row.name}, ${length} tokens`,
        line: { color: COLOURS[place % COLOURS.length], dash: ["solid", "dash", "dot", "dashdot"][turn % 4] },
      };
    }));
    draw("run-cells", traces, { height: 360, xaxis: { title: { text: "texts per batch" }, type: "log" }, yaxis: { title: { text: "texts per second" }, type: "log" } },
      () => [["embedder", "tokens", "batch", "texts/s"], cells(record).flatMap((row) => row.speed.cells.map((cell) => [row.name, String(cell.length), String(cell.batch), (cell.batch / cell.seconds).toFixed(1)]))]);
  }
}
