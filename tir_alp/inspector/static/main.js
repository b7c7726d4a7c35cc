// Which view is shown, what keys do, and what is new.

import { get, isLive } from "./data.js";
import { address, fill, h, place } from "./dom.js";
import { runsView } from "./runs.js";
import { groupView, tokensView } from "./tokens.js";
import { trajectoriesView } from "./trajectories.js";

const VIEWS = { runs: runsView, trajectories: trajectoriesView, tokens: tokensView, group: groupView };
const EVERY = 2000; // milliseconds between looks at a run that goes on
const HELP = "keys: g then r runs, g then t trajectories, j and k rows, Enter opens, ← and → tokens, c colours, n next finding";

const root = document.getElementById("view");
const status = document.getElementById("status");
const app = { runs: [], reload: () => show() };
let current = {};
let state = null;
let turn = 0;

function themeButton() {
  const button = h("button", { onclick: () => {
    const isDark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
    show();
  } }, "dark / light");
  return button;
}

function header() {
  const link = (view, label) => h("a", { href: address(view, {}), "aria-current": place().view === view ? "page" : false }, label);
  const live = isLive ? h("span", { id: "live", class: "live" }, "live") : h("span", { class: "live" }, "saved page");
  fill(document.getElementById("top"), h("strong", {}, "tir_alp"),
    h("nav", { "aria-label": "views" }, link("runs", "Runs"), link("trajectories", "Trajectories")), live, themeButton(),
    h("details", { class: "help" }, h("summary", {}, "keys"), h("p", {}, HELP)));
}

async function show() {
  const mine = ++turn;
  const { view, query } = place();
  if (current.close) current.close();
  current = {};
  header();
  const box = h("div", { class: `view-${view}` });
  try {
    const opened = await (VIEWS[view] || runsView)(box, query, app);
    if (mine !== turn) return opened.close && opened.close();
    current = opened;
  } catch (error) {
    fill(box, h("h1", {}, "Nothing to show"), h("p", { class: "warning", role: "alert" }, error.message));
  }
  root.replaceChildren(box);
  document.title = `${view} – ${app.runs.map((each) => each.name).join(", ")} – tir_alp`;
  root.dataset.ready = String(mine);
  dispatchEvent(new Event("resize"));
  return null;
}

async function look() {
  try {
    const now = await get("state");
    const before = state;
    state = now;
    fill(status, "");
    if (before && current.update) await current.update(now, before);
  } catch (error) {
    fill(status, `the inspector does not answer: ${error.message}`);
  }
  setTimeout(look, EVERY);
}

let afterG = false;
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (afterG && (event.key === "r" || event.key === "t")) location.hash = event.key === "r" ? "#runs" : "#trajectories";
  afterG = event.key === "g";
  if (event.target.tagName === "BUTTON" && event.key === "Enter") return;
  if (current.key && current.key(event)) event.preventDefault();
});
addEventListener("hashchange", show);

app.runs = await get("runs");
await show();
if (isLive) look();
