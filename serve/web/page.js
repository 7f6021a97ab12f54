"use strict";
const $ = (id) => document.getElementById(id);
const WAYS = [
  { name: "Speculative decoding", speculate: true },
  { name: "The model alone", speculate: false },
];
const state = { model: null, messages: [], running: null, aloneFirst: false, follows: true };
const tree = new TreeView($, () => follow(false));

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;  // never innerHTML: answers are not markup
  return node;
}

function follow(always) {
  if (always) state.follows = true;
  if (state.follows) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function addTurn(role, ...content) {
  $("welcome").hidden = true;
  const turn = element("article", `turn ${role}`);
  turn.append(...content);
  $("log").append(turn);
  follow(true);
  return turn;
}

// Where one answer appears.
class Pane {
  constructor(way, titled) {
    this.way = way;
    this.figures = new Figures();
    this.node = element("section", "pane");
    this.node.setAttribute("aria-label", way.name);
    this.body = element("div", "body");
    this.line = element("div", "figures");
    if (titled) this.node.append(element("h2", "", way.name));
    this.node.append(this.body, this.line);
  }

  get text() { return this.body.textContent; }

  async fill(request, signal) {
    this.line.textContent = "";
    this.node.classList.add("busy");
    try {
      for await (const round of roundsOf(request, headers(), signal)) this.add(round);
    } finally {
      this.node.classList.remove("busy");
    }
  }

  add(round) {
    for (const [text, drafted] of round.spans) {
      this.body.append(drafted ? element("span", "drafted", text) : document.createTextNode(text));
    }
    if (round.tree && $("draw").checked) tree.add(round.tree);
    this.figures.add(round);
    this.line.textContent = this.figures.text;
    follow(false);
  }

  fail(message) {
    const box = element("p", "error", message);
    box.setAttribute("role", "alert");
    this.node.append(box);
    follow(true);
  }
}

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function requestFor(way, seed) {
  const aerie = { spans: true, speculate: way.speculate, tree: way.speculate && $("draw").checked };
  const body = { model: state.model, messages: state.messages, stream: true, aerie };
  const temperature = $("temperature").valueAsNumber;
  const maxTokens = $("max-tokens").valueAsNumber;
  if (!Number.isNaN(temperature)) body.temperature = temperature;
  if (!Number.isNaN(maxTokens)) body.max_tokens = maxTokens;
  if (seed !== null) body.seed = seed;
  return body;
}

// What two answers to the same question show.
function verdict(guessed, alone) {
  const ratio = guessed.figures.speed && alone.figures.speed ? guessed.figures.speed / alone.figures.speed : null;
  const speed = ratio === null ? "" : `Speculative decoding gave ${ratio.toFixed(2)} times the tokens/s. `;
  if (guessed.text === alone.text) return `${speed}Both texts are the same.`;
  let same = 0;
  while (guessed.text[same] === alone.text[same]) same += 1;
  return `${speed}The texts part after ${same} characters: where two tokens are about equally likely, rounding decides.`;
}

async function ask(text) {
  const before = state.messages.length;
  state.messages.push({ role: "user", content: text });
  addTurn("user", element("div", "body", text));
  const both = $("compare").checked;
  const panes = WAYS.slice(0, both ? 2 : 1).map((way) => new Pane(way, both));
  const frame = element("div", both ? "panes two" : "panes");
  frame.append(...panes.map((pane) => pane.node));
  const turn = addTurn("assistant", frame);
  turn.setAttribute("aria-busy", "true");  // read out when it is complete, not token by token
  const run = new AbortController();
  setRunning(run);
  tree.begin();
  say("Answering.");
  let pane, said;
  try {
    // One after the other, so that neither takes time from the other; with a seed, of the same text.
    const seed = both ? Math.floor(Math.random() * 2 ** 31) : null;
    const order = both && state.aloneFirst ? [...panes].reverse() : panes;
    if (both) state.aloneFirst = !state.aloneFirst;
    for (const next of order.slice(1)) next.line.textContent = "waits until the other one has ended";
    for (pane of order) await pane.fill(requestFor(pane.way, seed), run.signal);
    said = `The answer is complete: ${panes[0].line.textContent}.`;
    if (both) {
      const line = element("p", "verdict", verdict(...panes));
      turn.append(line);
      said += ` ${line.textContent}`;
    }
  } catch (error) {
    for (const one of panes) if (!one.text) one.line.textContent = "";
    if (run.signal.aborted) {
      pane.line.textContent += " · stopped";
      said = "Stopped.";
    } else {
      pane.fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
      said = "";
    }
  } finally {
    turn.removeAttribute("aria-busy");
    const content = panes.map((one) => one.text).find(Boolean);
    if (state.running === run) {  // else a new chat was begun meanwhile
      if (content) state.messages.push({ role: "assistant", content });
      else state.messages.length = before;
      setRunning(null);
      say(said);
      follow(false);
    }
  }
}

function say(text) {
  $("status").textContent = text;
}

function setRunning(run) {
  state.running = run;
  $("send").textContent = run ? "Stop" : "Send";
  $("send").disabled = !run && !state.model;
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

function showSettings(shown) {
  $("settings").hidden = !shown;
  $("toggle").setAttribute("aria-expanded", String(shown));
}

function useModels(names) {
  state.model = names.includes(state.model) ? state.model : names[0];
  $("choice").replaceChildren(...names.map((name) => new Option(name, name, false, name === state.model)));
  $("models").hidden = names.length < 2;
  $("model").textContent = state.model;
  setRunning(state.running);
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {  // asked again when a key is typed
      $("model").textContent = "this server asks for an API key: type it in the settings";
      showSettings(true);
      return;
    }
    if (!response.ok) throw new Error(await failure(response));
    useModels((await response.json()).data.map((model) => model.id));
  } catch {
    $("model").textContent = "the server cannot be reached; trying again…";
    setTimeout(connect, 2000);
  }
}

function startAnew() {
  state.running?.abort();
  setRunning(null);
  state.messages = [];
  tree.begin();
  document.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("welcome").hidden = false;
  say("A new chat.");
  $("input").focus();
}

// Who scrolls up reads, and is not pulled down again until the end is in sight.
$("scroll").addEventListener("scroll", () => {
  const view = $("scroll");
  state.follows = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) { state.running.abort(); return; }
  const text = $("input").value.trim();
  if (!text || !state.model) return;
  $("input").value = "";
  grow();
  ask(text);
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.running) $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (state.running) {
    state.running.abort();
  } else if (!$("settings").hidden) {
    showSettings(false);
    $("toggle").focus();
  }
});
$("toggle").addEventListener("click", () => showSettings($("settings").hidden));
// For this tab alone: a key that outlived it would be the next person's on this machine.
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value.trim());
  connect();
});
$("choice").addEventListener("change", () => {
  state.model = $("choice").value;
  $("model").textContent = state.model;
});
$("highlight").addEventListener("change", () => document.body.classList.toggle("plain", !$("highlight").checked));
$("draw").addEventListener("change", () => { if (!$("draw").checked) tree.begin(); });
$("compare").addEventListener("change", () => {
  document.body.classList.toggle("comparing", $("compare").checked);
  $("how").hidden = !$("compare").checked;
});
$("fresh").addEventListener("click", startAnew);
setRunning(null);
connect();
