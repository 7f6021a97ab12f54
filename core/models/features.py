"""Features of a batch or of a whole shard of examples; the loop that a replica runs.

Shapes: B batch, T tokens, L feature layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.data.batches import pad_right, plan_batches
from core.data.examples import Example
from core.data.feature_shards import Manifest, ShardRecord, write_feature_shard
from core.errors import InputError
from core.models.target import Target


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
    """
    lengths = np.array([example.num_tokens for example in examples], dtype=np.int64)
    longest = max(examples, key=lambda example: example.num_tokens)
    if longest.num_tokens > target.max_position:
        raise InputError(
            f"example {longest.id!r} has {longest.num_tokens} tokens, the target takes "
            f"{target.max_position}; run prepare_data with data.max_length={target.max_position}"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    dtype = getattr(torch, manifest.dtype)
    shape = (int(offsets[-1]), len(manifest.feature_layers), manifest.hidden_size)
    features_TLH = torch.empty(shape, dtype=dtype)
    plan = plan_batches(lengths, max_tokens)
    for batch in plan.batches:
        found_BTH = batch_features(target, [examples[index] for index in batch])
        for row, index in enumerate(batch):
            begin, end = offsets[index], offsets[index + 1]
            features_TLH[begin:end, 0] = found_BTH[row, : lengths[index]].to(dtype)
    return write_feature_shard(
        shard,
        features_TLH=features_TLH,
        input_ids_T=torch.from_numpy(np.concatenate([e.input_ids_T for e in examples])),
        loss_mask_T=torch.from_numpy(np.concatenate([e.loss_mask_T for e in examples])),
        offsets=torch.from_numpy(offsets),
        padded_tokens=plan.padded_tokens,
        manifest=manifest,
    )


def batch_features(target: Target, examples: Sequence[Example]) -> Tensor:
    """Features [B, T, H] of examples padded at the right, on the CPU in the target's dtype."""
    input_ids_BT, mask_BT = pad_right([example.input_ids_T for example in examples])
    return target.features(input_ids_BT, mask_BT).cpu()
