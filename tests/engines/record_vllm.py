"""Record what vLLM's server answers, for `tests/unit/test_serve_vllm*.py` to replay.

    python -m tests.engines.record_vllm --vllm /opt/vllm/bin/python --target <SmolLM2's HF folder>

Run it for a new version of vLLM, or after a change to what it is asked. The target is
SmolLM2-135M-Instruct and the head the published one; each stream is kept with the body that it
answers, and of the tokenizer the tokens that occur. It takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from core.config import Config
from serve.generation import Generation, Rejected
from serve.vllm.replica import VllmReplica
from serve.vllm.settings import check_python

PLACE = Path(__file__).parents[1] / "unit" / "vllm_recorded.json"
HEAD = "pkg://serve/heads/smollm2-135m-instruct"
PROMPT = "The capital of France is"
NAME_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}
SPECULATED: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 12},
    "logprobs": {"max_new_tokens": 4, "sampling": {"logprobs": 2}},
    "no_top": {"max_new_tokens": 2, "sampling": {"logprobs": 0}},
    "stop": {"max_new_tokens": 40, "stops": ("answer",)},
    "stop_token": {"max_new_tokens": 40, "stop_token_ids": (30,)},
    "json": {"max_new_tokens": 60, "schema": json.dumps(NAME_SCHEMA)},
    "bad_schema": {"max_new_tokens": 6, "schema": json.dumps({"type": "nonsense"})},
}
PLAIN: dict[str, dict[str, Any]] = {
    "sampled": {
        "max_new_tokens": 6,
        "choices": 2,
        "seed": 2**63 - 1,
        "sampling": {
            "temperature": 0.9,
            "top_p": 0.9,
            "top_k": 50,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "logit_bias": {7042: -100.0},
        },
    },
    "plain": {"max_new_tokens": 5},
}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True, help="python of vLLM's environment")
    parser.add_argument("--target", required=True, help="HF folder of SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    config = Config().replace(
        target={"path": arguments.target, "dtype": "float32"},
        draft={"path": HEAD},
        decode={"depth": 2, "cache_tokens": 4096},
        serve={"backend": "vllm", "vllm_python": arguments.vllm},
    )
    streams = asyncio.run(_record(config, SPECULATED))
    streams += asyncio.run(_record(config.replace(draft={"path": None}), PLAIN))
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    seen = set(tokenizer(PROMPT)["input_ids"])
    for stream in streams:
        seen |= {token for line in stream["lines"] for token in _tokens(line)}
    special = {token: tokenizer.convert_ids_to_tokens(token) for token in (0, 1, 2)}
    words = {token: tokenizer.convert_ids_to_tokens(token) for token in sorted(seen)}
    recorded = {
        "vllm": check_python(config),
        "prompt": PROMPT,
        "prompt_ids": tokenizer(PROMPT)["input_ids"],
        "special": special,
        "tokens": words,
        "streams": streams,
    }
    PLACE.write_text(json.dumps(recorded, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


async def _record(config: Config, requests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    replica = VllmReplica(config)
    try:
        return [
            {"name": name, "body": body, **await _stream(replica, body)}
            for name, settings in requests.items()
            for body in await _bodies(replica, settings)
        ]
    finally:
        replica.close()


async def _bodies(replica: VllmReplica, settings: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    asked = await replica._check(Generation((PROMPT,), prompt_field="prompt", **settings))
    assert not isinstance(asked, Rejected), asked
    return asked.bodies


async def _stream(replica: VllmReplica, body: dict[str, Any]) -> dict[str, Any]:
    async with replica._client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    return {"status": response.status_code, "lines": lines}


def _tokens(line: str) -> set[int]:
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        return set()
    found: set[int] = set()
    for choice in json.loads(data).get("choices", []):
        found |= set(choice.get("token_ids") or [])
        for top in (choice.get("logprobs") or {}).get("top_logprobs") or []:
            found |= {int(token.removeprefix("token_id:")) for token in top or {}}
    return found


if __name__ == "__main__":
    main()
