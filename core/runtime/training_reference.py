"""EAGLE's own training step, written out plainly: what the benchmark `training` compares with.

A padded batch in the order of the data, attention written out with a mask and a softmax in
float32, the full vocabulary's output head at every position, losses masked afterwards, and the
same accuracies each step. Half precision is autocast over float32 weights, as Accelerate's
`mixed_precision` does. Where it differs, so that the losses can be compared: gradients are clipped
by norm instead of by value, a loss is the mean over supervised positions (EAGLE-3's averages over
padding too), and rotary positions have the target's base.
EAGLE-1: `eagle/train/main.py`, `eagle/model/cnets1.py`; EAGLE-3: `eagle/traineagle3/cnets.py`,
without the target's own pass, which it makes in every step, and without recomputing activations.
Shapes: B batch, T tokens, H hidden, A attention heads, E head dimension, V target vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.draft.base import DraftBatch
from core.draft.eagle1 import Eagle1Head
from core.draft.layer import rotate

TINY = torch.finfo(torch.float32).min


def eagle1_reference_loss(
    head: Eagle1Head, embedding_VH: Tensor, output_head_VH: Tensor, batch: DraftBatch
) -> Tensor:
    """The mean loss of a padded batch; differentiable in the head's weights."""
    # `CustomDataset`: everything is shifted by one and filled up with zeros.
    features_BTH = batch.features_BTLH[:, :, -1].float()
    inputs_BTH = features_BTH
    if batch.noise_BTLH is not None:
        inputs_BTH = features_BTH + batch.noise_BTLH[:, :, -1].float()
    target_BTH = F.pad(features_BTH[:, 1:], (0, 0, 0, 1))
    ids_BT = F.pad(batch.input_ids_BT[:, 1:], (0, 1))
    real_BT = _real(batch)
    mask_BT = batch.loss_mask_BT & F.pad(real_BT[:, 1:], (0, 1))

    predict_BTH = _model(head, inputs_BTH, F.embedding(ids_BT, embedding_VH), real_BT)
    with torch.no_grad():
        target_logits_BTV = F.linear(target_BTH, output_head_VH)
        target_probs_BTV = target_logits_BTV.softmax(dim=2)
    mask_BT1 = mask_BT[:, :, None].float()
    logits_BTV = F.linear(predict_BTH, output_head_VH)
    weighted = target_probs_BTV * logits_BTV.log_softmax(dim=2)
    token_loss = -(mask_BT1 * weighted).sum(2).sum() / (mask_BT.sum() + 1e-5)
    feature_loss = F.smooth_l1_loss(predict_BTH, target_BTH, reduction="none")
    feature_loss = (mask_BT1 * feature_loss).mean(2).sum() / (mask_BT.sum() + 1e-5)
    _accuracies(logits_BTV.detach(), target_logits_BTV, mask_BT)
    feature_weight, token_weight = head.loss_weights
    return feature_weight * feature_loss + token_weight * token_loss


def _model(head: Eagle1Head, inputs_BTH: Tensor, embedded_BTH: Tensor, real_BT: Tensor) -> Tensor:
    """`cnets1.Model.forward` without a cache, gradient checkpointing off."""
    hidden = head.fc(torch.cat((embedded_BTH, inputs_BTH), dim=-1))
    layer = head.layer
    attention = layer.self_attn
    batch, tokens, _ = hidden.shape
    mask_B1TT = _attention_mask(real_BT)
    query, key, value = (
        project(hidden).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = head.rotary(torch.arange(tokens))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    groups = attention.num_heads // attention.num_kv_heads
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) / math.sqrt(attention.head_dim) + mask_B1TT
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = (weights @ value).transpose(1, 2).reshape(batch, tokens, -1)
    hidden = hidden + attention.o_proj(out)
    result: Tensor = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
    return result


def _real(batch: DraftBatch) -> Tensor:
    return torch.arange(batch.input_ids_BT.shape[1])[None] < batch.lengths_B[:, None]


