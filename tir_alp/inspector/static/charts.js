// Curves of one metric over runs: smoothing, log scale, groups of seeds with intervals.

import { download, fill, h, number } from "./dom.js";

const COLOURS = ["#2f6fdb", "#d9541e", "#16865a", "#a03bb3", "#b58500", "#0e8fa8", "#c2305f", "#6b6f76"];
// 97.5 % quantiles of Student's t by degrees of freedom; beyond, the normal distribution's.
const T = [NaN, 12.71, 4.3, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];

export function colourOf(index) {
  return COLOURS[index % COLOURS.length];
}

export function smoothed(values, weight) {
  let mean = null;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    mean = mean === null ? value : weight * mean + (1 - weight) * value;
    return mean;
  });
}

// Mean and 95 % interval at each step over curves that share one list of steps.
export function band(columns) {
  return columns[0].map((_, index) => {
    const values = columns.map((each) => each[index]).filter((value) => typeof value === "number");
    if (!values.length) return { mean: null, low: null, high: null };
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    if (values.length < 2) return { mean, low: null, high: null };
    const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1);
    const t = T[values.length - 1] || 1.96;
    const half = t * Math.sqrt(variance / values.length);
    return { mean, low: mean - half, high: mean + half };
  });
}

// curves: one {label, group, steps, values} per run -> what uPlot draws, and a legend.
export function prepared(curves, { weight, grouped, log }) {
  const steps = [...new Set(curves.flatMap((each) => each.steps))].sort((a, b) => a - b);
  const where = new Map(steps.map((step, index) => [step, index]));
  const wide = curves.map((each) => {
    const column = new Array(steps.length).fill(null);
    smoothed(each.values, weight).forEach((value, i) => (column[where.get(each.steps[i])] = value));
    return column;
  });
  const kept = (value) => (log && !(value > 0) ? null : value);
  const data = [steps];
  const series = [{ label: "step" }];
  const bands = [];
  const add = (label, column, colour, extra = {}) => {
    data.push(column.map(kept));
    const alone = column.filter((value) => value !== null).length < 60;
    series.push({ label, stroke: colour, width: 1.5, spanGaps: true, points: { show: alone, size: 4 }, ...extra });
  };
  if (!grouped) {
    curves.forEach((each, index) => add(each.label, wide[index], colourOf(each.colour)));
    return { data, series, bands };
  }
  const groups = new Map();
  curves.forEach((each, i) => groups.set(each.group, [...(groups.get(each.group) || []), i]));
  let colour = 0;
  for (const members of groups.values()) {
    const found = band(members.map((i) => wide[i]));
    const stroke = colourOf(colour++);
    const label = `${curves[members[0]].algorithm}, ${members.length} seeds`;
    const edge = { width: 0, points: { show: false }, isEdge: true };
    add(label, found.map((each) => each.mean), stroke);
    add("high", found.map((each) => each.high), stroke, edge);
    add("low", found.map((each) => each.low), stroke, edge);
    bands.push({ series: [data.length - 2, data.length - 1], fill: `${stroke}33` });
  }
  return { data, series, bands };
}

// The library's own logarithmic scale does not end on values of very different sizes.
export const logarithm = (value) => (value === null ? null : Math.log10(value));

// A curve that does not change is drawn in the middle, with a scale of its own size.
export function range(_, low, high) {
  if (low === null || low !== high) return uPlot.rangeNum(low ?? 0, high ?? 1, 0.1, false);
  const room = Math.abs(low) || 1;
  return [low - room, high + room];
}

export function csvOf(name, { data, series }) {
  const quoted = (text) => `"${String(text).replace(/^[=+\-@]/, "'$&").replaceAll('"', '""')}"`;
  const lines = [series.map((each) => quoted(each.label)).join(",")];
  data[0].forEach((_, row) => lines.push(data.map((column) => column[row] ?? "").join(",")));
  return `${lines.join("\n")}\n`;
}

export function chart(name, meaning, curves, options) {
  const found = prepared(curves, options);
  const drawn = h("div", { class: "plot" });
  const legend = h("div", { class: "legend" });
  const [what, unit] = meaning || ["", ""];
  const colour = getComputedStyle(document.body).getPropertyValue("--faint");
  const grid = getComputedStyle(document.body).getPropertyValue("--line");
  const axis = { stroke: colour, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: "11px sans-serif" };
  const list = (index) => {
    const at = index ?? found.data[0].length - 1;
    const items = found.series.slice(1).map((each, i) => {
      if (each.isEdge) return null;
      const swatch = h("span", { class: "swatch" });
      swatch.style.background = each.stroke;
      return h("span", { class: "item" }, swatch, `${each.label} `, h("b", {}, number(found.data[i + 1][at])));
    });
    fill(legend, h("span", { class: "item" }, `step ${found.data[0][at] ?? "–"}`), items);
  };
  const open = () => {
    const width = Math.max(220, drawn.clientWidth || 360);
    const plot = new uPlot(
      {
        width,
        height: 200,
        legend: { show: false },
        cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
        scales: { x: { time: false }, y: { range } },
        axes: [axis, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => number(options.log ? 10 ** tick : tick, 3)) }],
        series: found.series,
        bands: found.bands,
        hooks: { setCursor: [(self) => list(self.cursor.idx)] },
      },
      found.data.map((column, index) => (options.log && index ? column.map(logarithm) : column)),
      drawn,
    );
    card.plot = plot;
    card.watcher = new ResizeObserver(() => drawn.clientWidth && plot.setSize({ width: drawn.clientWidth, height: 200 }));
    card.watcher.observe(drawn);
    list(null);
  };
  const close = () => {
    if (!card.plot) return;
    card.watcher.disconnect();
    card.plot.destroy();
  };
  const png = () => card.plot.ctx.canvas.toBlob((blob) => download(`${name.replaceAll("/", "_")}.png`, blob));
  const csv = () => download(`${name.replaceAll("/", "_")}.csv`, new Blob([csvOf(name, found)], { type: "text/csv" }));
  const card = h(
    "div",
    { class: "card", role: "group", "aria-label": name, "data-metric": name },
    h("h2", {}, name, unit ? h("small", {}, ` ${unit}`) : null),
    what ? h("p", { class: "meaning" }, what) : null,
    drawn,
    legend,
    h("p", { class: "tools" }, h("button", { onclick: png }, "PNG"), h("button", { onclick: csv }, "CSV")),
  );
  return { card, open, close };
}
