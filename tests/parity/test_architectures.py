"""Draft heads for targets of many architectures: built, trained a step, and lossless.

Sizes are tiny, proportions those of the real models: grouped queries or not, heads wider than
hidden / heads (Qwen-3), biases (Qwen-2), experts (Mixtral), tied embeddings, and models that are
no Llama at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from core.config import DRAFT_CONFIGS, DecodeConfig, TargetConfig
from core.decode.batch_policy import BatchPolicy
from core.decode.costs import BatchCosts, CostModel
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.tree import PLAIN, TreePlan
from core.draft.base import DraftBatch, TargetGeometry, build_head
from core.draft.folder import load_head, save_head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target, load_target
from core.models.tiny import byte_tokenizer
from core.models.weights import load_embedding, load_output_head
from tests.oracle import OracleDrafter, hf_greedy

COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide, or every next token would be nearly equally likely.
    "initializer_range": 0.2,
}
ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3": lambda: LlamaConfig(
        **COMMON,
        intermediate_size=64,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "vicuna": lambda: LlamaConfig(**COMMON, intermediate_size=48),
    "mixtral": lambda: MixtralConfig(
        **COMMON, intermediate_size=24, num_key_value_heads=2, num_local_experts=4
    ),
    "qwen-2": lambda: Qwen2Config(
        **COMMON, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen-3": lambda: Qwen3Config(
        **COMMON, intermediate_size=64, num_key_value_heads=2, head_dim=16
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**COMMON, intermediate_size=64),
    "gpt-2": lambda: GPT2Config(
        **{k: v for k, v in COMMON.items() if k != "max_position_embeddings"}, n_positions=256
    ),
}
PROMPTS = ([1, 40, 41, 99, 7], [1, *range(30, 90, 3)])
NEW_TOKENS = 10


@pytest.fixture(scope="module", params=ARCHITECTURES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A target of an architecture, and its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]())
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    loaded = load_target(TargetConfig(path=str(folder), dtype="float32"), num_threads=1)
    return request.param, loaded, folder


def _batch(target: Target, layers: tuple[int, ...]) -> DraftBatch:
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, 259, (2, 24), generator=draw)
    lengths_B = torch.tensor([24, 15])
    is_token = torch.arange(24)[None] < lengths_B[:, None]
    features_BTLH = torch.stack(target.layer_features(ids_BT, None, layers), dim=2).clone()
    return DraftBatch(ids_BT, features_BTLH, is_token & (torch.arange(24)[None] > 6), lengths_B)


@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_a_head_is_built_trained_saved_and_lossless(target, kind: str, tmp_path: Path) -> None:
    name, model, folder = target
    geometry = TargetGeometry.of(model.model.config)
    config = DRAFT_CONFIGS[kind].model_validate({"qkv_bias": name == "qwen-2"})
    counts_V = torch.arange(geometry.vocab_size) * 7919 % 259
    head = build_head(config, geometry, DraftVocabulary.from_counts(counts_V, 200))
    head.attach_target(load_embedding(folder), load_output_head(folder))
    layers = head.feature_layers(model.num_layers)
    batch = _batch(model, layers)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    result = head.losses(batch)
    (result.loss / result.num_tokens).backward()
    assert bool(torch.isfinite(result.loss)) and int(result.num_tokens) > 10
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    optimizer.step()
    after = head.losses(batch)
    assert bool(torch.isfinite(after.loss)) and bool(after.loss < result.loss)

    save_head(tmp_path / "head", head, {"feature_layers": list(layers)})
    head = load_head(tmp_path / "head")
    head.attach_target(load_embedding(folder), load_output_head(folder))
    head.prepare_for_inference(packed=True)
    assert head.feature_layers(model.num_layers) == layers
    decoder = SpeculativeDecoder(model, head, DecodeConfig(max_context=128))
    for prompt in PROMPTS:
        rounds = decoder.generate(prompt, max_new_tokens=NEW_TOKENS, plan=TreePlan(20, 3, 4))
        found = tuple(token for done in rounds for token in done.tokens)
        assert found == hf_greedy(model, prompt, NEW_TOKENS)


def test_a_batch_of_oracle_drafts_is_lossless(target) -> None:
    """Fixed trees, trees that are chosen each round, and plain decoding side by side."""
    _, model, _ = target
    prompts = [(1, 40 + number, *range(60, 60 + 7 * number, 3)) for number in range(8)]
    count = 16
    answers = {prompt: hf_greedy(model, prompt, count) for prompt in prompts}
    drafter = OracleDrafter(
        {prompt: (*answer, *(3,) * 8) for prompt, answer in answers.items()}, 259, skill=0.7
    )
    config = DecodeConfig(max_context=128, cache_tokens=300, batch_size=5, prefill_chunk=16)
    decoder = SpeculativeDecoder(model, None, config, drafter=drafter)
    costs = BatchCosts({1: 1.0, 32: 1.2}, 0.05, {1: 0.1}, {1: 0.05})
    decoder.policy = BatchPolicy(CostModel(costs), TreePlan(10, 4, 3))
    plans = (TreePlan(12, 5, 4), None, TreePlan(4, 2, 2), PLAIN)
    numbers = {
        decoder.submit(Request(prompt, count, plan=plans[place % len(plans)])): prompt
        for place, prompt in enumerate(prompts)
    }
    found: dict[int, list[int]] = {number: [] for number in numbers}
    accepted = 0
    while decoder.busy:
        for event in decoder.step():
            found[event.request_id] += event.round.tokens
            accepted += len(event.round.ranks)
    assert {numbers[number]: tuple(text) for number, text in found.items()} == answers
    assert accepted > 20, "too few accepted paths to show anything"


def test_the_geometry_is_the_architectures(target) -> None:
    name, model, _ = target
    geometry = TargetGeometry.of(model.model.config)
    wanted = {
        "llama-3": (64, 2, 8, 5e5),
        "vicuna": (48, 4, 8, 1e4),
        # Of one expert: the head's layer is dense.
        "mixtral": (24, 2, 8, 1e6),
        "qwen-2": (64, 2, 8, 1e4),
        "qwen-3": (64, 2, 16, 1e4),
        "gpt-neox": (64, 4, 8, 1e4),
        "gpt-2": (128, 4, 8, 1e4),
    }[name]
    found = (
        geometry.intermediate_size,
        geometry.num_key_value_heads,
        geometry.head_dim,
        geometry.rope_theta,
    )
    assert found == wanted


def test_a_width_of_ones_own() -> None:
    geometry = TargetGeometry.of(ARCHITECTURES["mixtral"]())
    config = DRAFT_CONFIGS["eagle3"].model_validate({"intermediate_size": 96})
    head = build_head(config, geometry, DraftVocabulary.whole(259))
    assert head.state_dict()["midlayer.mlp.up_proj.weight"].shape == (96, 32)
    assert head.geometry.intermediate_size == 96
