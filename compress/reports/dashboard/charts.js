// Charts: each function draws the given runs into its element. Filters are applied before.
"use strict";

// Okabe and Ito's palette, which people with any colour vision can tell apart; marker shapes show the runtime.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#A6761D"];
const SHAPES = { torch: "circle", onnxruntime: "square", openvino: "diamond", imported: "star-open" };

// Plotly reads a few tags in texts.
const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const AXES = {
  speedup: { title: "throughput relative to the baseline", better: 1 },
  bytes: { title: "size of the weights, bytes", better: -1 },
  peak_bytes: { title: "peak memory, bytes", better: -1 },
  latency_ms: { title: "median latency of one text, ms", better: -1 },
};
const DIVERGING = ["#B35806", "#F7F7F7", "#2166AC"];
const MOST_ROWS = 30;
const LEGEND_ABOVE = { legend: { orientation: "h", y: 1, yanchor: "bottom", itemwidth: 30 }, margin: { l: 50, r: 14, t: 70, b: 50 } };

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function layout(extra) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 12 },
    margin: { l: 50, r: 14, t: 10, b: 50 }, hoverlabel: { align: "left" },
    legend: { orientation: "h", y: -0.18, itemclick: "toggle" },
    ...rest, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
  };
}

// Observe the elements, not the window: their width changes for other reasons too.
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.isConnected && target.classList.contains("js-plotly-plot")) Plotly.Plots.resize(target);
});

// Draw a chart. `numbers` returns what it shows as a table, headings and rows, for those who do not see it.
function draw(id, traces, extra, numbers) {
  const element = document.getElementById(id);
  tabled(element, traces.length ? numbers : null);
  if (!traces.length) {
    Plotly.purge(element);
    element.style.height = "";
    element.textContent = "None of these runs measured it.";
    return;
  }
  if (!element.classList.contains("js-plotly-plot")) element.textContent = "";
  element.style.height = `${extra.height}px`; // resizing uses the element's height, not the layout's
  Plotly.react(element, traces, layout(extra), { displaylogo: false, displayModeBar: false });
  sizes.observe(element);
}

// The numbers of a chart below it, made when they are asked for.
function tabled(element, numbers) {
  let place = document.getElementById(`${element.id}-numbers`);
  if (!place) {
    const inside = made("div", {});
    place = made("details", { class: "numbers", id: `${element.id}-numbers`, ontoggle: () => fill() }, made("summary", {}, "The numbers as a table"), inside);
    const fill = () => { if (place.open && place.numbers) inside.replaceChildren(table(...place.numbers())); };
    place.fill = fill;
    element.after(place);
    element.setAttribute("role", "img");
    const title = element.closest("section")?.querySelector("h2") || element.previousElementSibling;
    element.setAttribute("aria-label", `Chart: ${title ? title.textContent : element.id}. Its numbers are in the table after it.`);
  }
  place.hidden = !numbers;
  place.numbers = numbers;
  place.fill();
}

function narrow() {
  return document.documentElement.clientWidth < 600;
}

// A legend under the chart: on a narrow screen it has a line for each name, for which the chart is made taller.
function belowOnNarrow(names) {
  if (!narrow()) return { height: 480 };
  const room = 22 * names + 20;
  return { height: 380 + room, margin: { l: 50, r: 14, t: 10, b: 50 + room }, legend: { orientation: "v", yref: "container", y: 0, yanchor: "bottom", x: 0 } };
}

function rowsHeight(count) {
  return Math.max(300, 130 + 22 * count);
}

// The Pareto-optimal runs in retained score and the axis, sorted by the axis.
function front(runs, axis, upward) {
  const better = AXES[axis].better;
  const known = runs.filter((run) => run[upward] !== null && run[axis] !== null && !run.imported);
  const order = [...known].sort((a, b) => better * (b[axis] - a[axis]) || b[upward] - a[upward]);
  const found = [];
  let most = -Infinity;
  for (const run of order) {
    if (run[upward] > most) {
      found.push(run);
      most = run[upward];
    }
  }
  return found.sort((a, b) => a[axis] - b[axis]);
}

// The ends of a run's interval on the vertical axis. Both axes share the baseline, so the mean score's interval is scaled alike.
function endsOf(run, upward) {
  if (run.low === null || run.kept === null) return null;
  const factor = run[upward] / run.kept;
  return [100 * run.low * factor, 100 * run.high * factor];
}

const shareOrPoints = (run, upward) => (upward === "kept" ? percent(run.kept) : number(100 * run.mean, 2));

