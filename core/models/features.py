"""Features of a batch or of a whole shard of examples; the loop that a replica runs.

Shapes: B batch, T tokens, L feature layers, H hidden, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.config import DraftConfig, TargetConfig
from core.data.batches import pad_right, plan_batches
from core.data.examples import Example
from core.data.feature_manifest import INT8, Manifest
from core.data.feature_shards import ShardRecord, TopLogits, write_feature_shard
from core.errors import ConfigError, InputError
from core.models.attention import use_block_attention
from core.models.target import Target, load_target

# Logits of a vocabulary are many: so many are held at a time, 64 MB of float32.
LOGITS_AT_ONCE = 2**24


def feature_layers(
    layers: Literal["final", "eagle3"] | Sequence[int], num_layers: int
) -> tuple[int, ...]:
    """The states to take, ascending, as indices into HF's `hidden_states`; the final one is last.

    EAGLE-3 reads what *enters* layers 2, L/2 and L-3, as vLLM's default does.

    Raises:
        ConfigError: a layer that the target does not have, or one named twice.
    """
    if layers == "final":
        return (num_layers,)
    ids = (2, num_layers // 2, num_layers - 3) if layers == "eagle3" else tuple(map(int, layers))
    if len(set(ids)) < len(ids) or not all(0 <= index <= num_layers for index in ids):
        named = f" ({', '.join(map(str, ids))})" if layers == "eagle3" else ""
        raise ConfigError(
            f"features.layers={layers if layers == 'eagle3' else list(ids)}{named}: give different "
            f"layers between 0 and {num_layers}, the target's number of layers, which stands for "
            "the final feature"
        )
    return (*sorted(set(ids) - {num_layers}), num_layers)


def check_layers(
    draft: DraftConfig,
    layers: Literal["final", "eagle3"] | Sequence[int],
    *,
    final_named: bool = False,
) -> None:
    """Refuse features that lack what a head reads, or have more than it can.

    Args:
        draft: the head's config.
        layers: `features.layers`, or the layers of a manifest.
        final_named: whether a list is sure to name the final feature, as a manifest's does.
    Raises:
        ConfigError: the number of layers beside the final feature is not the head's. A head that
            reads the final feature alone takes any.
    """
    if layers == "final":
        beside = {0}
    elif layers == "eagle3":
        beside = {3}
    else:
        beside = {len(layers) - 1} if final_named else {len(layers) - 1, len(layers)}
    if draft.num_aux_layers and draft.num_aux_layers not in beside:
        got = layers if isinstance(layers, str) else f"layers {list(layers)}"
        raise ConfigError(
            f"draft.kind={draft.kind} reads {draft.num_aux_layers} states of the target beside "
            f"its final feature, and these features are {got}; extract them with "
            "features.layers=eagle3, or train another draft.kind"
        )


def load_for_extraction(config: TargetConfig, num_threads: int) -> Target:
    """A target that reads whole sequences, on so many threads, as fast as it can here.

    By thousands of tokens, the plain product in float32 is faster than the packed one; the dtype
    decides, not what was timed, so that all replicas compute alike.
    """
    packed = config.pack_linear and config.dtype != "float32"
    settings = config.model_copy(update={"pack_linear": packed})
    target = load_target(settings, num_threads=num_threads)
    use_block_attention(target.model)
    return target


def extract_shard(
    target: Target, examples: Sequence[Example], shard: Path, manifest: Manifest, max_tokens: int
) -> ShardRecord:
    """Compute and write one feature shard.

    Args:
        target: whose features are taken.
        examples: of one example shard, in order.
        shard: path to write.
        manifest: of the folder.
        max_tokens: a target pass, padding included.
    Raises:
        InputError: an example is longer than the target takes, or the features overflow.
        ResourceError: the disk is full.
    """
    lengths = np.array([example.num_tokens for example in examples], dtype=np.int64)
    _check_longest(examples, target)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(offsets[-1])
    # int8 is made from what the target computes in.
    dtype = target.dtype if manifest.dtype == INT8 else getattr(torch, manifest.dtype)
    shape = (tokens, len(manifest.feature_layers), manifest.hidden_size)
    features_TLH = torch.empty(shape, dtype=dtype)
    top = _empty_top(tokens, manifest.top_logits)
    plan = plan_batches(lengths, max_tokens)
    for batch in plan.batches:
        states = _batch_states(
            target, [examples[index] for index in batch], manifest.feature_layers
        )
        for row, index in enumerate(batch):
            place = slice(int(offsets[index]), int(offsets[index + 1]))
            for layer, state_BTH in enumerate(states):
                features_TLH[place, layer] = state_BTH[row, : lengths[index]].to("cpu", dtype)
            if top is not None:
                found = top_log_probs(
                    target, states[-1][row, : lengths[index]], manifest.top_logits
                )
                top.ids_TK[place], top.log_probs_TK[place] = found.ids_TK, found.log_probs_TK
    _check_finite(features_TLH, target, shard)
    return write_feature_shard(
        shard,
        features_TLH=features_TLH,
        input_ids_T=torch.from_numpy(np.concatenate([e.input_ids_T for e in examples])),
        loss_mask_T=torch.from_numpy(np.concatenate([e.loss_mask_T for e in examples])),
        offsets=torch.from_numpy(offsets),
        padded_tokens=plan.padded_tokens,
        manifest=manifest,
        top=top,
    )


def batch_features(
    target: Target, examples: Sequence[Example], layers: Sequence[int] | None = None
) -> Tensor:
    """Features of examples padded at the right, on the CPU in the target's dtype.

    Args:
        target: whose features are taken.
        examples: of similar length.
        layers: as in a manifest; None for the final feature alone.
    Returns:
        [B, T, L, H].
    """
    wanted = (target.num_layers,) if layers is None else layers
    return torch.stack([state.cpu() for state in _batch_states(target, examples, wanted)], dim=2)


@torch.inference_mode()
def top_log_probs(target: Target, final_TH: Tensor, count: int) -> TopLogits:
    """The likeliest next tokens after each position, of its final feature [T, H]; on the CPU."""
    ids, log_probs = [], []
    for part_TH in final_TH.split(max(1, LOGITS_AT_ONCE // target.vocab_size)):
        logits_TV = target.logits(part_TH).float()
        best = logits_TV.topk(count, dim=-1)
        log_probs.append((best.values - logits_TV.logsumexp(-1, keepdim=True)).half().cpu())
        ids.append(best.indices.int().cpu())
    return TopLogits(torch.cat(ids), torch.cat(log_probs))


def _batch_states(
    target: Target, examples: Sequence[Example], layers: Sequence[int]
) -> list[Tensor]:
    """[B, T, H] for each layer, on the target's device; what stands on padding means nothing.

    There is no mask: padding is at the right, where causal attention does not look, and a dense
    mask would make attention half as dear again.
    """
    input_ids_BT, _ = pad_right([example.input_ids_T for example in examples])
    return target.layer_features(input_ids_BT, None, layers)


def _empty_top(tokens: int, count: int) -> TopLogits | None:
    if not count:
        return None
    return TopLogits(
        torch.empty(tokens, count, dtype=torch.int32),
        torch.empty(tokens, count, dtype=torch.float16),
    )


def _check_longest(examples: Sequence[Example], target: Target) -> None:
    longest = max(examples, key=lambda example: example.num_tokens)
    if longest.num_tokens > target.max_position:
        raise InputError(
            f"example {longest.id!r} has {longest.num_tokens} tokens, the target takes "
            f"{target.max_position}; run prepare_data with data.max_length={target.max_position}"
        )


def _check_finite(features_TLH: Tensor, target: Target, shard: Path) -> None:
    if not bool(torch.isfinite(features_TLH).all()):
        raise InputError(
            f"{shard}: some features are not finite; the target overflows "
            f"{str(target.dtype).removeprefix('torch.')}, set target.dtype=bfloat16 (or float32)"
        )
