// The answer: which run is the fastest and which is the smallest of those that hold the bounds, in each comparable set.
"use strict";

// A bound holds where `of` is at least (better 1) or at most (better -1) its value. `kept` is judged by the interval's lower end,
// so a run without an interval does not hold it.
const BOUNDS = {
  kept: { label: "Score kept, at least", unit: "%", better: 1, of: (run) => (run.low === null ? null : 100 * run.low), said: (text) => `at least ${text} % kept` },
  size: { label: "Size on disk, at most", unit: "MB", better: -1, of: (run) => (run.bytes === null ? null : run.bytes / 1e6), said: (text) => `at most ${text} MB` },
  speed: { label: "Speed, at least", unit: "times", better: 1, of: (run) => run.speedup, said: (text) => `at least ${text} times as fast` },
  latency: { label: "Latency of one text, at most", unit: "ms", better: -1, of: (run) => run.latency_ms, said: (text) => `at most ${text} ms` },
};
const LEAST_KEPT = 99; // what the page asks first
const SLIDER = { kept: [90, 100] }; // ends of a slider; of the others those of the runs, on a logarithmic scale
const STEPS = 100;
const MOST_SETS = 3;
const ASKED = { kept: LEAST_KEPT, size: null, speed: null, latency: null };
const bounds = { ...ASKED };

function holds(run, but) {
  return Object.entries(BOUNDS).every(([name, bound]) => {
    if (bounds[name] === null || name === but) return true;
    const value = bound.of(run);
    return value !== null && bound.better * (value - bounds[name]) >= 0;
  });
}

function saidBounds() {
  const said = Object.entries(BOUNDS).filter(([name]) => bounds[name] !== null).map(([name, bound]) => bound.said(String(bounds[name])));
  if (!said.length) return "Without a bound";
  return said[0][0].toUpperCase() + said[0].slice(1) + said.slice(1).map((one) => `, ${one}`).join("");
}

const ends = (name, runs) => {
  if (SLIDER[name]) return SLIDER[name];
  const values = runs.map(BOUNDS[name].of).filter((value) => value !== null && value > 0);
  return values.length ? [Math.min(...values), Math.max(...values)] : [1, 1];
};

// A slider's place is 0 to STEPS; the place where every run holds the bound means that there is none.
function valueAt(name, place, [low, high]) {
  const loose = BOUNDS[name].better > 0 ? 0 : STEPS;
  if (place === loose) return null;
  if (SLIDER[name]) return Number((low + ((high - low) * place) / STEPS).toFixed(1));
  return Number((low * (high / low) ** (place / STEPS)).toPrecision(3));
}

function placeOf(name, value, [low, high]) {
  if (value === null) return BOUNDS[name].better > 0 ? 0 : STEPS;
  const place = SLIDER[name] ? (value - low) / (high - low) : Math.log(value / low) / Math.log(high / low || Math.E);
  return Math.round(STEPS * Math.min(1, Math.max(0, Number.isFinite(place) ? place : 0)));
}

function fillBounds(runs, changed) {
  const lines = Object.entries(BOUNDS).map(([name, bound]) => {
    const range = ends(name, runs);
    const step = name === "kept" ? 0.1 : "any";
    const number = made("input", { type: "number", id: `bound-${name}`, min: 0, step, inputmode: "decimal", placeholder: "any", "aria-label": `${bound.label}, ${bound.unit}` });
    const slider = made("input", { type: "range", id: `slide-${name}`, min: 0, max: STEPS, step: 1, "aria-label": bound.label });
    const show = (place) => {
      number.value = bounds[name] === null ? "" : bounds[name];
      slider.value = place;
      slider.setAttribute("aria-valuetext", bounds[name] === null ? "no bound" : `${bounds[name]} ${bound.unit}`);
    };
    slider.addEventListener("input", () => {
      bounds[name] = valueAt(name, Number(slider.value), range);
      show(slider.value);
      changed();
    });
    number.addEventListener("input", () => {
      const given = number.value === "" ? NaN : Number(number.value);
      bounds[name] = Number.isFinite(given) && given > 0 ? given : null;
      slider.value = placeOf(name, bounds[name], range);
      slider.setAttribute("aria-valuetext", bounds[name] === null ? "no bound" : `${bounds[name]} ${bound.unit}`);
      changed();
    });
    bound.show = () => show(placeOf(name, bounds[name], range));
    bound.show();
    return made("div", { class: "bound" }, made("span", { class: "bound-name", "aria-hidden": "true" }, bound.label), slider,
      made("span", { class: "bound-value" }, number, ` ${bound.unit}`));
  });
  document.getElementById("bounds").replaceChildren(...lines);
}

