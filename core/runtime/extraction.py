"""extract_features: a pool of target replicas turns example shards into feature shards.

Each shard is computed by one replica and written by it, so that only a row of figures travels
back. A shard's bytes depend on its examples, the target and the batch budget alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from core import errors
from core.config import Config, FeaturesConfig, TargetConfig
from core.data.examples import (
    SPLITS,
    example_shards,
    read_examples,
    read_footer,
    read_metadata,
)
from core.data.feature_manifest import Manifest
from core.data.feature_shards import ShardRecord, finished_record, remove_leftovers
from core.data.template import tokenizer_hash
from core.errors import InputError, MismatchError
from core.models.features import extract_shard, feature_layers, load_for_extraction
from core.models.target import (
    Target,
    load_tokenizer,
    target_fingerprint,
    target_folder,
    target_location,
)
from core.models.weights import check_readable
from core.paths import resolve_path
from core.progress import Progress, say
from core.provenance import RunFolder
from core.runtime.pool import (
    PoolFigures,
    PoolSize,
    ShardReplica,
    attempts_file,
    load_on_replica,
    replicas_that_fit,
    run_pool,
    unseen,
)
from core.runtime.resources import Resources

STAGE = "extract_features"


def extraction_inputs(config: Config) -> Mapping[str, Path]:
    """The paths that the features are made from."""
    return {
        "data.examples": resolve_path(
            _required(config.data.examples, "data.examples"), field="data.examples"
        ),
        "target.path": target_folder(config.target.path),
    }


def extraction_resources(config: Config) -> Resources:
    """One replica, and the disk that the features will still take."""
    paths = extraction_inputs(config)
    _check_devices(config)
    manifest = plan_manifest(config, paths["data.examples"], paths["target.path"])
    tokens = sum(
        count_tokens(shard)
        for split in SPLITS
        for shard in example_shards(paths["data.examples"], split)
    )
    there = sum(f.stat().st_size for f in Path(config.output or ".").glob("*/shard-*.safetensors"))
    return Resources(
        cpus=config.features.cpus_per_replica,
        gpus=config.features.gpus_per_replica,
        disk_gb=0 if manifest.store else max(0, tokens * manifest.bytes_per_token - there) / 1e9,
        because="features.cpus_per_replica, features.gpus_per_replica",
    )


def _check_devices(config: Config) -> None:
    if config.features.gpus_per_replica > 1 and config.target.device_map is None:
        raise errors.ConfigError(
            f"features.gpus_per_replica={config.features.gpus_per_replica:g}, of which a target "
            "uses one; set target.device_map=auto to spread it over them, or lower the former"
        )
    if config.target.device_map is not None and config.features.gpus_per_replica < 1:
        raise errors.ConfigError(
            f"target.device_map={config.target.device_map} spreads a target over GPUs; set "
            "features.gpus_per_replica to the GPUs of a replica, or target.device_map to null"
        )


def extract_features(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Compute the feature shards that are not finished yet; returns the report.

    Raises:
        MismatchError: the examples were made with another tokenizer.
        StageError: replicas kept crashing.
    """
    started = time.time()
    paths = extraction_inputs(config)
    manifest = plan_manifest(config, paths["data.examples"], paths["target.path"])
    output = folder.path.absolute()
    # A refused run leaves nothing that would stand for its settings.
    manifest.files.check()
    manifest.write(output)
    tasks = _unfinished(paths["data.examples"], output, manifest)
    total = sum(len(stems) for stems in manifest.shards.values())
    skipped = total - len(tasks)
    size = _pool_size(config.features)
    replicas = replicas_that_fit(size, len(tasks), STAGE, "features.num_replicas") if tasks else 0
    figures = PoolFigures()
    with Progress(STAGE, total=total, unit="shards", skipped=skipped) as progress:
        if tasks:
            say(STAGE, f"loading the target in {replicas} replica(s)")
            with closing(extract_in_pool(tasks, replicas, config, manifest)) as rows:
                for row in rows:
                    figures.add(row)
                    progress.advance(1, tokens=row["tokens"])
    # This run's own killed replicas leave some too; a stray one of an earlier run, which is about
    # to be killed, loses nothing that counts.
    remove_leftovers(output, older_than=time.time())
    records = _records(output, manifest)
    tokens = {split: sum(r.tokens for r in found) for split, found in records.items()}
    padded = sum(r.padded_tokens for found in records.values() for r in found)
    written = sum(r.bytes for found in records.values() for r in found)
    return {
        "train_tokens": tokens["train"],
        "held_out_tokens": tokens["held_out"],
        "shards": total,
        "shards_before": skipped,
        "tokens_per_second": figures.tokens / max(figures.seconds, 1e-9),
        "padding_waste": 1 - sum(tokens.values()) / padded,
        "bytes": written,
        "bytes_per_token": written / sum(tokens.values()),
        "replicas": replicas,
        "nodes": len(figures.nodes),
        "hidden_size": manifest.hidden_size,
        "feature_layers": list(manifest.feature_layers),
        "features_dtype": manifest.dtype,
        "seconds": time.time() - started,
    }


