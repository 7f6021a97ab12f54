"""Heads that others wrote, loaded and run, against their logits computed plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config import Config
from core.decode.load import prepare_head
from core.draft.base import DraftHead
from core.draft.folder import load_head
from core.models.target import Target
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
        cache.committed = 0
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


@pytest.mark.parametrize("engine", ["eagle", "sglang"])
def test_eagle1_logits_with_qwens_biases(
    tmp_path: Path, target: tuple[Tensor, Tensor], engine: str
) -> None:
    weights = checkpoints.eagle1(qkv_bias=True)
    config = {**CONFIG, "qkv_bias": True}
    if engine == "sglang":
        config |= {"architectures": ["Qwen2ForCausalLMEagle"], "model_type": "qwen2"}
    head = load_head(checkpoints.write(tmp_path / "head", config, weights))
    features_TLH, ids_T = _inputs(1)
    direct = checkpoints.eagle1_logits(weights, *target, features_TLH[:, -1], ids_T)
    _close(_logits(head, target, features_TLH, ids_T), direct)


EAGLE3: dict[str, tuple[dict[str, Any], str, bool]] = {
    "official": ({**CONFIG, "draft_vocab_size": 40}, "midlayer", True),
    "specforge": (
        {**CONFIG, "draft_vocab_size": 40, "architectures": ["LlamaForCausalLMEagle3"]},
        "midlayer",
        False,
    ),
    "vllm": (
        {**CONFIG, "draft_vocab_size": 40, "architectures": ["Eagle3LlamaForCausalLM"]},
        "layers.0",
        False,
    ),
    "speculators": (checkpoints.speculators_config(), "layers.0", False),
}


@pytest.mark.parametrize("engine", EAGLE3)
def test_eagle3_logits(tmp_path: Path, target: tuple[Tensor, Tensor], engine: str) -> None:
    config, layer, pickled = EAGLE3[engine]
    weights = checkpoints.eagle3(layer=layer)
    head = load_head(checkpoints.write(tmp_path / "head", config, weights, pickled=pickled))
    features_TLH, ids_T = _inputs(4)
    states_TLH = features_TLH[:, :3]
    direct = checkpoints.eagle3_logits(weights, target[0], states_TLH, ids_T, layer=layer)
    _close(_logits(head, target, features_TLH, ids_T), direct)
    marked = weights["t2d"].nonzero()[:, 0]
    assert torch.equal(head.vocabulary.d2t_W, marked), "draft ids are in the order of the rows"


@pytest.mark.parametrize("engine", ["vllm", "speculators"])
def test_eagle3_logits_where_the_residual_is_normed(
    tmp_path: Path, target: tuple[Tensor, Tensor], engine: str
) -> None:
    config, layer, _ = EAGLE3[engine]
    config = {**config, "norm_before_residual": True}
    weights = checkpoints.eagle3(layer=layer)
    head = load_head(checkpoints.write(tmp_path / "head", config, weights))
    features_TLH, ids_T = _inputs(4)
    states_TLH = features_TLH[:, :3]
    ours = _logits(head, target, features_TLH, ids_T)
    for normed in (True, False):
        direct = checkpoints.eagle3_logits(
            weights, target[0], states_TLH, ids_T, layer=layer, norm_before_residual=normed
        )
        if normed:
            _close(ours, direct)
        else:
            assert (ours - direct).abs().max() > 0.1, "the two are different heads"


def test_an_embedding_of_the_heads_own_is_used(
    tmp_path: Path, tiny_target_folder: Path, tiny_target: Target
) -> None:
    """As speculators trains them where it is told to."""
    weights = checkpoints.eagle3(layer="layers.0")
    own_VH = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    held = {**weights, "embed_tokens.weight": own_VH}
    folder = checkpoints.write(tmp_path / "head", checkpoints.speculators_config(), held)
    head = load_head(folder, target_config=tiny_target.model.config)
    config = Config().replace(target={"path": str(tiny_target_folder), "pack_linear": False})
    prepare_head(head, config, tiny_target)
    features_TLH, ids_T = _inputs(4)
    direct = checkpoints.eagle3_logits(
        weights, own_VH, features_TLH[:, :3], ids_T, layer="layers.0"
    )
    with torch.inference_mode():
        logits_1W = head.extend(head.new_cache(TOKENS), features_TLH, ids_T).logits_KW
    _close(logits_1W, direct[-1:])
