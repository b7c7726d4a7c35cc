// The list of trajectories: filters, order, and rows that exist only while they can be seen.

import { get } from "./data.js";
import { address, fill, h, number, place } from "./dom.js";

const ROW = 30; // height of a row in pixels, as style.css has it
const PAGE = 200; // rows per request
const COLUMNS = [
  ["step", "step"], ["group_id", "group"], ["task_id", "task"], ["reward", "reward"],
  ["advantage", "advantage"], ["outcome", "outcome"], ["ended", "ended"], ["turns", "turns"],
  ["tokens", "tokens"], ["tool_calls", "calls"], ["staleness", "stale"], ["answer", "answer"], ["preview", "text"],
];
const RANGES = ["reward", "advantage", "step", "turns", "tokens", "tool_calls", "staleness", "void_turns", "group_id", "uid"];
const WORDS = { outcome: [], ended: ["terminated", "truncated", "open"], stop: ["eos", "stop", "length", "abort"], kind: ["trajectories", "replaced"] };

export function tokensAddress(run, row, more = {}) {
  return address("tokens", { run, kind: row.kind, step: row.step, line: row.line, ...more });
}

function cell(row, name, run) {
  if (name === "preview") return h("td", { class: "text" }, (row.preview || "").slice(0, 80));
  if (name === "task_id") return h("td", { class: "text" }, row.task_id);
  if (name === "answer") return h("td", { class: "text" }, row.answer === null ? "none" : row.answer);
  if (name === "step") return h("td", {}, h("a", { href: tokensAddress(run, row), "aria-label": `tokens of step ${row.step}, line ${row.line}` }, String(row.step)));
  if (name === "group_id") return h("td", {}, h("a", { href: address("group", { run, step: row.step, kind: row.kind, group: row.group_id }), "aria-label": `group ${row.group_id} side by side` }, String(row.group_id)));
  return h("td", {}, typeof row[name] === "number" ? number(row[name]) : String(row[name] ?? "–"));
}

function rangeField(name, query, change) {
  const [low, high] = (query.get(name) || ":").split(":");
  const inputs = [low, high].map((value, index) =>
    h("input", { type: "number", step: "any", value, "aria-label": `${name} ${index ? "at most" : "at least"}`, onchange: () => change(name, inputs.map((each) => each.value).join(":").replace(/^:$/, "")) }));
  return h("fieldset", {}, h("legend", {}, name), inputs[0], "–", inputs[1]);
}

