"""Tiny models of the architectures that are fine-tuned, and examples for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from core.data.examples import Example, ExampleMetadata, write_examples
from core.data.template import template_hash, tokenizer_hash
from core.models.tiny import byte_tokenizer

VOCAB_SIZE = 64
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, **LLAMA_LIKE},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def save_tiny(folder: Path, architecture: str, *, tied: bool = False, **settings: Any) -> Path:
    """Write a model of random weights, large enough that tokens differ, and its tokenizer."""
    values = {**ARCHITECTURES[architecture], "vocab_size": len(byte_tokenizer())}
    values |= {"initializer_range": 0.1, **settings}
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.utils.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_examples(count: int, *, longest: int = 24, seed: int = 0) -> list[Example]:
    """Of random lengths from 6, each with two supervised spans."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(generator.integers(6, longest + 1))
        mask = np.zeros(length, dtype=np.uint8)
        mask[2:4] = mask[length // 2 :] = 1
        ids = generator.integers(3, VOCAB_SIZE, length).astype(np.int32)
        found.append(Example(f"example-{number}", ids, mask, "random", 2))
    return found


def write_tiny_examples(folder: Path, *, examples: int, held_out: int, longest: int = 24) -> Path:
    """A folder as prepare_data writes it, for models of `save_tiny`."""
    tokenizer = byte_tokenizer()
    hashes = tokenizer_hash(tokenizer), template_hash(tokenizer)
    for split, count in (("train", examples), ("held_out", held_out)):
        (folder / split).mkdir(parents=True)
        if count:
            metadata = ExampleMetadata(split, *hashes, longest, {})
            found = random_examples(count, longest=longest, seed=count)
            write_examples(folder / split / "shard-00000.parquet", found, metadata)
    return folder