function scatter(runs, axis, upward, families, open) {
  const known = runs.filter((run) => run[upward] !== null && run[axis] !== null);
  const traces = [...new Set(runs.map((run) => run.group))].map((group) => {
    const best = front(runs.filter((run) => run.group === group), axis, upward);
    return {
      x: best.map((run) => run[axis]), y: best.map((run) => 100 * run[upward]), mode: "lines", hoverinfo: "skip",
      line: { color: css("--soft"), width: 1.5, dash: "dot" }, showlegend: false,
    };
  });
  families.forEach((family, number) => {
    const own = known.filter((run) => run.family === family);
    if (!own.length) return;
    const colour = family === "imported" ? css("--text") : COLOURS[number % COLOURS.length];
    const spans = own.map((run) => endsOf(run, upward));
    traces.push({
      x: own.map((run) => run[axis]), y: own.map((run) => 100 * run[upward]), mode: "markers", name: family,
      customdata: own.map((run) => run.run),
      text: own.map((run) => `<b>${escaped(run.recipe)}</b><br>${escaped(precision(run))}, ${escaped(run.runtime)}<br>` +
        `${percent(run.kept)} of the score kept (${interval(run)})<br>${bytes(run.bytes)}, ${times(run.speedup)}<br>${escaped(run.model)}`),
      hovertemplate: "%{text}<extra></extra>",
      error_y: {
        type: "data", symmetric: false, thickness: 1, width: 0, color: colour,
        array: own.map((run, place) => (spans[place] ? spans[place][1] - 100 * run[upward] : 0)),
        arrayminus: own.map((run, place) => (spans[place] ? 100 * run[upward] - spans[place][0] : 0)),
      },
      marker: {
        size: 10, color: colour, symbol: own.map((run) => SHAPES[run.runtime] || "x"),
        line: { width: own.map((run) => (run.optimal || run.imported ? 2 : 0.5)), color: css("--text") },
      },
    });
  });
  const line = bounds.kept === null || upward !== "kept" ? {} : {
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: bounds.kept, y1: bounds.kept, line: { color: css("--accent"), width: 1, dash: "dash" } }],
  };
  draw("scatter", known.length ? traces : [], {
    ...line, ...belowOnNarrow(families.length), xaxis: { title: { text: AXES[axis].title }, rangemode: axis === "speedup" ? "normal" : "tozero" },
    yaxis: { title: { text: upward === "kept" ? "score kept, %" : "mean score of the set's tasks" } }, hovermode: "closest",
  }, () => [["recipe", "model", AXES[axis].title, upward === "kept" ? "kept" : "mean score", "95 % interval"], known.map((run) => [
    made("button", { type: "button", onclick: () => open(run.run) }, run.recipe), run.model, axis.endsWith("bytes") ? bytes(run[axis]) : number(run[axis], 2), shareOrPoints(run, upward),
    endsOf(run, upward) ? endsOf(run, upward).map((end) => end.toFixed(2)).join(" to ") : "no interval"])]);
  const element = document.getElementById("scatter");
  if (known.length && !element.dataset.listens) {
    element.dataset.listens = "yes";
    element.on("plotly_click", (event) => event.points[0].customdata && open(event.points[0].customdata));
  }
  return known.length;
}

function tasks(runs) {
  const all = runs.filter((run) => run.record.tasks.length && run.kept !== null);
  const scored = all.slice(0, MOST_ROWS);
  const names = [...new Set(scored.flatMap((run) => run.record.tasks.map((task) => task.task)))];
  const deltas = scored.map((run) => {
    const own = new Map(run.record.tasks.map((task) => [task.task, task]));
    return names.map((name) => (own.has(name) ? 100 * (own.get(name).variant - own.get(name).baseline) : null));
  });
  const most = Math.max(0.5, ...deltas.flat().filter((delta) => delta !== null).map(Math.abs));
  const trace = {
    type: "heatmap", x: names, y: labels(scored), z: deltas, zmin: -most, zmax: most, xgap: 1, ygap: 1,
    colorscale: DIVERGING.map((colour, place) => [place / (DIVERGING.length - 1), colour]),
    text: deltas.map((row) => row.map((delta) => (delta === null ? "" : signed(delta)))), texttemplate: narrow() ? "" : "%{text}",
    textfont: { size: 10 }, hovertemplate: "%{y}<br>%{x}: %{text}<extra></extra>", showscale: false,
  };
  scale("tasks-scale", scored.length ? DIVERGING : [], signed(-most), `${signed(most)} points`);
  draw("tasks", scored.length ? [trace] : [], { height: rowsHeight(scored.length), yaxis: { autorange: "reversed" }, xaxis: { side: "top" }, margin: { l: 50, r: 10, t: 60, b: 10 } },
    () => [["recipe", ...names], scored.map((run, row) => [labels(scored)[row], ...deltas[row].map((delta) => (delta === null ? "–" : signed(delta)))])]);
  limited("tasks", scored.length, all.length);
}

