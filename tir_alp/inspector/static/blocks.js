// The tokens of a sequence. Far from what is seen, a block of tokens is one text node: it takes as
// much room as its tokens would, costs next to nothing, and the browser's own search finds it.

import { append, h, visible } from "./dom.js";
import { classOf } from "./colours.js";

const SIZE = 192; // tokens per block

// The parts of a token's text that code colours differently: [text, class] each.
function parts(text, start, words, from) {
  const found = [];
  let at = start;
  const stop = start + text.length;
  for (let i = from.index; i < words.length && words[i][0] < stop; i++) {
    const [low, high, kind] = words[i];
    if (high <= at) { if (high <= start) from.index = i + 1; continue; }
    if (low > at) found.push([text.slice(at - start, low - start), ""]);
    found.push([text.slice(Math.max(low, at) - start, Math.min(high, stop) - start), `k-${kind}`]);
    at = Math.min(high, stop);
  }
  if (at < stop) found.push([text.slice(at - start), ""]);
  return found;
}

function tokenElement(text, pieces, classes, index) {
  const element = h("span", { class: classes, "data-i": String(index) });
  if (!text) return append(element, ["\u25cc"]); // a part of a character that a later token completes
  return append(element, pieces.map(([part, kind]) => (kind ? h("span", { class: kind }, part) : part)));
}

export class Blocks {
  // episode: as the server sends it; mode: what the colours show.
  constructor(episode, mode, marked) {
    this.episode = episode;
    this.mode = mode;
    this.marked = marked;
    this.blocks = [];
    this.watcher = new IntersectionObserver((entries) => entries.forEach((each) => this.seen(each)), { rootMargin: "600px 0px" });
  }

  // The element with the tokens of a span.
  span(span) {
    const box = h("div", { class: `tokens ${span.author}${span.in_loss ? "" : " masked"}` });
    if (!this.episode.pieces) return append(box, [span.text]);
    let at = 0;
    for (let start = span.start; start < span.stop; start += SIZE) {
      const stop = Math.min(span.stop, start + SIZE);
      const text = this.episode.pieces.slice(start, stop).join("");
      const block = { element: h("span", { class: "block" }), span, start, stop, at, text, isOpen: false };
      block.element.textContent = visible(text);
      block.element.block = block;
      at += text.length;
      this.blocks.push(block);
      this.watcher.observe(block.element);
      box.append(block.element);
    }
    return box;
  }

  seen({ target, isIntersecting }) {
    const { block } = target;
    if (isIntersecting === block.isOpen) return;
    if (isIntersecting) this.open(block);
    else {
      block.isOpen = false;
      target.textContent = visible(block.text);
    }
  }

  open(block) {
    const { pieces, columns } = this.episode;
    const elements = [];
    const from = { index: 0 };
    let { at } = block;
    for (let index = block.start; index < block.stop; index++) {
      const classes = ["t", classOf(this.mode, columns, index)];
      if (columns.clipped && columns.clipped[index]) classes.push("clipped");
      if (this.marked.has(index)) classes.push("finding");
      elements.push(tokenElement(pieces[index], parts(pieces[index], at, block.span.code, from), classes.join(" ").trim(), index));
      at += pieces[index].length;
    }
    block.element.replaceChildren(...elements);
    block.isOpen = true;
  }

  recolour(mode) {
    this.mode = mode;
    this.blocks.filter((each) => each.isOpen).forEach((each) => this.open(each));
  }

  // Make a token's element exist and return it.
  token(index) {
    const block = this.blocks.find((each) => each.start <= index && index < each.stop);
    if (!block) return null;
    if (!block.isOpen) this.open(block);
    return block.element.children[index - block.start];
  }

  close() {
    this.watcher.disconnect();
  }
}