function showBounds() {
  for (const bound of Object.values(BOUNDS)) bound.show();
}

// The best of some runs by a number, larger or smaller; ties go to the one that keeps more.
function best(runs, of, better) {
  const known = runs.filter((run) => of(run) !== null);
  return known.sort((a, b) => better * (of(b) - of(a)) || (b.low ?? -1) - (a.low ?? -1))[0] || null;
}

const WINNERS = [
  { name: "Fastest", of: (run) => run.speedup, better: 1, big: (run) => `${run.speedup.toFixed(2)}×`, more: (run) => `${bytes(run.bytes)}` },
  { name: "Smallest", of: (run) => run.bytes, better: -1, big: (run) => bytes(run.bytes), more: (run) => (run.speedup === null ? "not timed" : `${run.speedup.toFixed(2)}× as fast`) },
];

function answers(runs, groups, open) {
  const sets = groups.map((group, number) => ({ group, runs: runs.filter((run) => run.group === number && !run.imported) })).filter((set) => set.runs.length);
  document.getElementById("answer-title").textContent = `${saidBounds()}: fastest, smallest`;
  const shown = sets.slice(0, MOST_SETS).map((set) => answered(set, open));
  const left = sets.length - shown.length;
  if (left > 0) shown.push(made("p", { class: "note" }, `${left} more comparable set${left === 1 ? "" : "s"}: choose a model or tasks below.`));
  if (!sets.length) shown.push(made("p", {}, "No run is left by the filters below."));
  document.getElementById("answers").replaceChildren(...shown);
}

function answered({ group, runs }, open) {
  const holding = runs.filter((run) => holds(run));
  const more = group.tasks.length > 2 ? ` and ${group.tasks.length - 2} more` : "";
  const tasks = group.tasks.length ? `on ${group.tasks.slice(0, 2).join(", ")}${more}` : "without tasks";
  const head = made("p", { class: "set", title: group.title }, made("strong", {}, group.model), `${tasks}; ${group.machine.replace(/ \(.*\)$/, "")}: ${holding.length} of ${runs.length} runs`);
  if (!holding.length) return made("div", { class: "answer" }, head, nearest(runs, open));
  return made("div", { class: "answer" }, head, made("div", { class: "winners" }, ...WINNERS.map((winner) => {
    const run = best(holding, winner.of, winner.better);
    if (!run) return made("div", { class: "winner" }, made("span", { class: "winner-name" }, winner.name), made("p", {}, "None of these runs was timed."));
    const kept = run.kept === null ? "not scored" : `${(100 * run.kept).toFixed(1)} % kept${run.low === null ? "" : ` (${(100 * run.low).toFixed(1)} to ${(100 * run.high).toFixed(1)})`}`;
    return made("div", { class: "winner" }, made("span", { class: "winner-name" }, winner.name), made("span", { class: "big" }, winner.big(run)),
      made("button", { type: "button", class: "link", "data-answer": run.run, onclick: () => open(run.run) }, run.recipe),
      made("span", { class: "soft" }, `${kept}, ${winner.more(run)}, ${run.runtime}`));
  })));
}

// Where no run holds every bound: the one that comes nearest in score among those that hold the others.
function nearest(runs, open) {
  const near = best(runs.filter((run) => holds(run, "kept")), BOUNDS.kept.of, 1);
  if (!near) return made("p", {}, "No run holds these bounds: loosen one.");
  return made("p", {}, "No run holds these bounds. The nearest in score: ", made("button", { type: "button", class: "link", onclick: () => open(near.run) }, near.recipe),
    `, at least ${(100 * near.low).toFixed(1)} % kept, ${near.speedup === null ? "not timed" : times(near.speedup)}, ${bytes(near.bytes)}.`);
}
