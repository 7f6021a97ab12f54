"use strict";
// Asking the server, and what comes back, round by round.

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

async function* serverSent(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}

// Speed and accepted length so far. The server times its rounds: neither the network nor the
// reading of the prompt is in the speed. A server that does not tell of its rounds sums up at the end.
class Figures {
  constructor() { this.tokens = 0; this.decoded = 0; this.rounds = 0; this.nodes = 0; this.seconds = 0; this.sum = {}; }

  add({ tokens = 0, tree_size: nodes, seconds, sum }) {
    this.tokens += tokens;
    if (sum) this.sum = sum;
    if (nodes === undefined) return;
    this.told = true;
    if (!nodes) return;  // the prompt's own pass, which gives the first token
    this.rounds += 1;
    this.decoded += tokens;
    this.nodes += nodes;
    this.seconds += seconds.draft + seconds.verify;
  }

  get speed() {
    if (!this.told) return this.sum.tokens_per_second ?? null;
    return this.seconds ? this.decoded / this.seconds : null;
  }

  get text() {
    const length = this.told ? (this.rounds ? this.decoded / this.rounds : 1) : this.sum.accepted_length;
    const nodes = this.rounds ? this.nodes / this.rounds : 1;
    const parts = [`${this.tokens} tokens`];
    if (length !== undefined) parts.unshift(`τ ${length.toFixed(2)}`);
    if (nodes > 1) parts.push(`trees of ${nodes.toFixed(1)}`);
    if (this.speed !== null) parts.unshift(`${this.speed.toFixed(1)} tokens/s`);
    return parts.join(" · ");
  }
}

// Yields the rounds of an answer: {spans, tokens, tree_size, seconds, tree}; the last one is its {sum}.
async function* roundsOf(body, headers, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", signal, headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error(await failure(response));
  let complete = false;
  for await (const data of serverSent(response.body)) {
    complete = data === "[DONE]";
    if (complete) continue;  // to the end of the response: nothing is on its way any more
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const round = chunk.choices[0]?.aerie;
    if (round) yield round;
    if (chunk.aerie) yield { spans: [], sum: chunk.aerie };
  }
  if (!complete) throw new Error("The connection ended before the answer did.");
}
