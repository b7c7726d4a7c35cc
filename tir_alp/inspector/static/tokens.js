// The view of one trajectory: its tokens, turn by turn, and all that is known of each of them.

import { Blocks } from "./blocks.js";
import { MODES, labelOf, scaleOf, tokenFacts } from "./colours.js";
import { get, isLive, post } from "./data.js";
import { address, fill, h, number, place } from "./dom.js";

// What the time of a turn went into. A completion was waited for from its request on, in the queue at first.
const PARTS = [
  ["prepare", (timing) => timing.prepare || 0],
  ["queue", (timing) => timing.queue || 0],
  ["generate", (timing) => Math.max(0, (timing.generate || 0) - (timing.queue || 0))],
  ["tool", (timing) => timing.tool || 0],
];

const AUTHORS = [["policy", "written by the policy, in the loss"], ["masked", "written by the policy, not in the loss"], ["environment", "observation"]];

// Tokens that a finding of the audit is about, with the finding.
export function markedTokens(episode) {
  const found = new Map();
  for (const each of episode.findings || []) {
    const author = each.check === "prompt tokens" ? "prompt" : each.check === "observation tokens" ? "environment" : "policy";
    const span = episode.spans.find((one) => one.author === author && (one.turn ?? null) === (author === "prompt" ? null : each.turn));
    if (span) found.set(Math.min(span.stop - 1, span.start + (each.token ?? 0)), each);
  }
  return found;
}

function timeStrip(turns, goTo) {
  const total = turns.reduce((sum, turn) => sum + PARTS.reduce((all, [, of]) => all + of(turn.timing), 0), 0);
  if (!total) return null;
  const strip = h("div", { class: "strip", role: "img", "aria-label": `times of ${turns.length} turns, ${number(total, 3)} s together` });
  turns.forEach((turn, index) => {
    for (const [name, of] of PARTS) {
      const seconds = of(turn.timing);
      if (seconds <= 0) continue;
      const part = h("span", { class: `time ${name}`, title: `turn ${index}, ${name}: ${number(seconds, 3)} s`, onclick: () => goTo(index) });
      part.style.flexGrow = String(seconds / total);
      strip.append(part);
    }
  });
  const key = h("p", { class: "key" }, PARTS.map(([name]) => [h("span", { class: `swatch time ${name}` }), ` ${name} `]), `${number(total, 3)} s in all`);
  return h("section", { "aria-label": "times" }, strip, key);
}

function treeOf(sequences, chosen, query) {
  if (sequences.length < 2) return null;
  const item = (index) => {
    const each = sequences[index];
    const children = sequences.map((other, i) => (other.parent === index ? i : -1)).filter((i) => i >= 0);
    const label = `${index ? `branch ${index}` : "main sequence"}: ${each.turns} turns, ${each.tokens} tokens` +
      (each.parent === null ? "" : `, as ${each.parent} up to token ${each.shared}`);
    return h("li", {},
      h("a", { href: address("tokens", { ...query, sequence: index }), "aria-current": index === chosen ? "true" : false }, label),
      children.length ? h("ul", {}, children.map(item)) : null);
  };
  const roots = sequences.map((each, i) => (each.parent === null ? i : -1)).filter((i) => i >= 0);
  return h("nav", { "aria-label": "sequences of the episode", class: "tree" }, h("ul", {}, roots.map(item)));
}

function turnHead(episode, span) {
  if (span.turn === null) return h("h2", {}, "prompt", h("small", {}, ` ${span.stop - span.start} tokens`));
  const turn = episode.turns[span.turn];
  const size = `${span.stop - span.start} tokens`;
  if (span.author === "environment") return h("h2", {}, `observation ${span.turn}`, h("small", {}, ` ${size}`));
  const facts = [size, `stop: ${turn.stop}`, `version ${turn.version}`];
  if (turn.outcome !== "ok") facts.push(turn.outcome);
  if (turn.reward) facts.push(`reward ${number(turn.reward)}`);
  if (!span.in_loss) facts.push("not in the loss");
  return h("h2", { id: `turn-${span.turn}` }, `turn ${span.turn}`, h("small", {}, ` ${facts.join(" · ")}`));
}

