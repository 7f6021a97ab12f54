"""The pass in few operators, against the unmodified model with a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from core.config import TargetConfig
from core.decode.forward import Piece, target_pass
from core.decode.rows import RowCache
from core.decode.tree import DraftTree
from core.models.ragged import use_ragged_attention
from core.models.target import Target, load_target
from core.models.tiny import byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FUSED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3": lambda: LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "vicuna": lambda: LlamaConfig(**{**COMMON, "num_key_value_heads": 4}),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen-2": lambda: Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen-3": lambda: Qwen3Config(**COMMON, head_dim=16),
}
OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    # Made of the same parts, but residuals and attention have factors of their own.
    "granite-residual": lambda: GraniteConfig(**COMMON, residual_multiplier=0.5),
    "granite-embedding": lambda: GraniteConfig(**COMMON, embedding_multiplier=3.0),
}
TREE = DraftTree(torch.tensor([7, 11, 12, 13, 14, 15]), (-1, 0, 0, 1, 1, 2), tuple(range(6)))
LAYERS = (2, 3, 7)
# Sums of 32 to 64 products in another order, through seven layers. bfloat16 rounds at other
# places, 2⁻⁸ each time: 1% of a layer's state (see core.models.fused), which seven may add up.
TOLERANCE = {"float32": 4e-5, "bfloat16": 0.07}


def _load(config: PretrainedConfig, folder: Path, **target: Any) -> Target:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Norms and biases begin as ones and zeros, which would hide a mistake.
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_target(TargetConfig(path=str(folder), **target), num_threads=1)


def _passes(target: Target, *, dense: bool) -> list[torch.Tensor]:
    """Prompts of two sequences, then a tree, a prompt's part and a plain step in one pass."""
    use_ragged_attention(target.model)
    cache = RowCache(target.model.config, 64, 64)
    prompts = [Piece.of_text(30, 0, range(40, 52), 1), Piece.of_text(4, 0, [1, 9, 77], 0)]
    pieces = [
        Piece.of_tree(4, 3, TREE),
        Piece.of_text(50, 0, [1, 200, 201, 202], 2),
        Piece.of_tree(30, 12, DraftTree.root_only(9)),
    ]
    single = [Piece.of_tree(4, 3, DraftTree.root_only(8))]
    found = [
        part
        for some in (prompts, pieces, single)
        for part in target_pass(target, cache, some, LAYERS, dense=dense)
    ]
    return [tensor.float() for features, logits in found for tensor in (features, logits)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", FUSED)
def test_features_and_logits_are_the_models_own(name: str, dtype: str, tmp_path: Path) -> None:
    target = _load(FUSED[name](), tmp_path, dtype=dtype)
    assert target.fused is not None
    found, wanted = _passes(target, dense=False), _passes(target, dense=True)
    plain = _passes(replace(target, fused=None), dense=False)
    for mine, other, hf in zip(found, plain, wanted, strict=True):
        assert mine.shape == hf.shape
        if hf.numel():
            scale = float(hf.abs().max()) if dtype == "bfloat16" else 1.0
            torch.testing.assert_close(mine, hf, rtol=0, atol=TOLERANCE[dtype] * scale)
            torch.testing.assert_close(other, hf, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_computes_something_else_keeps_its_own_pass(name: str, tmp_path: Path) -> None:
    assert _load(OTHERS[name](), tmp_path, dtype="float32").fused is None


def test_a_factor_of_one_is_no_difference(tmp_path: Path) -> None:
    """So that it is the factor that the two above are told by."""
    config = GraniteConfig(**COMMON, attention_multiplier=8**-0.5)
    assert _load(config, tmp_path, dtype="float32").fused is not None


def test_plain_layers_keep_the_models_own_pass(tmp_path: Path) -> None:
    target = _load(FUSED["llama-3"](), tmp_path, dtype="float32", pack_linear=False)
    assert target.fused is None