// The colours of a heat map and what its ends mean, above the map: a colour bar next to it would take the labels' room.
function scale(id, colours, low, high) {
  const ramp = made("i", { "aria-hidden": "true" });
  ramp.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  document.getElementById(id).replaceChildren(...(colours.length ? [made("span", {}, low), ramp, made("span", {}, high)] : []));
}

// Say that a chart shows the first runs only.
function limited(id, shown, all) {
  const place = document.getElementById(`${id}-limit`) || made("p", { id: `${id}-limit`, class: "note" });
  place.textContent = shown < all ? `The first ${shown} of ${all} runs, set by set; those that keep most come first. Filters show others.` : "";
  document.getElementById(id).after(place);
}

// Two runs may have the same name; categories of a plot must differ.
function labels(runs) {
  const seen = new Map();
  return runs.map((run) => {
    const count = (seen.get(run.recipe) || 0) + 1;
    seen.set(run.recipe, count);
    return count === 1 ? run.recipe : `${run.recipe} (${count})`;
  });
}

function fidelity(runs) {
  const all = runs.filter((run) => run.cosine !== null);
  const known = all.slice(0, MOST_ROWS);
  const of = (key) => known.map((run) => run.record.fidelity[key]);
  const mean = of("cosine_mean");
  const trace = {
    type: "scatter", mode: "markers", x: mean, y: labels(known), marker: { color: COLOURS[0], size: 8 }, name: "mean",
    error_x: { type: "data", symmetric: false, array: known.map(() => 0), arrayminus: of("cosine_min").map((least, row) => mean[row] - least), color: css("--soft"), thickness: 1.2, width: 3 },
    text: known.map((run, row) => `mean ${mean[row].toFixed(5)}, 1st percentile ${of("cosine_p1")[row].toFixed(4)}, worst ${of("cosine_min")[row].toFixed(4)}`),
    hovertemplate: "%{y}<br>%{text}<extra></extra>",
  };
  draw("fidelity", known.length ? [trace] : [], { height: rowsHeight(known.length), yaxis: { autorange: "reversed" }, xaxis: { title: { text: "cosine" } } },
    () => [["recipe", "mean", "1st percentile", "lowest"], known.map((run, row) => [labels(known)[row], ...["cosine_mean", "cosine_p1", "cosine_min"].map((key) => of(key)[row].toFixed(5))])]);
  limited("fidelity", known.length, all.length);
}

function bars(id, runs, parts, title, format) {
  const all = runs.filter((run) => parts.some((part) => part.of(run) !== null && part.of(run) !== undefined));
  const known = all.slice(0, MOST_ROWS);
  const traces = known.length ? parts.map((part, number) => ({
    type: "bar", orientation: "h", name: part.name, y: labels(known), x: known.map(part.of), marker: { color: COLOURS[number] },
    text: known.map((run) => format(part.of(run))), textposition: "none", hovertemplate: `%{y}<br>${part.name}: %{text}<extra></extra>`,
  })) : [];
  draw(id, traces, {
    height: rowsHeight(known.length * Math.max(1, parts.length / 2)), barmode: "group", yaxis: { autorange: "reversed" },
    xaxis: { title: { text: title } }, ...LEGEND_ABOVE,
  }, () => [["recipe", ...parts.map((part) => part.name)], known.map((run, row) => [labels(known)[row], ...parts.map((part) => format(part.of(run)))])]);
  limited(id, known.length, all.length);
}

function cost(runs) {
  const all = runs.filter((run) => run.record.steps.length);
  const known = all.slice(0, MOST_ROWS);
  const methods = [...new Set(known.flatMap((run) => run.methods))];
  const traces = methods.map((method, number) => {
    const spent = known.map((run) => secondsOf(run, method));
    return {
      type: "bar", orientation: "h", name: method, y: labels(known), x: spent,
      marker: { color: COLOURS[number % COLOURS.length], pattern: { shape: number < COLOURS.length ? "" : "/" } },
      hovertemplate: `%{y}<br>${method}: %{x:.1f} s<extra></extra>`,
    };
  });
  draw("cost", traces, {
    height: rowsHeight(known.length), barmode: "stack", yaxis: { autorange: "reversed" }, xaxis: { title: { text: "seconds" } },
    ...LEGEND_ABOVE,
  }, () => [["recipe", ...methods], known.map((run, row) => [labels(known)[row], ...methods.map((method) => secondsOf(run, method).toFixed(1))])]);
  limited("cost", known.length, all.length);
}

const secondsOf = (run, method) => run.record.steps.filter((step) => step.config.method === method).reduce((sum, step) => sum + step.seconds, 0);
