"""A tiny target and features of it, for tests of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from core.config import TargetConfig
from core.data.feature_manifest import Manifest
from core.data.feature_shards import FeatureDataset, write_feature_shard
from core.models.target import Target, load_target
from core.models.tiny import save_tiny_target
from core.train.batches import BatchMaker
from core.train.task import DraftTask

SHARD_EXAMPLES = 16


def batch_maker(task: DraftTask, *, held_out: bool = False) -> BatchMaker:
    """Makes a task's batches as its workers do."""
    selection = task.held_out if held_out else task.training
    assert selection is not None
    return BatchMaker(
        source=FeatureDataset(task.features, "held_out" if held_out else "train"),
        selection=selection,
        dtype=getattr(torch, task.config.train.dtype),
        device=torch.device("cpu"),
        noise=getattr(task.config.draft, "noise", 0.0),
        seed=task.config.train.seed,
    )


def write_tiny_features(
    folder: Path,
    *,
    examples: int,
    held_out: int = 0,
    longest: int = 40,
    seed: int = 0,
    dtype: str = "float32",
    layers: tuple[int, ...] = (2,),
    num_layers: int = 2,
) -> tuple[Path, Path]:
    """Write `<folder>/target` and `<folder>/features`; returns both.

    Sequences are of random tokens and lengths 8..longest, the last half of each supervised.
    Features are the states entering these layers of the target, which has `num_layers`; that
    number is the final one's.
    """
    target_folder = folder / "target"
    save_tiny_target(target_folder, num_layers=num_layers)
    target = load_target(TargetConfig(path=str(target_folder), dtype="float32"), num_threads=1)
    manifest = Manifest(
        target=target.fingerprint,
        feature_layers=layers,
        final_norm=True,
        dtype=dtype,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        max_length=longest,
        tokenizer_hash="tokenizer",
        template_hash="template",
        shards={},
    )
    generator = torch.Generator().manual_seed(seed)
    features = folder / "features"
    shards: dict[str, tuple[str, ...]] = {}
    for split, count in (("train", examples), ("held_out", held_out)):
        stems: list[str] = []
        for start in range(0, count, SHARD_EXAMPLES):
            stems.append(f"shard-{len(stems):05d}")
            size = min(SHARD_EXAMPLES, count - start)
            lengths = torch.randint(8, longest + 1, (size,), generator=generator).tolist()
            ids = [torch.randint(3, 60, (length,), generator=generator) for length in lengths]
            mask = [torch.arange(length) >= length // 2 for length in lengths]
            write_feature_shard(
                features / split / f"{stems[-1]}.safetensors",
                features_TLH=torch.cat([_features(target, row, layers) for row in ids]),
                input_ids_T=torch.cat(ids),
                loss_mask_T=torch.cat(mask),
                offsets=torch.tensor([0, *lengths]).cumsum(0),
                padded_tokens=sum(lengths),
                manifest=manifest,
            )
        shards[split] = tuple(stems)
    replace(manifest, shards=shards).write(features)
    return target_folder, features


def _features(target: Target, ids_T: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        found = target.layer_features(ids_T[None], None, layers)
    return torch.stack([features_BTH[0] for features_BTH in found], dim=1)
