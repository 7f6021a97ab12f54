"""Another engine, which answers an evaluation's prompts in an environment of its own.

`core/evaluate/peers.py` runs this file with that environment's Python, so it imports nothing of
Aerie's. Lines of JSON go to and fro: what to load, answered when it is loaded, and then a prompt a
line, each answered before the next one comes. The end of its input ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Generate = Callable[[Sequence[int], int], list[int]]
"""Prompt and most new tokens to new tokens, at temperature 0; one that ends the text is the last
of them."""


def load_vllm(
    target: str,
    dtype: str,
    max_context: int,
    threads: int,
    eos_token_ids: Sequence[int],
    speculative: dict[str, Any] | None = None,
) -> Generate:
    """vLLM, of which each prompt is a batch of its own."""
    # In this very process: there is nobody else whom its scheduler could serve.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=target,
        dtype=dtype,
        max_model_len=max_context,
        max_num_seqs=1,
        # Compiling takes minutes, and on a CPU brings nothing.
        enforce_eager=not importlib.import_module("torch").cuda.is_available(),
        # Every way reads the whole prompt: the second one must not find it read.
        enable_prefix_caching=False,
        speculative_config=speculative,
    )

    def generate(prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        settings = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop_token_ids=list(eos_token_ids),
            detokenize=False,
        )
        prompt = {"prompt_token_ids": list(prompt_ids)}
        (output,) = llm.generate([prompt], settings, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return generate


def load_llama_cpp(
    model: str, max_context: int, threads: int, eos_token_ids: Sequence[int]
) -> Generate:
    """llama.cpp, as llama-cpp-python binds it."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    llm = llama_cpp.Llama(
        model,
        n_ctx=max_context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1,
        verbose=False,
    )
    ends = frozenset(eos_token_ids)

    def generate(prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        # Or it goes on from what of the prompt it has read before.
        llm.reset()
        found: list[int] = []
        for token in llm.generate(list(prompt_ids), temp=0.0, repeat_penalty=1.0):
            found.append(int(token))
            if token in ends or len(found) == max_new_tokens:
                break
        return found

    return generate


ENGINES: dict[str, Callable[..., Generate]] = {"vllm": load_vllm, "llama_cpp": load_llama_cpp}


def main() -> None:
    """Load what the first line says; then answer."""
    # Engines print what they like where they like: to the log, all of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    generate = ENGINES[settings.pop("engine")](**settings)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        token_ids = generate(asked["prompt_ids"], asked["max_new_tokens"])
        seconds = time.perf_counter() - started
        print(json.dumps({"token_ids": token_ids, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
