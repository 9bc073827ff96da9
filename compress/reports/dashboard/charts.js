// Charts: each function draws the given runs into its element. Filters are applied before.
"use strict";

// Okabe and Ito's palette, which people with any colour vision can tell apart; marker shapes show the runtime.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#A6761D"];
const SHAPES = { torch: "circle", onnxruntime: "square", openvino: "diamond" };
const AXES = {
  speedup: { title: "throughput relative to the baseline", better: 1 },
  bytes: { title: "size of the weights, bytes", better: -1 },
  peak_bytes: { title: "peak memory, bytes", better: -1 },
  latency_ms: { title: "median latency of one text, ms", better: -1 },
};
const MOST_ROWS = 60;
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

function draw(id, traces, extra) {
  const element = document.getElementById(id);
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

function narrow() {
  return document.documentElement.clientWidth < 600;
}

function rowsHeight(count) {
  return Math.max(300, 130 + 22 * count);
}

// The Pareto-optimal runs in retained score and the axis, sorted by the axis.
function front(runs, axis) {
  const better = AXES[axis].better;
  const known = runs.filter((run) => run.kept !== null && run[axis] !== null);
  const order = [...known].sort((a, b) => better * (b[axis] - a[axis]) || b.kept - a.kept);
  const found = [];
  let most = -Infinity;
  for (const run of order) {
    if (run.kept > most) {
      found.push(run);
      most = run.kept;
    }
  }
  return found.sort((a, b) => a[axis] - b[axis]);
}

function scatter(runs, axis, families, open) {
  const known = runs.filter((run) => run.kept !== null && run[axis] !== null);
  const traces = [...new Set(runs.map((run) => run.group))].map((group) => {
    const best = front(runs.filter((run) => run.group === group), axis);
    return {
      x: best.map((run) => run[axis]), y: best.map((run) => 100 * run.kept), mode: "lines", hoverinfo: "skip",
      line: { color: css("--soft"), width: 1.5, dash: "dot" }, showlegend: false,
    };
  });
  families.forEach((family, number) => {
    const own = known.filter((run) => run.family === family);
    if (!own.length) return;
    traces.push({
      x: own.map((run) => run[axis]), y: own.map((run) => 100 * run.kept), mode: "markers", name: family,
      customdata: own.map((run) => run.run),
      text: own.map((run) => `<b>${run.recipe}</b><br>${run.weights} x ${run.activations}, ${run.runtime}<br>` +
        `${percent(run.kept)} of the score kept (${interval(run)})<br>${bytes(run.bytes)}, ${times(run.speedup)}<br>${run.model}`),
      hovertemplate: "%{text}<extra></extra>",
      error_y: {
        type: "data", symmetric: false, thickness: 1, width: 0, color: COLOURS[number % COLOURS.length],
        array: own.map((run) => (run.high === null ? 0 : 100 * (run.high - run.kept))),
        arrayminus: own.map((run) => (run.low === null ? 0 : 100 * (run.kept - run.low))),
      },
      marker: {
        size: 10, color: COLOURS[number % COLOURS.length], symbol: own.map((run) => SHAPES[run.runtime] || "x"),
        line: { width: own.map((run) => (run.optimal ? 2 : 0.5)), color: css("--text") },
      },
    });
  });
  draw("scatter", known.length ? traces : [], {
    height: 480, xaxis: { title: { text: AXES[axis].title }, rangemode: axis === "speedup" ? "normal" : "tozero" },
    yaxis: { title: { text: "score kept, %" } }, hovermode: "closest",
  });
  const element = document.getElementById("scatter");
  if (known.length && !element.dataset.listens) {
    element.dataset.listens = "yes";
    element.on("plotly_click", (event) => event.points[0].customdata && open(event.points[0].customdata));
  }
  return known.length;
}

function tasks(runs) {
  const scored = runs.filter((run) => run.record.tasks.length).slice(0, MOST_ROWS);
  const names = [...new Set(scored.flatMap((run) => run.record.tasks.map((task) => task.task)))];
  const deltas = scored.map((run) => {
    const own = new Map(run.record.tasks.map((task) => [task.task, task]));
    return names.map((name) => (own.has(name) ? 100 * (own.get(name).variant - own.get(name).baseline) : null));
  });
  const most = Math.max(0.5, ...deltas.flat().filter((delta) => delta !== null).map(Math.abs));
  const trace = {
    type: "heatmap", x: names, y: labels(scored), z: deltas, zmin: -most, zmax: most, xgap: 1, ygap: 1,
    colorscale: [[0, "#B35806"], [0.5, "#F7F7F7"], [1, "#2166AC"]],
    text: deltas.map((row) => row.map((delta) => (delta === null ? "" : signed(delta)))), texttemplate: narrow() ? "" : "%{text}",
    textfont: { size: 10 }, hovertemplate: "%{y}<br>%{x}: %{text}<extra></extra>", colorbar: { title: { text: "points" }, thickness: 12 },
  };
  draw("tasks", scored.length ? [trace] : [], { height: rowsHeight(scored.length), yaxis: { autorange: "reversed" }, xaxis: { side: "top" }, margin: { l: 50, r: 10, t: 60, b: 10 } });
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
  const known = runs.filter((run) => run.cosine !== null).slice(0, MOST_ROWS);
  const of = (key) => known.map((run) => run.record.fidelity[key]);
  const mean = of("cosine_mean");
  const trace = {
    type: "scatter", mode: "markers", x: mean, y: labels(known), marker: { color: COLOURS[0], size: 8 }, name: "mean",
    error_x: { type: "data", symmetric: false, array: known.map(() => 0), arrayminus: of("cosine_min").map((least, row) => mean[row] - least), color: css("--soft"), thickness: 1.2, width: 3 },
    text: known.map((run, row) => `mean ${mean[row].toFixed(5)}, 1st percentile ${of("cosine_p1")[row].toFixed(4)}, worst ${of("cosine_min")[row].toFixed(4)}`),
    hovertemplate: "%{y}<br>%{text}<extra></extra>",
  };
  draw("fidelity", known.length ? [trace] : [], { height: rowsHeight(known.length), yaxis: { autorange: "reversed" }, xaxis: { title: { text: "cosine" } } });
}

function bars(id, runs, parts, title, format) {
  const known = runs.filter((run) => parts.some((part) => part.of(run) !== null && part.of(run) !== undefined)).slice(0, MOST_ROWS);
  const traces = known.length ? parts.map((part, number) => ({
    type: "bar", orientation: "h", name: part.name, y: labels(known), x: known.map(part.of), marker: { color: COLOURS[number] },
    text: known.map((run) => format(part.of(run))), textposition: "none", hovertemplate: `%{y}<br>${part.name}: %{text}<extra></extra>`,
  })) : [];
  draw(id, traces, {
    height: rowsHeight(known.length * Math.max(1, parts.length / 2)), barmode: "group", yaxis: { autorange: "reversed" },
    xaxis: { title: { text: title } }, ...LEGEND_ABOVE,
  });
}

function cost(runs) {
  const known = runs.filter((run) => run.record.steps.length).slice(0, MOST_ROWS);
  const methods = [...new Set(known.flatMap((run) => run.methods))];
  const traces = methods.map((method, number) => {
    const spent = known.map((run) => run.record.steps.filter((step) => step.config.method === method).reduce((sum, step) => sum + step.seconds, 0));
    return {
      type: "bar", orientation: "h", name: method, y: labels(known), x: spent,
      marker: { color: COLOURS[number % COLOURS.length], pattern: { shape: number < COLOURS.length ? "" : "/" } },
      hovertemplate: `%{y}<br>${method}: %{x:.1f} s<extra></extra>`,
    };
  });
  draw("cost", traces, {
    height: rowsHeight(known.length), barmode: "stack", yaxis: { autorange: "reversed" }, xaxis: { title: { text: "seconds" } },
    ...LEGEND_ABOVE,
  });
}
