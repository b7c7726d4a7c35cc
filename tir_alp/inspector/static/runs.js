// The view of runs: what became of them in words, and all of their curves.

import { chart } from "./charts.js";
import { get } from "./data.js";
import { address, fill, h, number } from "./dom.js";

const MAIN = ["rollout/reward", "eval/accuracy", "eval/loss", "loss/value", "kl/rollout", "ratio/p98",
  "loss/clip_fraction", "entropy/mean", "alp/sigma_mean", "rollout/tool_calls", "rollout/void_turns",
  "staleness/mean", "tokens/per_second", "time/train"];

// Sentences about why a run learns or does not, from what all of its trajectories have in common.
export function verdict(about, summary) {
  const found = [];
  const add = (text, query, label) => found.push({ text, query, label });
  if (!summary.total) return [{ text: "No trajectory has been recorded yet." }];
  const share = (part) => `${Math.round(100 * part)} %`;
  const { low, high, reward } = summary;
  if (low === high)
    add(`All ${summary.total} trajectories have the reward ${number(low)}.`, { sort: "-step" }, "read them");
  else add(`The mean reward of ${summary.total} trajectories is ${number(reward)}, from ${number(low)} to ${number(high)}.`, { sort: "-reward" }, "best first");
  if (summary.flat === 1) add("Every advantage is 0: no group has a signal, so nothing is learnt.", { sort: "group_id" }, "see the groups");
  else if (summary.flat > 0.5) add(`${share(summary.flat)} of the trajectories have no advantage: their groups have no signal.`, { advantage: "0:0" }, "see them");
  const none = summary.answers.none || 0;
  if (none > summary.total / 2)
    add(`In ${share(none / summary.total)} of the trajectories the grader found no answer: compare how the answer is written with the format that it reads.`, { reward: `:${low}`, sort: "-step" }, "see what was written");
  else if (low === high && low <= 0) add("The grader found answers, and none is right: read some, beside their tasks.", { sort: "-step" }, "see the answers");
  if (summary.void > 0.5) add(`${share(summary.void)} have a turn with neither a complete call nor an answer.`, { void_turns: "1:" }, "see them");
  if (summary.called === 0) add("No tool was ever called.", { tool_calls: "0:0" }, "see the texts");
  const bad = Object.entries(summary.outcomes).filter(([name]) => name !== "ok");
  if (bad.length) add(`Outcomes: ${bad.map(([name, count]) => `${name} ${count}`).join(", ")}.`, { outcome: bad[0][0] }, `see ${bad[0][0]}`);
  for (const each of about.advice.slice(-2)) add(`The run said in step ${each.step}: ${each.advice}`);
  for (const event of about.events.slice(-3)) add(`Step ${event.step}, ${event.kind}: ${event.reason}`);
  return found;
}

