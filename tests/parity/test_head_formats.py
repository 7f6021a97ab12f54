"""Heads that others wrote, loaded and run, against their logits computed plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.draft.base import DraftHead
from core.draft.folder import load_head
from tests import checkpoints
from tests.checkpoints import CONFIG, HIDDEN, VOCAB

TOKENS = 9


@pytest.fixture(scope="module")
def target() -> tuple[Tensor, Tensor]:
    """Embedding and output head."""
    draw = torch.Generator().manual_seed(100)
    embedding_VH = torch.randn(VOCAB, HIDDEN, generator=draw)
    return embedding_VH, torch.randn(VOCAB, HIDDEN, generator=draw)


def _inputs(layers: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(101)
    features_TLH = torch.randn(TOKENS, layers, HIDDEN, generator=draw)
    return features_TLH, torch.randint(VOCAB, (TOKENS,), generator=draw)


def _logits(head: DraftHead, target: tuple[Tensor, Tensor], features_TLH: Tensor, ids_T: Tensor):
    """Of every position, each read by itself after those before it."""
    head.attach_target(*target)
    head.prepare_for_inference(packed=False)
    cache, rows = head.new_cache(TOKENS), []
    with torch.inference_mode():
        for i in range(TOKENS):
            rows.append(head.extend(cache, features_TLH[i : i + 1], ids_T[i : i + 1]).logits_KW)
        cache.committed = cache.length = 0
        together = head.extend(cache, features_TLH, ids_T).logits_KW
    torch.testing.assert_close(together, rows[-1], atol=1e-4, rtol=1e-4)
    return torch.cat(rows)


def _close(ours: Tensor, direct: Tensor) -> None:
    assert direct.std() > 0.1, "logits that differ, or nothing would be shown"
    torch.testing.assert_close(ours, direct, atol=1e-4, rtol=1e-4)


EAGLE1: dict[str, tuple[dict[str, Any], bool]] = {
    "official": ({}, True),
    "sglang": ({"architectures": ["LlamaForCausalLMEagle"], "bias": False}, False),
    "vllm": ({"architectures": ["EagleLlamaForCausalLM"]}, False),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("engine", EAGLE1)
def test_eagle1_logits(
    tmp_path: Path, target: tuple[Tensor, Tensor], engine: str, bias: bool
) -> None:
    weights = checkpoints.eagle1(bias=bias)
    changes, pickled = EAGLE1[engine]
    held = {**weights, "embed_tokens.weight": target[0]} if engine == "official" else weights
    folder = checkpoints.write(tmp_path / "head", {**CONFIG, **changes}, held, pickled=pickled)
    head = load_head(folder)
    features_TLH, ids_T = _inputs(1)
    direct = checkpoints.eagle1_logits(weights, *target, features_TLH[:, -1], ids_T)
    _close(_logits(head, target, features_TLH, ids_T), direct)