export function episodeBox(episode, mode, marked) {
  const blocks = new Blocks(episode, mode, marked);
  const box = h("div", { class: "episode", "data-mode": mode }, episode.spans.map((span) =>
    h("section", { class: `span ${span.author}`, "data-turn": String(span.turn ?? "") }, turnHead(episode, span), blocks.span(span))));
  return { box, blocks };
}

function auditTools(run, episode, goTo) {
  const list = episode.findings.map((each) =>
    h("li", {}, h("button", { onclick: () => goTo(each) }, `${each.check}${each.turn === null ? "" : `, turn ${each.turn}`}`), ` ${each.what}`));
  const start = isLive ? h("button", { onclick: async () => { await post(`audit/${run}`); fill(note, "the audit is running; what it finds appears here"); } }, "audit this run") : null;
  const note = h("span", { role: "status" }, list.length ? `${list.length} findings of the audit` : "");
  return h("div", { class: "audit" }, start, " ", note, list.length ? h("ul", {}, list) : null);
}

export async function tokensView(root, query, app) {
  const at = Object.fromEntries(query);
  const run = +(at.run || 0);
  const chosen = +(at.sequence || 0);
  const path = `trajectory/${run}/${at.kind || "trajectories"}/${at.step}/${at.line}`;
  const episode = await get(path, { sequence: chosen });
  const hasNoise = Boolean((app.runs[run].config.algorithm || {}).perturbation);
  const marked = markedTokens(episode);
  const modes = Object.keys(MODES).filter((name) => name === "author" || episode.columns[name]);
  const mode = modes.includes(at.colour) ? at.colour : "author";
  const { box, blocks } = episodeBox(episode, mode, marked);
  let current = null;

  const facts = h("dl", { class: "facts" });
  const panel = h("aside", { class: "panel", "aria-label": "token", "aria-live": "off" }, h("p", { class: "hint" }, "point at a token, or move with ← and →"), facts);
  const spanOf = (index) => episode.spans.find((each) => each.start <= index && index < each.stop);
  function tell(index) {
    const span = spanOf(index);
    if (!span) return;
    const rows = tokenFacts(episode, span, index, hasNoise);
    rows.unshift(["text", JSON.stringify((episode.pieces || [])[index] ?? "")]);
    if (marked.has(index)) rows.push(["audit", marked.get(index).what]);
    fill(facts, rows.map(([name, value]) => [h("dt", {}, name), h("dd", { "data-fact": name }, value)]));
  }
  function moveTo(index) {
    const next = Math.max(0, Math.min(episode.ids.length - 1, index));
    const element = blocks.token(next);
    if (!element) return;
    box.querySelectorAll(".t.current").forEach((each) => each.classList.remove("current"));
    element.classList.add("current");
    element.scrollIntoView({ block: "nearest" });
    current = next;
    tell(next);
  }
  const indexOf = (event) => {
    const token = event.target.closest && event.target.closest(".t");
    return token && box.contains(token) ? +token.dataset.i : null;
  };
  box.addEventListener("mouseover", (event) => { const index = indexOf(event); if (index !== null) tell(index); });
  box.addEventListener("click", (event) => { const index = indexOf(event); if (index !== null) moveTo(index); });

  const goToTurn = (turn) => { const span = episode.spans.find((each) => each.turn === turn); if (span) { moveTo(span.start); box.querySelector(`[data-turn="${turn}"]`).scrollIntoView({ block: "start" }); } };
  const goToFinding = (finding) => { for (const [index, each] of marked) if (each === finding) moveTo(index); };
  const scale = h("span", { class: "scale" }, scaleOf(mode));
  const select = h("select", { "aria-label": "colour by", onchange: () => {
    blocks.recolour(select.value);
    box.dataset.mode = select.value;
    fill(scale, scaleOf(select.value));
    history.replaceState(null, "", address("tokens", { ...at, colour: select.value }));
  } }, modes.map((name) => h("option", { value: name, selected: name === mode }, labelOf(name, hasNoise))));
  const turnBox = h("input", { type: "number", min: "0", max: String(episode.turns.length - 1), "aria-label": "go to turn", placeholder: "turn", onchange: () => goToTurn(+turnBox.value) });
  const { row } = episode;
  const step = (by) => (location.hash = address("tokens", { ...at, line: Math.max(1, row.line + by), sequence: 0 }));
  const last = episode.turns.length ? episode.turns[episode.turns.length - 1] : { info: {} };
  const told = [
    ["reward", number(row.reward)], ["advantage", number(row.advantage)], ["outcome", row.outcome], ["ended", row.ended],
    ["answer", last.info.answer ?? "none"], ["calls", row.tool_calls], ["tokens", row.tokens], ["staleness", row.staleness],
    ["step", row.step], ["uid", row.uid], ["update", episode.update ?? "not recorded"],
  ];
  fill(root,
    h("h1", {}, `${episode.task_id}`),
    h("dl", { class: "told" }, told.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
    h("div", { class: "bar" },
      h("label", {}, "colour by ", select), scale, turnBox,
      h("button", { onclick: () => step(-1), "aria-label": "trajectory before" }, "◂"), h("button", { onclick: () => step(1), "aria-label": "next trajectory" }, "▸"),
      h("a", { href: address("group", { run, kind: row.kind, step: row.step, group: row.group_id }) }, "its group side by side")),
    episode.no_tokenizer ? h("p", { class: "warning" }, `The text is that of the records, not by token: ${episode.no_tokenizer}`) : null,
    auditTools(run, episode, goToFinding),
    treeOf(episode.sequences, chosen, at),
    timeStrip(episode.turns, goToTurn),
    h("p", { class: "key" }, AUTHORS.map(([name, label]) => [h("span", { class: `swatch by ${name}` }), ` ${label} `])),
    h("div", { class: "beside" }, box, panel),
  );
  return {
    update: (state, before) => { if (state[run].audit !== before[run].audit && state[run].audit !== "running") app.reload(); },
    close: () => blocks.close(),
    key: (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") { moveTo((current ?? -1) + (event.key === "ArrowRight" ? 1 : -1)); return true; }
      if (event.key === "n") { const next = [...marked.keys()].sort((a, b) => a - b).find((index) => index > (current ?? -1)); if (next !== undefined) moveTo(next); return true; }
      if (event.key === "c") { select.selectedIndex = (select.selectedIndex + 1) % modes.length; select.dispatchEvent(new Event("change")); return true; }
      return false;
    },
  };
}

// The trajectories of a group beside one another.
export async function groupView(root, query) {
  const run = +(query.get("run") || 0);
  const [step, group] = [query.get("step"), query.get("group")];
  const kind = query.get("kind") || "trajectories";
  const { rows } = await get(`trajectories/${run}`, { step: `${step}:${step}`, group_id: `${group}:${group}`, kind, sort: "-reward", limit: 64 });
  const open = [];
  const columns = await Promise.all(rows.map(async (row) => {
    const head = h("h2", {}, h("a", { href: address("tokens", { run, kind, step: row.step, line: row.line }) }, `line ${row.line}`),
      h("small", {}, ` reward ${number(row.reward)} · advantage ${number(row.advantage)} · answer ${row.answer ?? "none"}`));
    try {
      const { box, blocks } = episodeBox(await get(`trajectory/${run}/${kind}/${row.step}/${row.line}`), "author", new Map());
      open.push(blocks);
      return h("article", {}, head, box);
    } catch (error) {
      return h("article", {}, head, h("p", {}, error.message));
    }
  }));
  fill(root, h("h1", {}, `Group ${group}, step ${step}`), h("p", {}, rows.length ? rows[0].task_id : "there is no such group"),
    h("div", { class: "columns", tabindex: "0", role: "region", "aria-label": "trajectories of the group" }, columns));
  return { close: () => open.forEach((each) => each.close()), key: () => place().view !== "group" };
}
