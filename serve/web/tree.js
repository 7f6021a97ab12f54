"use strict";
// The draft trees of an answer: the current round's while it comes, any round's afterwards.

const LETTER = 7.25, ROW = 26, BOX = 20, PAD = 7, GAP = 26, LONGEST = 14;
const REDRAWN_MS = 120;  // faster than that nobody sees a tree

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A token as it is drawn: white space and control characters can be seen, and a long one is cut.
function label(text) {
  const seen = { " ": "·", "\n": "↵", "\t": "⇥", "\x7f": "␡" };
  const shown = [...text].map((one) => seen[one] ?? (one < " " ? String.fromCodePoint(0x2400 + one.codePointAt(0)) : one));
  return (shown.length > LONGEST ? [...shown.slice(0, LONGEST - 1), "…"] : shown).join("") || "∅";
}

function widthOf(shown) {
  let letters = 0;
  for (const letter of shown) letters += letter.codePointAt(0) < 0x2e80 ? 1 : 2;
  return letters * LETTER + 2 * PAD;
}

// Nodes with their places. A first child stands in its parent's row, so that likely paths are
// straight; the model's own token comes first of all.
function laidOut({ parents, texts, accepted, bonus }) {
  const nodes = texts.map((text, place) => ({
    shown: label(text), parent: parents[place], children: [],
    kind: place === 0 ? "root" : accepted.includes(place) ? "kept" : "lost",
  }));
  if (bonus !== null) nodes.push({ shown: label(bonus), parent: accepted.at(-1), children: [], kind: "own" });
  for (const node of nodes) {
    const above = nodes[node.parent];
    node.depth = above ? above.depth + 1 : 0;
    if (above) above.children[node.kind === "own" ? "unshift" : "push"](node);
  }
  const widths = [];
  for (const node of nodes) widths[node.depth] = Math.max(widths[node.depth] ?? 0, widthOf(node.shown));
  const lefts = [1];
  for (const width of widths) lefts.push(lefts.at(-1) + width + GAP);
  let rows = 0;
  const place = (node) => {
    node.left = lefts[node.depth];
    if (!node.children.length) node.middle = ROW * rows++ + ROW / 2;
    node.children.forEach(place);
    if (node.children.length) node.middle = node.children[0].middle;
  };
  place(nodes[0]);
  return { nodes, width: lefts.at(-1) - GAP + 2, height: rows * ROW };
}

function drawn({ nodes, width, height }) {
  const edges = [], boxes = [];
  for (const node of nodes) {
    const wide = widthOf(node.shown);
    const box = svg("g", { class: node.kind },
      svg("rect", { x: node.left, y: node.middle - BOX / 2, width: wide, height: BOX, rx: 5 }),
      svg("text", { x: node.left + PAD, y: node.middle + 4 }, node.shown));
    boxes.push(box);
    const above = nodes[node.parent];
    if (!above) continue;
    const from = above.left + widthOf(above.shown), to = node.left, half = (from + to) / 2;
    const edge = svg("path", {
      class: node.kind === "lost" ? "lost" : "kept",
      d: `M${from} ${above.middle}C${half} ${above.middle} ${half} ${node.middle} ${to} ${node.middle}`,
    });
    edges[node.kind === "lost" ? "unshift" : "push"](edge);
  }
  return svg("svg", { width, height, role: "img" }, ...edges, ...boxes);
}

const quoted = (text) => `“${text.replace(/\n/g, "↵")}”`;

function summary({ texts, accepted, bonus }) {
  const guesses = texts.length - 1, kept = accepted.slice(1).map((node) => texts[node]).join("");
  const parts = [`After ${quoted(texts[0])} ${guesses === 1 ? "1 token was" : `${guesses || "no"} tokens were`} guessed`];
  if (guesses) parts.push(kept ? `the model kept ${accepted.length - 1}, ${quoted(kept)}` : "the model kept none");
  if (bonus !== null) parts.push(`its own next token is ${quoted(bonus)}`);
  return `${parts.join("; ")}.`;
}

// For those who do not see the drawing: every branch, as text.
function spelledOut(tree) {
  const inner = new Set(tree.parents);
  const branches = [];
  for (let leaf = 1; leaf < tree.texts.length; leaf += 1) {
    if (inner.has(leaf)) continue;
    let text = "";
    for (let node = leaf; node > 0; node = tree.parents[node]) text = tree.texts[node] + text;
    branches.push(quoted(text));
  }
  return `${summary(tree)} ${branches.length ? `Guessed: ${branches.join(", ")}.` : ""}`;
}

class TreeView {
  constructor(find, drew) {
    this.drew = drew;
    this.figure = find("tree"); this.round = find("round"); this.place = find("place");
    this.canvas = find("canvas"); this.said = find("said");
    this.trees = []; this.tallest = 0; this.timer = null;
    this.round.addEventListener("input", () => this.draw());
  }

  // Forget the answer before.
  begin() {
    this.trees = [];
    this.tallest = 0;
    this.figure.hidden = true;
    this.round.max = this.round.value = 1;
  }

  add(tree) {
    const last = Number(this.round.value) === Number(this.round.max);
    this.trees.push(tree);
    this.round.max = this.trees.length;
    if (last) this.round.value = this.trees.length;  // else someone looks at an earlier round
    this.timer ??= setTimeout(() => { this.timer = null; this.draw(); this.drew(); }, REDRAWN_MS);
  }

  draw() {
    const number = Number(this.round.value), tree = this.trees[number - 1];
    if (!tree) return;
    this.figure.hidden = false;
    const layout = laidOut(tree), drawing = drawn(layout);
    drawing.setAttribute("aria-label", spelledOut(tree));
    this.canvas.replaceChildren(drawing);
    // It does not shrink from round to round: what stands below would jump.
    this.tallest = Math.max(this.tallest, layout.height);
    drawing.style.minHeight = `${this.tallest}px`;
    this.place.textContent = `${number} of ${this.trees.length}`;
    this.round.setAttribute("aria-valuetext", `${number} of ${this.trees.length}. ${summary(tree)}`);
    this.said.textContent = summary(tree);
    // Where the accepted path ends is what is to be seen.
    const end = tree.bonus === null ? layout.nodes[tree.accepted.at(-1)] : layout.nodes.at(-1);
    this.canvas.scrollTop = end.middle - this.canvas.clientHeight / 2;
    this.canvas.scrollLeft = end.left + widthOf(end.shown) + GAP - this.canvas.clientWidth;
  }
}
