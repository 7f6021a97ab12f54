"""The benchmark `decoding`: a target pass of few tokens, and plain decoding, beside transformers'.

All ways run in one process and take turns: Aerie's pass, the model's own forward over the same
packed weights, and the unpacked model. Decoding is greedy, of one sequence, and has no draft head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.config import Config, DecodeConfig
from core.decode.engine import SpeculativeDecoder
from core.decode.forward import Piece, target_pass
from core.decode.policy import median_seconds
from core.decode.rows import RowCache
from core.decode.tree import PLAIN, DraftTree
from core.evaluate.comparison import Ratio, Way, compare, print_comparison, summarize_comparison
from core.evaluate.memory import memory_figures
from core.models.target import Target, load_target, target_folder
from core.progress import say
from core.provenance import RunFolder
from core.runtime.resources import Resources

STAGE = "benchmark"
AERIE, OWN_FORWARD, UNPACKED = "aerie", "own_forward_packed", "unpacked"
PASS_TOKENS = (1, 4, 8, 16, 32)
CONTEXT_TOKENS, NEW_TOKENS = 200, 64
RATIOS = (
    Ratio("plain_decoding_to_hf_generate", "tokens_per_second", AERIE, UNPACKED, at_least=1.4),
    Ratio("plain_decoding_to_own_forward", "tokens_per_second", AERIE, OWN_FORWARD),
    *(Ratio(f"ms_of_{n}_to_own_forward", f"ms_{n}", AERIE, OWN_FORWARD) for n in PASS_TOKENS),
)


def decoding_inputs(config: Config) -> Mapping[str, Path]:
    """The target's folder."""
    return {"target.path": target_folder(config.target.path)}


def decoding_resources(config: Config) -> Resources:
    """One process."""
    return Resources(cpus=config.eval.cpus, gpus=config.eval.gpus, because="eval.cpus, eval.gpus")


def benchmark_decoding(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Run all ways in turn; returns the report."""
    threads = max(1, int(config.eval.cpus))
    packed = load_target(config.target.model_copy(update={"pack_linear": True}), threads)
    unpacked = load_target(config.target.model_copy(update={"pack_linear": False}), threads)
    targets = {AERIE: packed, OWN_FORWARD: replace(packed, fused=None), UNPACKED: unpacked}
    subjects = {name: _Subject.of(target) for name, target in targets.items()}
    if packed.fused is None:
        say(STAGE, "the model's own forward is all there is: it is not made as Llama is")
    ways = [Way(name, subject.run) for name, subject in subjects.items()]
    ways[-1] = Way(UNPACKED, partial(_unpacked, subjects[UNPACKED]))
    found = compare(ways, config.benchmark.repeats, STAGE)
    summary = summarize_comparison(found, RATIOS)
    print_comparison(summary, f"decoding, {threads} threads, {config.target.dtype}")
    memory = memory_figures(packed)
    reached = summary["ways"][AERIE]["tokens_per_second"]["median"]
    limit = memory["tokens_per_second_limit"]
    say(
        STAGE,
        f"a token moves {memory['weight_bytes_per_token'] / 1e6:,.0f} MB of weights, and memory "
        f"reads {memory['bytes_per_second'] / 1e9:.1f} GB/s: {limit:.0f} tokens/s at most, of "
        f"which plain decoding reaches {reached / limit:.0%}",
    )
    return {
        "benchmark": "decoding",
        **summary,
        "memory": memory,
        "share_of_memory_limit": reached / limit,
        "context_tokens": CONTEXT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "threads": threads,
        "dtype": config.target.dtype,
    }


@dataclass(frozen=True)
class _Subject:
    """A target, with a text in a cache to read on from."""

    target: Target
    decoder: SpeculativeDecoder
    rows: RowCache
    prompt: tuple[int, ...]

    @classmethod
    def of(cls, target: Target) -> _Subject:
        config = DecodeConfig(max_context=512, reuse_prefixes=False)
        prompt = tuple(7919 * place % target.vocab_size for place in range(CONTEXT_TOKENS))
        # An end token would end the measurement.
        endless = replace(target, eos_token_ids=frozenset())
        decoder = SpeculativeDecoder(endless, None, config)
        rows = RowCache(target.model.config, 512, 512)
        target_pass(target, rows, [Piece.of_text(0, 0, prompt, 1)])
        return cls(target, decoder, rows, prompt)

    def run(self, repeat: int) -> dict[str, float]:
        """Milliseconds of passes, and tokens a second behind the prompt."""
        return {**self.passes(), "tokens_per_second": self.decode()}

    def passes(self) -> dict[str, float]:
        """Of each number of tokens, as a tree behind the text."""
        works = {f"ms_{count}": partial(self._read, count) for count in PASS_TOKENS}
        return {name: 1e3 * seconds for name, seconds in median_seconds(works).items()}

    def _read(self, count: int) -> None:
        tree = DraftTree(torch.arange(count), (-1, *(0,) * (count - 1)), tuple(range(count)))
        target_pass(self.target, self.rows, [Piece.of_tree(0, CONTEXT_TOKENS, tree)])

    def decode(self) -> float:
        """Tokens a second; the prompt's pass is left out."""
        rounds = self.decoder.generate(
            self.prompt, max_new_tokens=NEW_TOKENS + 1, temperature=0, plan=PLAIN
        )
        next(rounds)
        started = time.perf_counter()
        count = sum(len(done.tokens) for done in rounds)
        return count / (time.perf_counter() - started)


def _unpacked(subject: _Subject, repeat: int) -> dict[str, float]:
    """Passes of the unpacked model, and `generate`; the prompt's pass is left out."""
    model, device = subject.target.model, subject.target.device
    ids_1T = torch.tensor([subject.prompt], device=device)

    def generate(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert output.shape[1] == ids_1T.shape[1] + count
        return time.perf_counter() - started

    first = generate(1)
    seconds = generate(NEW_TOKENS + 1) - first
    return {**subject.passes(), "tokens_per_second": NEW_TOKENS / seconds}
