"""What vLLM was recorded to answer, and how a replica is put in front of what repeats it."""

from __future__ import annotations

import json
import stat
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from core.config import Config
from tests.vllm_stand_in import RECORDED

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
VOCAB = 49152


@cache
def recorded() -> dict[str, Any]:
    """The file as it is."""
    content: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return content


def streams(name: str) -> list[dict[str, Any]]:
    """Of a recording, a stream a choice."""
    return [stream for stream in recorded()["streams"] if stream["name"] == name]


def tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's, of the tokens that occur: a byte-level decoder over its own pieces."""
    pieces = {text: int(token) for token, text in recorded()["tokens"].items()}
    special = {text: int(token) for token, text in recorded()["special"].items()}
    made = Tokenizer(models.WordLevel({**pieces, **special}, unk_token="<|endoftext|>"))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def target_folder(folder: Path) -> Path:
    """A target's folder without weights, which only vLLM would read."""
    folder.mkdir(parents=True)
    tokenizer().save_pretrained(folder)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stand_in(folder: Path) -> str:
    """A program that `serve.vllm_python` may name."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def stand_in_config(folder: Path, *arguments: str) -> Config:
    """A configuration whose replicas start a stand-in."""
    return Config().replace(
        target={"path": str(target_folder(folder / "target")), "dtype": "float32"},
        decode={"batch_size": 2, "max_waiting": 2},
        serve={
            "backend": "vllm",
            "vllm_python": stand_in(folder),
            "vllm_arguments": arguments,
            "vllm_start_s": 60.0,
        },
    )