def plan_manifest(config: Config, examples: Path, target: Path) -> Manifest:
    """What the features of these examples by this target will be.

    Raises:
        InputError: there are no examples, or a file of the target's weights is damaged.
        ConfigError: layers or tokens that the target does not have.
        MismatchError: the examples were made with another tokenizer.
    """
    shards = {split: tuple(example_shards(examples, split)) for split in SPLITS}
    if not shards["train"]:
        raise InputError(f"data.examples={examples}: no examples; run prepare_data again")
    metadata = read_metadata(shards["train"][0])
    if tokenizer_hash(load_tokenizer(target)) != metadata.tokenizer_hash:
        raise MismatchError(
            f"data.examples={examples} was made with another tokenizer than that of "
            f"target.path={config.target.path}; run prepare_data with this target, or set "
            "target.path to the model whose tokenizer made the examples"
        )
    check_readable(target)
    model = _text_config(target)
    if config.features.top_logits > model.vocab_size:
        raise errors.ConfigError(
            f"features.top_logits={config.features.top_logits} exceeds the target's vocabulary of "
            f"{model.vocab_size}; lower it"
        )
    return Manifest(
        target=target_fingerprint(target),
        feature_layers=feature_layers(config.features.layers, model.num_hidden_layers),
        final_norm=True,
        dtype=config.features.dtype,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        max_length=metadata.max_length,
        tokenizer_hash=metadata.tokenizer_hash,
        template_hash=metadata.template_hash,
        shards={split: tuple(shard.stem for shard in found) for split, found in shards.items()},
        top_logits=config.features.top_logits,
        target_quantization=config.target.quantization,
        store=config.features.store,
    )


@dataclass(frozen=True)
class _ReplicaSettings:
    target: TargetConfig
    features: FeaturesConfig
    manifest: Manifest


class _Replica(ShardReplica):
    """Computes feature shards, each of the example shard that its task names."""

    advice = "Lower features.batch_tokens or features.num_replicas"

    def __init__(self, settings: _ReplicaSettings) -> None:
        self.settings = settings

    def load(self) -> Target:
        manifest, cpus = self.settings.manifest, self.settings.features.cpus_per_replica
        target = load_on_replica(load_for_extraction, self.settings.target, cpus, manifest.target)
        if manifest.top_logits:
            target.check_output_head()
        return target

    def finished(self, shard: Path) -> int | None:
        record = finished_record(shard, self.settings.manifest)
        return record.tokens if record else None

    def make(self, target: Target, shard: Path, work: str) -> int:
        examples, budget = read_examples(Path(work)), self.settings.features.batch_tokens
        return extract_shard(target, examples, shard, self.settings.manifest, budget).tokens


def extract_in_pool(
    tasks: Sequence[dict[str, str]], replicas: int, config: Config, manifest: Manifest
) -> Generator[Mapping[str, Any]]:
    """Compute the shards of these rows in a pool of replicas.

    Args:
        tasks: as `shard_tasks` makes them.
        replicas: that the pool starts with.
        config: target and features.
        manifest: of the folder.
    Yields:
        See `run_pool`.
    Raises:
        AerieError: what a replica raised.
    """
    location = target_location(str(config.target.path))
    target = config.target.model_copy(update={"path": location})
    settings = _ReplicaSettings(target, config.features, manifest)
    yield from run_pool(tasks, _Replica, settings, _pool_size(config.features), replicas)


def _pool_size(features: FeaturesConfig) -> PoolSize:
    return PoolSize(
        features.num_replicas,
        features.cpus_per_replica,
        features.gpus_per_replica,
        fewest=features.min_replicas,
    )


def shard_tasks(examples: Path, folder: Path) -> list[dict[str, str]]:
    """One row a shard, for `extract_in_pool`: which examples go into which file."""
    return [
        {
            "shard": str(folder / split / f"{source.stem}.safetensors"),
            "work": str(source.absolute()),
        }
        for split in SPLITS
        for source in example_shards(examples, split)
    ]


def _unfinished(examples: Path, folder: Path, manifest: Manifest) -> list[dict[str, str]]:
    """The shards that are still to be computed."""
    tasks = []
    for task in shard_tasks(examples, folder):
        shard = Path(task["shard"])
        if finished_record(shard, manifest) is None:
            attempts_file(shard).unlink(missing_ok=True)
            tasks.append(task)
    return tasks


def _records(folder: Path, manifest: Manifest) -> dict[str, list[ShardRecord]]:
    records: dict[str, list[ShardRecord]] = {split: [] for split in manifest.shards}
    for split, stems in manifest.shards.items():
        for stem in stems:
            shard = folder / split / f"{stem}.safetensors"
            record = finished_record(shard, manifest)
            if record is None:
                raise unseen(shard)
            records[split].append(record)
    return records


def count_tokens(shard: Path) -> int:
    """Tokens of an example shard, from the file's footer alone."""
    footer = read_footer(shard)
    total = 0
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            chunk = footer.row_group(group).column(column)
            if chunk.path_in_schema.startswith("input_ids."):
                total += chunk.num_values
    return total


def _text_config(target: Path) -> Any:
    return AutoConfig.from_pretrained(target).get_text_config()


def _required(value: str | None, field: str) -> str:
    if not value:
        raise errors.ConfigError(f"{field} is not set; give the folder that prepare_data wrote")
    return value
