"""Decode prompts in vLLM with a draft head and count what is accepted; run by `compare_vllm`.

It runs in vLLM's own environment and imports nothing of Aerie's. Greedy: vLLM's speculation
above temperature 0 gives other text on CPU than it should.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter, Vector

PREFIX = "vllm:spec_decode_num_"


def main() -> None:
    """Read a request, a JSON file; write the answer beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request", type=Path)
    parser.add_argument("answer", type=Path)
    arguments = parser.parse_args()
    request = json.loads(arguments.request.read_text())
    llm = LLM(
        model=request["target"],
        dtype="float32",
        max_model_len=request["max_context"],
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={
            "method": request["method"],
            "model": request["head"],
            "num_speculative_tokens": request["num_tokens"],
        },
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    settings = SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"])
    outputs = llm.generate(prompts, settings)
    counts: dict[str, object] = {
        metric.name.removeprefix(PREFIX): metric.values
        if isinstance(metric, Vector)
        else metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(PREFIX) and isinstance(metric, Counter | Vector)
    }
    counts["token_ids"] = [list(output.outputs[0].token_ids) for output in outputs]
    arguments.answer.write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