def _attention_mask(real_BT: Tensor) -> Tensor:
    """`_prepare_decoder_attention_mask`: causal, padding hidden; added to the scores."""
    tokens = real_BT.shape[1]
    sees = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None] & real_BT[:, None, :]
    return torch.zeros(sees.shape).masked_fill(~sees, TINY)[:, None]


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """`LlamaRMSNorm`: in float32, back in the input's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (norm.eps or 0.0))
    return norm.weight * wide.to(x.dtype)


@torch.no_grad()
def _accuracies(logits_BTV: Tensor, target_logits_BTV: Tensor, mask_BT: Tensor) -> list[float]:
    """Top-1, and top-1 to 3 by `top_accuracy`, as every step of the reference logs them."""
    predicted_BT, wanted_BT = logits_BTV.argmax(2), target_logits_BTV.argmax(2)
    correct = ((predicted_BT == wanted_BT) * mask_BT).sum().item()
    size = logits_BTV.shape[-1]
    top = logits_BTV.view(-1, size)[mask_BT.view(-1)].topk(3, 1).indices
    hits = top == wanted_BT.view(-1)[mask_BT.view(-1), None]
    return [correct, *(hits[:, :n].sum().item() for n in (1, 2, 3))]


def eagle3_reference_loss(
    head: Any, embedding_VH: Tensor, output_head_VH: Tensor, batch: DraftBatch
) -> Tensor:
    """The weighted sum of the unrolled steps' mean losses; differentiable in the head's weights."""
    features_BTLH = batch.features_BTLH.float()
    real_BT = _real(batch)
    with torch.no_grad():
        target_BTV = _shifted(F.linear(features_BTLH[:, :, -1], output_head_VH))
        drafted_V = head.vocabulary.t2d_V >= 0
    ids_BT, mask_BT = _shifted(batch.input_ids_BT), batch.loss_mask_BT & _shifted(real_BT)
    supervised = mask_BT.sum()
    hidden_BTH = head.fc(features_BTLH[:, :, :-1].flatten(2))
    mask_B1TT = _attention_mask(real_BT)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    total = torch.zeros(())
    for step in range(head.config.num_ttt_steps):
        layer = head.midlayer
        embedded = F.embedding(ids_BT, embedding_VH)
        both = torch.cat(
            (_norm(layer.input_layernorm, embedded), _norm(layer.hidden_norm, hidden_BTH)), -1
        )
        hidden_BTH = hidden_BTH + _unrolled_attention(head, both, mask_B1TT, keys, values)
        hidden_BTH = hidden_BTH + layer.mlp(_norm(layer.post_attention_layernorm, hidden_BTH))
        with torch.no_grad():
            inside_BT = drafted_V[target_BTV.argmax(-1)]
            probs_BTW = target_BTV[..., drafted_V].float().softmax(2)
        logits_BTW = head.lm_head(_norm(head.norm, hidden_BTH)).float()
        weighted = probs_BTW * logits_BTW.log_softmax(2)
        position_BT1 = (inside_BT & mask_BT)[:, :, None].int()
        loss = -(position_BT1 * weighted).sum(2).sum() / supervised
        total = total + head.config.step_decay**step * loss
        with torch.no_grad():
            right = (logits_BTW.argmax(-1) == probs_BTW.argmax(-1)) * position_BT1[..., 0]
            _ = right.sum().item() / (mask_BT.sum().item() + 1e-6)
        ids_BT, target_BTV, mask_BT = (_shifted(x) for x in (ids_BT, target_BTV, mask_BT))
    return total


def _unrolled_attention(
    head: Any, both: Tensor, mask_B1TT: Tensor, keys: list[Tensor], values: list[Tensor]
) -> Tensor:
    """All keys of the first step that the mask shows, and each later step's at the same place."""
    attention = head.midlayer.self_attn
    batch, tokens, _ = both.shape
    query, key, value = (
        project(both).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = head.rotary(torch.arange(tokens) + len(keys))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    groups = attention.num_heads // attention.num_kv_heads
    keys.append(key.repeat_interleave(groups, 1))
    values.append(value.repeat_interleave(groups, 1))
    root = math.sqrt(attention.head_dim)
    scores = query @ keys[0].transpose(2, 3) / root + mask_B1TT
    for later in keys[1:]:
        scores = torch.cat((scores, ((query * later).sum(-1) / root)[..., None]), -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = weights[..., :tokens] @ values[0]
    for number, later in enumerate(values[1:]):
        out = out + weights[..., tokens + number, None] * later
    result: Tensor = attention.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
    return result


def _shifted(x_BT: Tensor) -> Tensor:
    """`padding(…, left=False)`: one to the left, zeros behind."""
    return torch.cat((x_BT[:, 1:], torch.zeros_like(x_BT[:, :1])), dim=1)
