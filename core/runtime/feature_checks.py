"""Looks at a feature folder: a few examples, or whether everything in it is right.

Shapes: T tokens, L feature layers, H hidden.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.config import Config
from core.data import groupwise
from core.data.examples import SPLITS, Example, example_shards, read_examples
from core.data.feature_manifest import Manifest, read_manifest
from core.data.feature_shards import FeatureDataset, discard_shard, verify_shard
from core.errors import ConfigError, InputError, MismatchError
from core.models.features import batch_features
from core.models.target import Target, load_target
from core.progress import Progress, say
from core.runtime.extraction import STAGE, extraction_inputs

SAMPLED_EXAMPLES = 4


def inspect_features(config: Config, count: int) -> None:
    """Print shapes and norms of the first examples of each split."""
    folder = feature_folder(config)
    manifest = read_manifest(folder)
    say(STAGE, f"{folder}: target {manifest.target[:12]}, layers {manifest.feature_layers}")
    for split, stems in manifest.shards.items():
        if not stems:
            continue
        dataset = FeatureDataset(folder, split)
        say(STAGE, f"{split}: {len(dataset)} examples, {dataset.num_tokens:,} tokens")
        for index in range(min(count, len(dataset))):
            example = dataset[index]
            norms_TL = example.features.float().norm(dim=-1)
            say(
                STAGE,
                f"  {index}: {len(example.input_ids)} tokens, {int(example.loss_mask.sum())} "
                f"supervised, features {list(example.features.shape)} {example.features.dtype}, "
                f"norm {norms_TL.mean():.2f} ({norms_TL.min():.2f} to {norms_TL.max():.2f})",
            )


def verify_features(config: Config, _: int) -> None:
    """Check every shard's checksum, then a few examples against a fresh pass of the target.

    Damaged shards lose their finished mark, so that the next run computes them anew.

    Raises:
        InputError: a shard is damaged or holds other features than the target gives.
        MismatchError: the folder's features come from another target.
    """
    folder = feature_folder(config)
    manifest = read_manifest(folder)
    _verify_checksums(folder, manifest)
    target = load_target(config.target)
    if target.fingerprint != manifest.target:
        raise MismatchError(
            f"{folder}: its features come from the target {manifest.target[:12]}, target.path="
            f"{config.target.path} is {target.fingerprint[:12]}; set target.path to the former"
        )
    _verify_samples(config, folder, target)


def feature_folder(config: Config) -> Path:
    """`features.path`, or where this job writes."""
    path = config.features.path or config.output
    if path is None:
        raise ConfigError("neither features.path nor output is set; give the feature folder")
    return Path(path).expanduser()


def tolerance(
    stored: torch.dtype, computed: torch.dtype, num_layers: int, hidden_size: int
) -> float:
    """Largest mean relative error of an example's feature vectors that rounding explains.

    A batch of another shape, or another device, adds in another order. Each of a layer's two
    additions to the residual stream then differs by a rounding to the computed dtype, and by
    that of a sum of about `hidden_size` products, which is kept in float32. Such errors are
    independent and grow with the square root of their number. To this comes the rounding to the
    stored dtype; in int8 half a step, of which a group's largest value has 127, for each of a
    group's 64 values: at most sqrt(64) / 2 / 127 of the group's length, and a step is stored
    rounded up by up to 1/128. Measured, of what is allowed: bfloat16 against float32, 30 layers,
    0.016 of 0.064; float32 in batches of two shapes, 2 layers of large weights, 3e-7 of 2e-6.
    Features of another layer or model differ by about 1.
    """
    sums = torch.finfo(torch.float32).eps * math.sqrt(hidden_size)
    one_addition = torch.finfo(computed).eps + sums
    if stored == torch.int8:
        storing = math.sqrt(groupwise.GROUP) / 2 / groupwise.LARGEST * (1 + 1 / 128)
    else:
        storing = torch.finfo(stored).eps / 2
    return storing + one_addition * math.sqrt(2 * num_layers)


def relative_errors(stored_TLH: Tensor, fresh_TLH: Tensor) -> Tensor:
    """The length of the difference over that of the fresh vector: float [T, L].

    A padding token's embedding is zero in some models, and zero is as it should be then.
    """
    fresh = fresh_TLH.float()
    lengths_TL = fresh.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors_TL: Tensor = (stored_TLH.float() - fresh).norm(dim=-1) / lengths_TL
    return errors_TL


def _verify_checksums(folder: Path, manifest: Manifest) -> None:
    shards = [
        folder / split / f"{stem}.safetensors"
        for split, stems in manifest.shards.items()
        for stem in stems
    ]
    damaged = []
    with Progress(STAGE, total=len(shards), unit="checksums") as progress:
        for shard in shards:
            try:
                verify_shard(shard, manifest)
            except InputError:
                damaged.append(str(shard))
                discard_shard(shard)
            progress.advance()
    if damaged:
        (folder / "report.json").unlink(missing_ok=True)
        raise InputError(
            f"damaged or unfinished: {', '.join(damaged)}; run extract_features with the same "
            "output: it computes these alone again"
        )


def _verify_samples(config: Config, folder: Path, target: Target) -> None:
    sources = extraction_inputs(config)["data.examples"]
    for split in SPLITS:
        shards = example_shards(sources, split)
        if not shards:
            continue
        dataset = FeatureDataset(folder, split)
        for index in _spread(len(dataset), SAMPLED_EXAMPLES):
            error, allowed = _compare(dataset, index, _example(shards, index), target)
            where = f"{folder}/{split}, example {index}"
            if not error <= allowed:
                raise InputError(
                    f"{where}: mean relative error {error:.2g} against a fresh pass, rounding "
                    f"explains {allowed:.2g}; were they made with other target settings? Run "
                    "extract_features again with overwrite=true"
                )
            say(STAGE, f"{split} {index}: mean relative error {error:.2g} (at most {allowed:.2g})")


def _compare(
    dataset: FeatureDataset, index: int, example: Example, target: Target
) -> tuple[float, float]:
    stored = dataset[index]
    if not np.array_equal(stored.input_ids.numpy(), example.input_ids_T):
        raise InputError(
            f"{dataset.folder}/{dataset.split}: example {index} is not that of data.examples; "
            "set data.examples to the folder that the features were made from"
        )
    fresh_TLH = batch_features(target, [example], dataset.manifest.feature_layers)[0]
    # Of the layer that is worst.
    error = relative_errors(stored.features, fresh_TLH).mean(0).max().item()
    stored_dtype = getattr(torch, dataset.manifest.dtype)
    return error, tolerance(stored_dtype, target.dtype, target.num_layers, target.hidden_size)


def _example(shards: list[Path], index: int) -> Example:
    for shard in shards:
        examples = read_examples(shard)
        if index < len(examples):
            return examples[index]
        index -= len(examples)
    raise InputError(f"{shards[0].parent}: fewer examples than there are features")


def _spread(total: int, count: int) -> list[int]:
    """`count` indices from the first to the last."""
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})
