"""Draft heads of random weights as other projects write them, and their logits computed plainly.

Nothing here uses Aerie's heads, so that what Aerie reads can be held against it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

VOCAB, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 259, 32, 64, 4, 2, 8
EPS, THETA = 1e-5, 10000.0
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
Weights = dict[str, Tensor]


def _layer(draw: torch.Generator, name: str, inputs: int) -> Weights:
    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) * columns**-0.5

    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        f"{name}.self_attn.q_proj.weight": matrix(query, inputs),
        f"{name}.self_attn.k_proj.weight": matrix(key, inputs),
        f"{name}.self_attn.v_proj.weight": matrix(key, inputs),
        f"{name}.self_attn.o_proj.weight": matrix(HIDDEN, query),
        f"{name}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
        f"{name}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
        f"{name}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        f"{name}.post_attention_layernorm.weight": torch.rand(HIDDEN, generator=draw) + 0.5,
    }


def eagle1(seed: int = 0, *, bias: bool = True, qkv_bias: bool = False) -> Weights:
    """EAGLE-1 by the official names, without the target's embedding."""
    draw = torch.Generator().manual_seed(seed)
    weights = {"fc.weight": torch.randn(HIDDEN, 2 * HIDDEN, generator=draw) * 0.2}
    if bias:
        weights["fc.bias"] = torch.randn(HIDDEN, generator=draw)
    weights |= _layer(draw, "layers.0", HIDDEN)
    if qkv_bias:
        for name, size in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            bias_of = f"layers.0.self_attn.{name}_proj.bias"
            weights[bias_of] = torch.randn(size * HEAD_DIM, generator=draw)
    return weights


def eagle3(seed: int = 0, *, draft_size: int = 40, layer: str = "midlayer") -> Weights:
    """EAGLE-3 by the official names; `layer` is `layers.0` in speculators' files."""
    draw = torch.Generator().manual_seed(seed)

    def norm() -> Tensor:
        return torch.rand(HIDDEN, generator=draw) + 0.5

    ids_W = torch.randperm(VOCAB, generator=draw)[:draft_size].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[ids_W] = True
    return {
        "fc.weight": torch.randn(HIDDEN, 3 * HIDDEN, generator=draw) * 0.15,
        **_layer(draw, layer, 2 * HIDDEN),
        f"{layer}.hidden_norm.weight": norm(),
        f"{layer}.input_layernorm.weight": norm(),
        "norm.weight": norm(),
        "lm_head.weight": torch.randn(draft_size, HIDDEN, generator=draw) * 0.3,
        "d2t": ids_W - torch.arange(draft_size),
        "t2d": t2d,
    }


def write(folder: Path, config: dict[str, Any], weights: Weights, *, pickled: bool = False) -> Path:
    """A folder as another project leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


def speculators_config(**changes: Any) -> dict[str, Any]:
    """`config.json` of a speculators EAGLE-3 head of these sizes."""
    layer = {k: v for k, v in CONFIG.items() if k not in ("architectures", "torch_dtype")}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": 40,
        "norm_before_residual": False,
        **changes,
    }


def eagle1_logits(
    weights: Weights, embedding_VH: Tensor, output_VH: Tensor, features_TH: Tensor, ids_T: Tensor
) -> Tensor:
    """Logits [T, V] after each of T pairs (feature, next token)."""
    x = torch.cat((embedding_VH[ids_T], features_TH), -1) @ weights["fc.weight"].T
    x = x + weights.get("fc.bias", torch.zeros(HIDDEN))
    return _block(weights, "layers.0", x, x) @ output_VH.T


def eagle3_logits(
    weights: Weights,
    embedding_VH: Tensor,
    states_TLH: Tensor,
    ids_T: Tensor,
    *,
    layer: str = "midlayer",
    norm_before_residual: bool = False,
) -> Tensor:
    """Logits [T, W] after each of T pairs (three states, next token)."""
    g = states_TLH.flatten(1) @ weights["fc.weight"].T
    embedded = _norm(embedding_VH[ids_T], weights[f"{layer}.input_layernorm.weight"])
    normed = _norm(g, weights[f"{layer}.hidden_norm.weight"])
    residual = normed if norm_before_residual else g
    x = _block(weights, layer, torch.cat((embedded, normed), -1), residual)
    return _norm(x, weights["norm.weight"]) @ weights["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def _block(weights: Weights, name: str, x: Tensor, residual: Tensor) -> Tensor:
    x = residual + _attention(weights, f"{name}.self_attn", x)
    normed = _norm(x, weights[f"{name}.post_attention_layernorm.weight"])
    gate = F.silu(normed @ weights[f"{name}.mlp.gate_proj.weight"].T)
    up = normed @ weights[f"{name}.mlp.up_proj.weight"].T
    return x + (gate * up) @ weights[f"{name}.mlp.down_proj.weight"].T


def _attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Position by position and head by head, as the formula is written."""

    def project(letter: str) -> Tensor:
        out = x @ weights[f"{name}.{letter}_proj.weight"].T
        return (out + weights.get(f"{name}.{letter}_proj.bias", 0.0)).view(len(x), -1, HEAD_DIM)

    query, key, value = project("q"), project("k"), project("v")
    rows = []
    for i in range(len(x)):
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            q = _rotated(query[i, head], i)
            scores = torch.stack([q @ _rotated(key[j, group], j) for j in range(i + 1)])
            heads.append((scores * HEAD_DIM**-0.5).softmax(-1) @ value[: i + 1, group])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights[f"{name}.o_proj.weight"].T


def _rotated(x: Tensor, position: int) -> Tensor:
    half = HEAD_DIM // 2
    angles = position * THETA ** -(torch.arange(half) / half)
    first, second = x[:half], x[half:]
    return torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        )
    )
