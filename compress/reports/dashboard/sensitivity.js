// Sensitivities: what each choice for each group of layers does to a model's vectors, blocks downwards and kinds of layers across.
"use strict";

const BLUES = ["#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#084594"];
const LEAST_LOSS = 1e-12;

const sensitivitiesOf = (record) => data.sensitivities.filter((one) => one.fingerprint === record.model.fingerprint);

function heatMapsOf(record) {
  if (!sensitivitiesOf(record).length) return [];
  return [made("h3", {}, "Sensitivity of this model's layers"), made("div", { id: "run-sensitivity" })];
}

const inBlocks = (one, choice) => one.groups.filter((group) => group.block !== null && choice in group.losses);
const sumOf = (one, choice) => inBlocks(one, choice).reduce((sum, group) => sum + group.losses[choice], 0);

// The choices that cost anything inside blocks, the cheapest first.
function shownChoices(one) {
  return one.choices.filter((choice) => sumOf(one, choice) > 0).sort((a, b) => sumOf(one, a) - sumOf(one, b));
}

// Fill a place with a heat map and what to choose it by.
function heatMaps(id, sensitivities) {
  const place = document.getElementById(id);
  if (!sensitivities.length || place.again) {
    if (place.again) place.again(); // in other colours, with what was chosen
    return;
  }
  const which = made("select", { "aria-label": "Sensitivity of" }, ...sensitivities.map((one, place) =>
    made("option", { value: place }, `${one.model}, ${one.runtime}, by ${one.how}, ${one.created.slice(0, 10)}`)));
  const choices = made("select", { "aria-label": "Choice for a group of layers" });
  const chart = made("div", { id: `${id}-map`, class: "chart" });
  const fill = () => {
    const shown = shownChoices(sensitivities[which.value]);
    choices.replaceChildren(...shown.map((choice) => made("option", { value: choice }, choice)));
    choices.selectedIndex = Math.floor(shown.length / 2);
    show();
  };
  const show = () => {
    const one = sensitivities[which.value];
    if (choices.value) heatMap(`${id}-map`, `${id}-scale`, one, choices.value);
    note.textContent = `${one.scored} texts, ${one.seconds.toFixed(0)} s.${outside(one, choices.value)}`;
  };
  const note = made("p", { class: "note" });
  which.addEventListener("change", fill);
  choices.addEventListener("change", show);
  place.replaceChildren(made("div", { class: "head" }, which, choices), made("div", { id: `${id}-scale`, class: "scale" }), chart, note);
  place.again = show;
  fill();
}

// The groups outside of the blocks (tables, heads) have no place in the map.
function outside(one, choice) {
  const found = one.groups.filter((group) => group.block === null && choice in group.losses);
  return found.length ? ` Outside of the blocks: ${found.map((group) => `${group.name} ${group.losses[choice].toExponential(1)}`).join(", ")}.` : "";
}

function heatMap(id, scaleId, one, choice) {
  const groups = inBlocks(one, choice);
  const kinds = [...new Set(groups.map((group) => group.kind))];
  const blocks = [...new Set(groups.map((group) => group.block))].sort((a, b) => a - b);
  const losses = blocks.map((block) => kinds.map((kind) => groups.find((group) => group.block === block && group.kind === kind)?.losses[choice] ?? null));
  const text = losses.map((row) => row.map((loss) => (loss === null ? "" : loss.toExponential(1))));
  const known = losses.flat().filter((loss) => loss !== null && loss > 0);
  const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [LEAST_LOSS, 1];
  scale(scaleId, BLUES, low.toExponential(1), `${high.toExponential(1)} loss, logarithmic`);
  draw(id, [{
    type: "heatmap", x: kinds, y: blocks.map((block) => `block ${block}`), z: losses.map((row) => row.map((loss) => (loss === null ? null : Math.log10(Math.max(loss, low))))),
    zmin: Math.log10(low), zmax: Math.log10(high), xgap: 1, ygap: 1, showscale: false, colorscale: BLUES.map((colour, place) => [place / (BLUES.length - 1), colour]),
    text, texttemplate: narrow() && kinds.length > 4 ? "" : "%{text}", textfont: { size: 10 }, hovertemplate: "%{y}, %{x}: %{text}<extra></extra>",
  }], { height: 110 + 26 * blocks.length, yaxis: { autorange: "reversed" }, xaxis: { side: "top" }, margin: { l: 60, r: 10, t: 50, b: 10 } },
  () => [["block", ...kinds], blocks.map((block, row) => [String(block), ...text[row].map((cell) => cell || "–")])]);
}
