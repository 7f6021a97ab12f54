"""Models of many architectures, tiny, with random weights, as a pipeline trains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide, or all logits would be nearly equal and gradients tiny.
    "initializer_range": 0.2,
}
LLAMA: dict[str, Any] = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
TINY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "bloom": lambda: BloomConfig(**_but_layers(), n_layer=3, n_head=4),
    "bloom-untied": lambda: BloomConfig(
        **_but_layers(), n_layer=3, n_head=4, tie_word_embeddings=False
    ),
    "mixtral": lambda: MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-tied": lambda: MixtralConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "qwen-2": lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen-3": lambda: Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=False),
    "qwen-3-tied": lambda: Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True),
    "gpt-2": lambda: GPT2Config(**COMMON, n_positions=64),
    "gpt-2-untied": lambda: GPT2Config(**COMMON, n_positions=64, tie_word_embeddings=False),
}


def _but_layers() -> dict[str, Any]:
    left_out = ("num_hidden_layers", "num_attention_heads")
    return {name: value for name, value in COMMON.items() if name not in left_out}


def save_tiny(folder: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """An HF folder of such a model; no norm or bias is left at one or zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
