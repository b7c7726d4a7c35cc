// Draws the curves of a report in place of its pictures: hover shows values, dragging zooms, a double
// click shows the whole again, and a click on a name hides its line. The pictures stay if this fails.

import { append, fill, h, number } from "./dom.js";
import { logarithm, range } from "./charts.js";

const HEIGHT = 210;
const FEW = 60; // points, of which each is shown
const WHOLE = [1, 2, 5].flatMap((digit) => [0, 1, 2, 3, 4, 5, 6, 7].map((power) => digit * 10 ** power)).sort((a, b) => a - b);
const dark = matchMedia("(prefers-color-scheme: dark)");

function channels(colour) {
  const parts = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  const light = 0.3 * parts[0] + 0.59 * parts[1] + 0.11 * parts[2];
  return dark.matches && light < 115 ? parts.map((part) => Math.round(part + (255 - part) * 0.5)) : parts;
}

const shade = (colour, opacity = 1) => `rgba(${channels(colour).join(", ")}, ${opacity})`;
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Clip bounds and events, over the curves.
function marks(plot, panel, log) {
  const { ctx, bbox } = plot;
  const line = (x0, y0, x1, y1, colour) => {
    ctx.strokeStyle = colour;
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
  };
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.setLineDash([3, 4]);
  ctx.lineWidth = devicePixelRatio;
  for (const [value] of panel.rules) {
    const y = plot.valToPos(log ? Math.log10(value) : value, "y", true);
    line(bbox.left, y, bbox.left + bbox.width, y, themed("--faint"));
  }
  for (const step of panel.events || []) {
    const x = plot.valToPos(step, "x", true);
    line(x, bbox.top, x, bbox.top + bbox.height, themed("--bad"));
  }
  ctx.restore();
}

function notes(panel) {
  const found = [];
  if (panel.rules.length) found.push(`Dotted: ${panel.rules.map(([value, name]) => `${name} ${number(value)}`).join(", ")}.`);
  if (panel.lost.length) found.push(`Not finite in step ${panel.lost.slice(0, 10).join(", ")}${panel.lost.length > 10 ? ", ..." : ""}.`);
  if (panel.all_steps > panel.steps.length) found.push(`${panel.steps.length} of ${panel.all_steps} steps are drawn, among them all extremes.`);
  return found.join(" ");
}

function card(panel) {
  const hidden = new Set();
  let log = panel.log;
  let plot = null;
  const drawn = h("div", { class: "plot" });
  const legend = h("div", { class: "legend" });
  const columns = panel.lines.map((line) => line.values);
  const isPositive = columns.every((column) => column.every((value) => value === null || value > 0));
  const scale = h("button", { type: "button", "aria-pressed": String(log), onclick: () => { log = !log; redraw(); } }, "log scale");
  const values = panel.lines.map(() => h("b", {}));
  const step = h("span", { class: "item" });

  const shown = (index) => {
    const at = index ?? panel.steps.length - 1;
    fill(step, `step ${panel.steps[at] ?? "–"}`);
    panel.lines.forEach((line, i) => fill(values[i], number((line.own || line.values)[at])));
  };
  const names = panel.lines.map((line, i) => {
    if (line.edge) return null;
    const swatch = h("span", { class: "swatch" });
    const toggle = () => {
      if (hidden.has(i)) hidden.delete(i); else hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      redraw();
    };
    const button = h("button", { type: "button", class: "item", "aria-pressed": "true", onclick: toggle }, swatch, `${line.label} `, values[i]);
    return { button, swatch, line };
  }).filter(Boolean);
  append(legend, [step, names.map((each) => each.button)]);

  // The ends of an interval are hidden with its mean, which is the line before them.
  const isHidden = (i) => hidden.has(panel.lines[i].edge ? (panel.lines[i - 1].edge ? i - 2 : i - 1) : i);

  function redraw() {
    if (plot) plot.destroy();
    names.forEach(({ swatch, line }) => { swatch.style.background = shade(line.colour); });
    scale.setAttribute("aria-pressed", String(log));
    const axis = { stroke: themed("--faint"), grid: { stroke: themed("--line"), width: 1 }, ticks: { stroke: themed("--line") }, font: "11px sans-serif" };
    const series = panel.lines.map((line, i) => ({
      label: line.label,
      stroke: shade(line.colour),
      width: line.width,
      dash: line.dash || [],
      fill: line.fill ? shade(line.colour, 0.75) : undefined,
      spanGaps: true,
      show: !isHidden(i),
      points: { show: line.width > 1 && panel.steps.length < FEW, size: 4 },
    }));
    plot = new uPlot(
      {
        width: Math.max(200, drawn.clientWidth || 320),
        height: HEIGHT,
        legend: { show: false },
        cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
        scales: {
          x: { time: false },
          y: { range: (self, low, high) => (panel.from_zero && !log ? [0, high > 0 ? 1.06 * high : 1] : range(self, low, high)) },
        },
        axes: [
          { ...axis, incrs: WHOLE },
          { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => number(log ? 10 ** tick : tick, 3)) },
        ],
        series: [{ label: "step" }, ...series],
        bands: panel.bands.map(([high, low, colour]) => ({ series: [high + 1, low + 1], fill: shade(colour, 0.18) })),
        hooks: { setCursor: [(self) => shown(self.cursor.idx)], draw: [(self) => marks(self, panel, log)] },
      },
      [panel.steps, ...(log ? columns.map((column) => column.map((value) => (value > 0 ? logarithm(value) : null))) : columns)],
      drawn,
    );
    shown(null);
  }
  const more = notes(panel);
  const element = h(
    "div",
    { class: "panel", role: "group", "aria-label": panel.title },
    h("h3", {}, panel.title, h("small", {}, ` ${panel.unit}`)),
    drawn,
    legend,
    more ? h("p", { class: "note" }, more) : null,
    isPositive ? h("p", { class: "tools" }, scale) : null,
  );
  new ResizeObserver(() => plot && drawn.clientWidth && plot.setSize({ width: drawn.clientWidth, height: HEIGHT })).observe(drawn);
  return { element, redraw };
}

const curves = JSON.parse(document.getElementById("curves").textContent);
const cards = [];
for (const figure of document.querySelectorAll("figure[data-picture]")) {
  const panels = Object.hasOwn(curves, figure.dataset.picture) ? curves[figure.dataset.picture] : [];
  if (!panels.length) continue;
  const found = panels.map(card);
  fill(figure.querySelector(".panels"), found.map((each) => each.element));
  figure.classList.add("live");
  try {
    found.forEach((each) => each.redraw());
    cards.push(...found);
  } catch (error) {
    figure.classList.remove("live"); // the picture remains
    fill(figure.querySelector(".panels"));
    console.error(error);
  }
}
const first = document.querySelector("figure.live figcaption");
if (first) append(first, [" Drag to zoom, double-click for the whole, click a name to hide its line."]);
dark.addEventListener("change", () => cards.forEach((each) => each.redraw()));
document.querySelector("main").dataset.ready = "";
