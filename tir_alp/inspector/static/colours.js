// How numbers of tokens become classes of style.css: s0..s8 from little to much, d0..d8 from negative
// over nothing (d4) to positive, c0..c7 for kinds.

import { number } from "./dom.js";

const clamp = (value) => Math.max(0, Math.min(8, Math.round(value)));
const logprob = (value) => `s${clamp(8 * Math.sqrt(Math.max(0, -value) / 8))}`; // finer near 0
const signed = (scale) => (value) => `d${clamp(4 + (4 * value) / scale)}`;

export const MODES = {
  author: { label: "author and mask", of: null },
  rollout: { label: "rollout logprob", of: logprob },
  proximal: { label: "trainer logprob", of: logprob },
  logprob: { label: "logprob in the loss", of: logprob },
  clean: { label: "logprob without noise", of: logprob },
  reference: { label: "reference logprob", of: logprob },
  log_ratio: { label: "log ratio", of: signed(1) },
  level_log_ratio: { label: "log ratio of the level", of: signed(1) },
  clipped: { label: "clipped", of: (value) => (value ? "s8" : "s0") },
  advantage: { label: "advantage", of: signed(2) },
  entropy: { label: "entropy", of: (value) => `s${clamp(8 * Math.sqrt(Math.max(0, value) / 4))}` },
  version: { label: "weight version", of: (value) => `c${value % 8}` },
};

// What the page says of a mode: which numbers its ends are.
export function scaleOf(mode) {
  const scales = {
    rollout: "0 to -8 nats", proximal: "0 to -8 nats", logprob: "0 to -8 nats", clean: "0 to -8 nats",
    reference: "0 to -8 nats", log_ratio: "-1 to 1 nat", level_log_ratio: "-1 to 1 nat", advantage: "-2 to 2",
    entropy: "0 to 4 nats", clipped: "clipped tokens are marked", version: "one colour per version",
  };
  return scales[mode] || "";
}

export function classOf(mode, columns, index) {
  const { of } = MODES[mode];
  if (!of) return "";
  const column = columns[mode];
  const value = column ? column[index] : null;
  return value === null || value === undefined ? "unknown" : of(value);
}

export function labelOf(mode, hasNoise) {
  return mode === "logprob" && hasNoise ? "perturbed logprob" : MODES[mode].label;
}

// All that is known of a token, as pairs of name and value.
export function tokenFacts(episode, span, index, hasNoise) {
  const { columns } = episode;
  const facts = [["token", `${index}, id ${episode.ids[index]}`], ["author", span.author]];
  if (span.turn !== null) facts.push(["turn", String(span.turn)]);
  facts.push(["in the loss", columns.mask[index] ? "yes" : "no"]);
  for (const mode of Object.keys(MODES)) {
    const column = columns[mode];
    if (!column || column[index] === null || column[index] === undefined) continue;
    const sides = mode === "clipped" ? episode.clip_sides.filter((_, bit) => column[index] & (1 << bit)) : null;
    facts.push([labelOf(mode, hasNoise), sides ? sides.join(", ") || "no" : number(column[index], 7)]);
  }
  return facts;
}