function facts(about) {
  const { provenance = {} } = about;
  const times = provenance.times || [];
  const rows = [
    ["command", provenance.command], ["commit", provenance.commit], ["algorithm", about.algorithm],
    ["seed", about.seed], ["objective", about.objective],
    ["began", times[0] && times[0].started], ["ended", times.length && times[times.length - 1].ended],
  ];
  const shown = rows.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return h(
    "details", {}, h("summary", {}, "provenance and config"),
    h("dl", {}, shown.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("pre", { class: "config", tabindex: "0", "aria-label": "config" }, JSON.stringify(about.config, null, 1)),
  );
}

export async function runsView(root, query, app) {
  const settings = { weight: +(query.get("smooth") || 0), grouped: query.get("seeds") === "1", log: query.get("log") === "1" };
  let cards = [];
  const words = h("section", { class: "verdicts", "aria-label": "verdict" });
  const charts = h("div", {});
  const search = h("input", { type: "search", placeholder: "find a metric", "aria-label": "find a metric", value: query.get("find") || "" });
  const smooth = h("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: String(settings.weight), "aria-label": "smoothing" });
  const toggle = (label, name) => {
    const box = h("input", { type: "checkbox", checked: settings[name], onchange: () => { settings[name] = box.checked; draw(); } });
    return h("label", {}, box, ` ${label}`);
  };
  const boxes = app.runs.map((about, index) => {
    const box = h("input", { type: "checkbox", checked: true, onchange: () => draw() });
    return { box, about, index };
  });
  fill(
    root,
    h("h1", {}, app.runs.length > 1 ? "Runs" : app.runs[0].name),
    words,
    h("div", { class: "bar" }, search, h("label", {}, "smoothing ", smooth), toggle("log scale", "log"),
      app.runs.length > 1 ? toggle("group seeds", "grouped") : null,
      app.runs.length > 1 ? boxes.map(({ box, about }) => h("label", {}, box, ` ${about.name}`)) : null),
    charts,
  );
  smooth.addEventListener("input", () => { settings.weight = +smooth.value; draw(); });
  search.addEventListener("input", () => draw());
  const meanings = await get("meanings").catch(() => ({}));
  let found = [];
  const closed = new Set();

  async function read() {
    found = await Promise.all(app.runs.map((_, index) => get(`metrics/${index}`, { name: "" })));
    await judge();
  }

  async function judge() {
    app.runs = await get("runs");
    const texts = await Promise.all(app.runs.map(async (about, index) => {
      const { summary } = await get(`trajectories/${index}`, { limit: 0 });
      const items = verdict(about, summary).map(({ text, query: filter, label }) =>
        h("li", {}, text, filter ? [" ", h("a", { href: address("trajectories", { run: index, ...filter }) }, label)] : null));
      return [app.runs.length > 1 ? h("h2", {}, about.name) : null, h("ul", {}, items), facts(about)];
    }));
    fill(words, texts);
  }

  async function section(title, names, open) {
    const grid = h("div", { class: "grid" });
    const box = h("details", { open, class: "area" }, h("summary", {}, `${title} (${names.length})`), grid);
    let isShown = false;
    const show = async () => {
      closed.delete(title);
      if (isShown) return;
      isShown = true;
      const wanted = new URLSearchParams(names.map((name) => ["name", name]));
      const curves = await Promise.all(app.runs.map((_, index) => get(`metrics/${index}`, wanted)));
      const shown = names.map((name) => {
        const present = boxes.filter(({ box: b, index }) => b.checked && curves[index].curves[name]);
        const series = present.map(({ about, index }) => ({
          label: about.name, algorithm: about.algorithm, group: about.seeds_of, colour: index, ...curves[index].curves[name] }));
        return series.length ? chart(name, meanings[name], series, settings) : null;
      }).filter(Boolean);
      grid.append(...shown.map((each) => each.card));
      shown.forEach((each) => each.open());
      cards.push(...shown);
    };
    box.addEventListener("toggle", () => (box.open ? show() : closed.add(title)));
    charts.append(box);
    if (open) await show();
  }

  let drawing = 0;
  async function draw() {
    const turn = ++drawing;
    cards.forEach((each) => each.close());
    cards = [];
    charts.replaceChildren();
    const wanted = search.value.trim().toLowerCase();
    const names = [...new Set(found.flatMap((each) => each.names))].sort();
    if (!names.length) return fill(charts, h("p", {}, "No metric has been recorded yet."));
    if (wanted) return section(`found`, names.filter((name) => name.toLowerCase().includes(wanted)).slice(0, 60), true);
    const main = MAIN.filter((name) => names.includes(name));
    const areas = new Map();
    for (const name of names) {
      const area = name.split("/")[0];
      areas.set(area, [...(areas.get(area) || []), name]);
    }
    await section("main", main, !closed.has("main"));
    if (turn !== drawing) return null;
    for (const [area, members] of areas) section(area, members, opened.has(area));
    return null;
  }
  const opened = new Set();
  charts.addEventListener("toggle", (event) => {
    const title = event.target.querySelector("summary").textContent.replace(/ \(\d+\)$/, "");
    if (event.target.open) opened.add(title); else opened.delete(title);
  }, true);

  await read();
  await draw();
  return {
    update: async (state, before) => {
      const grown = state.some((each, index) => each.metrics !== before[index].metrics);
      const more = state.some((each, index) => each.trajectories !== before[index].trajectories);
      if (grown) { await read(); await draw(); } else if (more) await judge();
    },
    close: () => cards.forEach((each) => each.close()),
  };
}