export async function trajectoriesView(root, query, app) {
  const run = +(query.get("run") || 0);
  const filter = Object.fromEntries([...query].filter(([name]) => name !== "run"));
  const goTo = (changes) => {
    const next = { run, ...filter, ...changes };
    for (const [name, value] of Object.entries(next)) if (value === "" || value === null) delete next[name];
    location.hash = address("trajectories", next);
  };
  const sort = filter.sort || "-step";
  let first = await get(`trajectories/${run}`, { ...filter, offset: 0, limit: PAGE });
  let total = first.total;
  const pages = new Map([[0, first.rows]]);
  const asked = new Set([0]);

  const words = { ...WORDS, outcome: Object.keys(first.summary.outcomes) };
  const wordFields = Object.entries(words).map(([name, options]) => {
    const all = [...new Set(["", ...options, filter[name] || ""])];
    const select = h("select", { "aria-label": name, onchange: () => goTo({ [name]: select.value }) },
      all.map((value) => h("option", { value, selected: value === (filter[name] || "") }, value || "any")));
    return h("label", {}, `${name} `, select);
  });
  const text = h("input", { type: "search", placeholder: "task, answer or text", "aria-label": "find text", value: filter.text || "", onchange: () => goTo({ text: text.value }) });
  const never = h("input", { type: "checkbox", checked: filter.tool_calls === "0:0", onchange: () => goTo({ tool_calls: never.checked ? "0:0" : "" }) });
  const runs = h("select", { "aria-label": "run", onchange: () => goTo({ run: runs.value }) },
    app.runs.map((each, index) => h("option", { value: String(index), selected: index === run }, each.name)));
  const more = h("details", { class: "filters", open: RANGES.some((name) => filter[name]) },
    h("summary", {}, "filters"), h("div", { class: "bar" }, RANGES.map((name) => rangeField(name, query, (key, value) => goTo({ [key]: value })))));
  const count = h("p", { id: "count", role: "status" });

  const head = h("tr", {}, COLUMNS.map(([name, label]) => {
    const isThis = sort.replace("-", "") === name;
    const down = sort.startsWith("-");
    const mark = isThis ? (down ? " ▾" : " ▴") : "";
    return h("th", { scope: "col", "aria-sort": isThis ? (down ? "descending" : "ascending") : "none" },
      h("button", { onclick: () => goTo({ sort: isThis && down ? name : `-${name}` }) }, label + mark));
  }));
  const body = h("tbody", {});
  const scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "trajectories" },
    h("table", {}, h("thead", {}, head), body));
  let cursor = 0;

  function rowAt(index) {
    const page = pages.get(Math.floor(index / PAGE));
    if (page) return page[index % PAGE];
    const number_ = Math.floor(index / PAGE);
    if (!asked.has(number_)) {
      asked.add(number_);
      get(`trajectories/${run}`, { ...filter, offset: number_ * PAGE, limit: PAGE }).then((found) => {
        pages.set(number_, found.rows);
        show();
      });
    }
    return null;
  }

  const space = (rows) => {
    const gap = h("tr", { "aria-hidden": "true", class: "gap" }, h("td", { colspan: String(COLUMNS.length) }));
    gap.firstChild.style.height = `${rows * ROW}px`;
    return rows > 0 ? gap : null;
  };
  function show() {
    const top = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 10);
    const bottom = Math.min(total, top + Math.ceil((scroller.clientHeight || 600) / ROW) + 20);
    const rows = [];
    for (let index = top; index < bottom; index++) {
      const row = rowAt(index);
      const cells = row ? COLUMNS.map(([name]) => cell(row, name, run)) : [h("td", { colspan: String(COLUMNS.length) }, "…")];
      const element = h("tr", { "data-index": String(index), class: index === cursor ? "row cursor" : "row" }, cells);
      if (row) element.addEventListener("click", (event) => { if (event.target.tagName !== "A") location.hash = tokensAddress(run, row); });
      rows.push(element);
    }
    fill(body, space(top), rows, space(total - bottom));
    fill(count, `${total} trajectories`);
  }
  let waiting = false;
  scroller.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(); });
  });
  fill(root, h("h1", {}, "Trajectories"),
    h("div", { class: "bar" }, app.runs.length > 1 ? h("label", {}, "run ", runs) : null, text, wordFields,
      h("label", {}, never, " tool never called"), h("button", { onclick: () => (location.hash = address("trajectories", { run })) }, "clear")),
    more, count, scroller);
  show();

  return {
    update: async (state, before) => {
      if (state[run].trajectories === before[run].trajectories) return;
      first = await get(`trajectories/${run}`, { ...filter, offset: 0, limit: PAGE });
      total = first.total;
      pages.clear(); asked.clear();
      pages.set(0, first.rows); asked.add(0);
      show();
    },
    key: (event) => {
      const move = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 20, PageUp: -20 }[event.key];
      if (move) {
        cursor = Math.max(0, Math.min(total - 1, cursor + move));
        const top = cursor * ROW;
        if (top < scroller.scrollTop) scroller.scrollTop = top;
        if (top > scroller.scrollTop + scroller.clientHeight - 3 * ROW) scroller.scrollTop = top - scroller.clientHeight + 3 * ROW;
        show();
        return true;
      }
      const row = rowAt(cursor);
      if (event.key === "Enter" && row && place().view === "trajectories") { location.hash = tokensAddress(run, row); return true; }
      return false;
    },
  };
}
