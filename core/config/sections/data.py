"""Conversations and features: everything before training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config.base import Section, field, setting

LayerId = Annotated[int, Field(ge=0)]


# Cleaning rules that can be turned off, and the formats that can be named; core/data has both.
RuleName = Literal[
    "html",
    "invisible_characters",
    "ui_residue",
    "white_space",
    "blank_turns",
    "late_system_turns",
    "leading_assistant_turns",
    "repeated_roles",
    "unanswered_turn",
]
FormatName = Literal["auto", "gdgpt", "sharegpt", "messages", "pairs", "alpaca", "prompt", "text"]


class DataConfig(Section):
    """Conversations, and what becomes of them."""

    path: str | tuple[str, ...] | None = setting(
        None,
        "conversations, or a list of such: JSON, JSONL, Parquet, a folder of these, "
        "pkg://<package>/<file>, or hub://<data set>[?split=train&name=<subset>&revision=<commit>]",
    )
    examples: str | None = setting(None, "folder that prepare_data wrote")
    format: FormatName = field(
        "auto", "record format of data.path; auto tells it record by record, so they may be mixed"
    )
    max_length: int = field(2048, "longest example, in tokens", ge=16)
    too_long: Literal["split", "cut"] = field(
        "split",
        "conversations above max_length: cut at its end, or split at turns into several examples; "
        "of these, a question that leaves its answer no room loses its beginning, an answer that "
        "is too long alone its end, and a round the answers behind the last that fits",
    )
    max_conversations: int | None = field(
        None, "take at most so many conversations, chosen by content hash; null takes all", ge=1
    )
    held_out: float = field(0.05, "share of conversations kept out of training", ge=0, lt=1)
    max_bad_records: int = setting(
        0, "records that are no conversations and still let the job succeed", ge=0
    )
    rules_off: tuple[RuleName, ...] = field((), "cleaning rules that are not applied")
    near_duplicates: float | None = field(
        0.8,
        "share of five-word runs in common (MinHash) from which conversations count as the same; "
        "null keeps all but exact duplicates",
        gt=0.2,
        le=1,
    )
    only_languages: tuple[str, ...] = field(
        (), "drop conversations in other languages than these (ISO 639-1: en, zh, …)"
    )
    drop_languages: tuple[str, ...] = field((), "drop conversations in these languages")
    mask_pii: bool = field(False, "replace e-mail addresses and telephone numbers by marks")
    shard_tokens: int = field(16384, "tokens a shard of examples (and of features)", ge=256)
    prompt_tokens: int = field(512, "longest held-out prompt kept for evaluation, in tokens", ge=16)
    num_workers: int | None = setting(
        None, "blocks of conversations worked on at a time; null takes the cluster's CPUs", ge=1
    )
    seed: int = field(0, "changes which conversations are taken and held out")


class GenerateConfig(Section):
    """What regenerate_responses has the target say."""

    temperature: float = field(0.7, "of the answers; 0 is greedy", ge=0)
    top_p: float = field(0.95, "nucleus of the answers' distribution", gt=0, le=1)
    top_k: int = field(0, "most likely tokens that answers are drawn from; 0 takes all", ge=0)
    max_new_tokens: int = field(512, "longest answer, in tokens", ge=1)
    keep_cut: bool = field(
        False,
        "keep answers that max_new_tokens cut off; otherwise their conversation ends before them",
    )
    batch_size: int = field(16, "sequences that a replica decodes at the same time", ge=1)
    shard_conversations: int = field(
        128,
        "conversations a shard: what one replica takes at a time, and a stopped run redoes",
        ge=1,
    )
    seed: int = field(0, "of the answers and of the prompts that are made up")
    synthesize: int = field(
        0, "have the target make up so many prompts, instead of data.path; 0 for none", ge=0
    )
    prompt_temperature: float = field(1.0, "of the prompts that are made up", gt=0)
    prompt_top_p: float = field(0.98, "nucleus of their distribution", gt=0, le=1)
    max_prompt_tokens: int = field(
        256, "longest prompt that is made up, in tokens; longer ones are dropped", ge=1
    )
    min_prompt_words: int = field(3, "fewest words of a prompt that is made up", ge=1)
    num_replicas: int = setting(
        2, "target replicas at the same time (at most what the cluster holds)", ge=1
    )
    cpus_per_replica: float = setting(1.0, "CPUs a replica; also its threads", gt=0)
    gpus_per_replica: float = setting(0.0, "GPUs a replica", ge=0)


class FeaturesConfig(Section):
    """Target features that the draft head learns from."""

    path: str | None = setting(None, "folder that extract_features wrote")
    store: str | None = field(
        None,
        "where extract_features puts the shards' tensors, if not into output: an address that "
        "fsspec knows, such as s3://bucket/run; readers fetch them once a node, into AERIE_CACHE",
    )
    mode: Literal["shards", "stream"] = setting(
        "shards",
        "where train_draft takes features from: shards reads features.path; stream has "
        "replicas of the target compute them from data.examples meanwhile",
    )
    stream_ahead: int = setting(
        4, "stream: passes that are asked for ahead of their use, by each training worker", ge=1
    )
    keep_held_out_mb: int = setting(
        1024,
        "stream: held-out features that each worker keeps between evaluations, MB; the rest is "
        "computed again each time",
        ge=0,
    )
    layers: Literal["final", "eagle3"] | tuple[LayerId, ...] = field(
        "final",
        "final: what leaves the final norm, for EAGLE-1; eagle3: also the states entering layers "
        "2, L/2 and L-3; or a list of such layers, to which the final feature is added",
    )
    dtype: Literal["bfloat16", "float32", "int8"] = field(
        "bfloat16", "dtype of the stored features; int8 has a scale for each 64 values"
    )
    top_logits: int = field(
        0, "also store the target's log-probabilities of so many likeliest next tokens", ge=0
    )
    batch_tokens: int = field(4096, "tokens a target pass, padding included", ge=16)
    num_replicas: int = setting(
        2, "most target replicas at the same time (at most what the cluster holds)", ge=1
    )
    min_replicas: int = setting(
        1, "replicas that the pool keeps when it shrinks; it grows with the cluster", ge=1
    )
    cpus_per_replica: float = setting(1.0, "CPUs a replica; also its threads", gt=0)
    gpus_per_replica: float = setting(
        0.0, "GPUs a replica; several with target.device_map=auto", ge=0
    )

    @model_validator(mode="after")
    def _pool_has_a_range(self) -> FeaturesConfig:
        if self.min_replicas > self.num_replicas:
            raise ValueError(
                f"features.min_replicas={self.min_replicas} exceeds features.num_replicas="
                f"{self.num_replicas}; change one of them"
            )
        return self
