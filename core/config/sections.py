"""The sections of the configuration. Every field says its meaning and its unit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config.base import Section, field, setting

DType = Literal["float32", "bfloat16", "float16"]
Beta = Annotated[float, Field(ge=0, lt=1)]
TreeSize = Annotated[int, Field(ge=1)]
LayerId = Annotated[int, Field(ge=0)]


class ConvertConfig(Section):
    """Turn a checkpoint that transformers does not serve directly into an HF folder."""

    source: str | None = setting(
        None,
        "a .gguf file (also pkg://<package>/<file>), or `tiny-random` for a Llama of random "
        "weights with a byte tokenizer, made for tests",
    )
    dtype: DType = field("bfloat16", "dtype of the saved weights")
    seed: int = field(0, "seed of the weights of `tiny-random`")


TemplateName = Literal["auto", "llama-2", "vicuna", "mixtral", "llama-3", "qwen-2"]


class TargetConfig(Section):
    """The target model: the one whose output is kept."""

    path: str | None = setting(None, "HF folder or hub id of the target model")
    template: TemplateName = field(
        "auto",
        "chat template, for prepare_data and wherever the target is spoken to; auto takes the "
        "tokenizer's own, a name the one of that family",
    )
    dtype: DType = field("bfloat16", "dtype of the target's weights and activations")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where the target runs; auto takes a GPU if the worker has one"
    )
    pack_linear: bool = field(
        True, "on CPU, pack linear layers once for oneDNN (faster; same result up to rounding)"
    )
    quantization: Literal["none", "int8", "nf4"] = field(
        "none", "the linear layers' weights by bitsandbytes: int8, or 4-bit NF4"
    )
    device_map: Literal["auto", "balanced"] | None = setting(
        None, "spread one target over several GPUs of a worker; null keeps it on one device"
    )


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
        "conversations above max_length: split at turns into several examples, or cut; an answer "
        "that is too long alone is cut in either case",
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


class TrainConfig(Section):
    """How a model is trained."""

    parallelism: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = field(
        "zero1",
        "what workers divide: DeepSpeed's ZeRO stage (1 the optimizer's state, 2 gradients too, 3 "
        "weights too), or ddp: nothing, by torch alone",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        "float32", "dtype of the computation; float16 scales the loss, and wants GPUs or ddp"
    )
    num_workers: int = setting(
        2,
        "training processes; a run goes on with another number, and its result is the same up to "
        "rounding",
        ge=1,
    )
    cpus_per_worker: float = setting(1.0, "CPUs a process; also its threads", gt=0)
    gpus_per_worker: float = setting(0.0, "GPUs a process", ge=0)
    global_batch_size: int = field(
        16, "sequences an optimizer step, over all workers; a multiple of num_workers", ge=1
    )
    micro_batch_size: int = setting(
        8, "sequences a forward pass of one worker; lower it where memory is short", ge=1
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    max_length: int = field(512, "longest training sequence, in tokens; longer ones are cut", ge=8)
    lr: float = field(3e-5, "peak learning rate of AdamW", gt=0)
    betas: tuple[Beta, Beta] = field((0.9, 0.95), "AdamW's betas")
    weight_decay: float = field(0.0, "AdamW's weight decay", ge=0)
    warmup_steps: int = field(2000, "steps of linear warm-up", ge=0)
    schedule: Literal["cosine", "constant"] = field("cosine", "learning rate after warm-up")
    clip: float = field(0.5, "largest gradient norm", gt=0)
    ema: float = field(
        0.0,
        "decay of a moving average of the weights, which is evaluated and saved in their place, "
        "such as 0.999; 0 for none",
        ge=0,
        lt=1,
    )
    epochs: int = field(20, "passes over the training data", ge=1)
    max_steps: int | None = field(None, "stop after so many optimizer steps", ge=1)
    eval_every: int = field(200, "steps between evaluations on held-out features", ge=1)
    accepted_depth: int = field(
        5, "tokens drafted ahead where evaluations simulate the accepted length", ge=1, le=16
    )
    accepted_tokens: int = field(
        16384, "held-out tokens on which they do so, each time; 0 for none", ge=0
    )
    keep: Literal["best", "last"] = field(
        "best",
        "the head that is saved: of the evaluation with the largest accepted length, or of the "
        "last step; without held-out features it is the last one's",
    )
    checkpoint_every: int = field(100, "steps between checkpoints", ge=1)
    keep_checkpoints: int = setting(
        2, "latest checkpoints that are kept; each has the best head so far with it", ge=1
    )
    max_failures: int = setting(3, "lost workers that are survived; -1 for any number", ge=-1)
    seed: int = field(0, "seed of initialization, data order and noise")

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.global_batch_size % self.num_workers:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"train.num_workers={self.num_workers}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _precision_is_possible(self) -> TrainConfig:
        where = f"train.parallelism={self.parallelism} with train.dtype={self.dtype}"
        if self.parallelism == "zero0" and self.dtype != "float32":
            raise ValueError(
                f"{where}: DeepSpeed would add up gradients in {self.dtype}; choose "
                "train.parallelism=zero1 or ddp, which add them up in float32"
            )
        if self.parallelism != "ddp" and self.dtype == "float16" and not self.gpus_per_worker:
            raise ValueError(
                f"{where}: DeepSpeed has no float16 on CPU; choose train.dtype=bfloat16, which "
                "needs no loss scaling, or train.parallelism=ddp, or set train.gpus_per_worker"
            )
        return self


class DecodeConfig(Section):
    """The speculative decoder."""

    total_tokens: int | Literal["auto"] = field(
        "auto",
        "nodes of the draft tree, the root included; 1 is plain decoding; auto measures what "
        "pays on this machine",
    )
    depth: int = field(5, "expansions after the root's (the tree is one deeper)", ge=0, le=16)
    top_k: int = field(10, "children an expansion, and nodes kept a level", ge=1, le=64)
    ngram_match: int = field(
        0,
        "tokens at the end of the text that must have occurred before, in prompt or output, for "
        "what followed them to be drafted too, with or without a draft head; 0 copies nothing",
        ge=0,
        le=16,
    )
    ngram_branches: int = field(
        3, "matches that are copied a round, depth + 1 tokens each; total_tokens bounds all", ge=1
    )
    temperature: float = field(0.0, "0 is greedy", ge=0)
    top_p: float = field(1.0, "nucleus of the target's distribution", gt=0, le=1)
    sample_top_k: int = field(0, "likeliest tokens that are sampled from; 0 takes all", ge=0)
    min_p: float = field(
        0.0,
        "least probability that is sampled, as a share of the likeliest token's; 0 takes all",
        ge=0,
        le=1,
    )
    repetition_penalty: float = field(
        1.0,
        "logits of tokens in prompt or output are divided by it where positive, else multiplied; "
        "1 leaves them",
        gt=0,
    )
    presence_penalty: float = field(
        0.0, "taken off the logit of each token in the output", ge=-2, le=2
    )
    frequency_penalty: float = field(
        0.0, "taken off as often as the output has the token", ge=-2, le=2
    )
    max_context: int = field(
        4096, "longest sequence, in tokens: prompt, output and tree together", ge=32
    )
    cache_tokens: int = setting(
        16384,
        "rows of the KV cache, in tokens: of all sequences that are decoded at the same time, or "
        "were not long ago; bounds the cache's memory",
        ge=32,
    )
    batch_size: int = setting(16, "most sequences decoded at the same time", ge=1)
    max_waiting: int = setting(64, "requests that may wait for their turn", ge=1)
    prefill_chunk: int = setting(
        512, "tokens of prompts read a round: how long the other sequences may be held up", ge=1
    )
    reuse_prefixes: bool = setting(
        True,
        "keep what was computed for an answer while there is room, for a request that begins with "
        "the same tokens, such as a conversation's next turn",
    )

    @property
    def most_tokens(self) -> int:
        """Nodes that are ever proposed, the root included; no tree is larger."""
        return 1 + self.top_k + self.depth * self.top_k**2

    @model_validator(mode="after")
    def _tree_fits(self) -> DecodeConfig:
        if self.total_tokens != "auto" and not 1 <= self.total_tokens <= self.most_tokens:
            raise ValueError(
                f"decode.total_tokens={self.total_tokens} is outside 1..{self.most_tokens}, which "
                f"top_k={self.top_k} and depth={self.depth} allow; change one of them"
            )
        return self


class EvalConfig(Section):
    """What evaluate_draft measures."""

    prompts: str | None = setting(None, "JSONL of prompts: id, task, messages")
    max_prompts: int | None = field(
        None, "take at most so many prompts, spread over tasks; null takes all", ge=1
    )
    max_new_tokens: int = field(64, "tokens generated a prompt", ge=1)
    fixed_total_tokens: tuple[TreeSize, ...] = field(
        (60,), "tree sizes measured beside decode.total_tokens"
    )
    untrained_prompts: int = field(
        4, "prompts on which an untrained head's accepted length is measured", ge=0
    )
    hf_generate_prompts: int = field(
        4, "prompts on which HF generate is timed as a second baseline", ge=0
    )
    cpus: float = field(2.0, "CPUs of the evaluating process; also its threads", gt=0)
    gpus: float = field(0.0, "GPUs of the evaluating process", ge=0)


class BenchmarkConfig(Section):
    """What is measured side by side."""

    name: Literal["extraction", "training"] = field(
        "extraction",
        "extraction: features the reference way (batch 1, one file a sample), by the bare loop, "
        "and by the Ray pipeline; training: a head by EAGLE's step (padded batches, the whole "
        "vocabulary at every position) and by Aerie's",
    )
    repeats: int = field(3, "times that every way is run, in turn", ge=1)
    max_tokens: int = field(40000, "tokens that a way goes through in a repeat", ge=256)


class ExportConfig(Section):
    """What export_draft writes."""

    format: str | None = field(
        None, "layout of the head that is written, by the engine's name; `--help` begins with them"
    )
    dtype: Literal["same"] | DType = field(
        "same", "dtype of the weights; same keeps the head's, bit for bit"
    )


class ServeConfig(Section):
    """The HTTP service."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on", ge=1, le=65535)
    model_name: str = setting("aerie", "the model's name in the API")
    replicas: int = setting(1, "least decoder replicas", ge=1)
    max_replicas: int = setting(1, "most decoder replicas under load", ge=1)
    cpus_per_replica: float = setting(2.0, "CPUs a replica; also its threads", gt=0)
    gpus_per_replica: float = setting(0.0, "GPUs a replica", ge=0)
    max_new_tokens: int = setting(512, "tokens generated where a request names no limit", ge=1)


class TrackingConfig(Section):
    """Where metrics go besides <output>/metrics.jsonl."""

    wandb: Literal["auto", "disabled", "offline", "online"] = setting(
        "auto",
        "Weights & Biases mode; auto is online where the training worker has an API key "
        "(WANDB_API_KEY, or `wandb login`), else offline: `wandb sync <output>/wandb/*` sends it",
    )
    project: str = setting("aerie", "Weights & Biases project")
    wandb_seconds: float = setting(
        30.0, "longest that Weights & Biases may keep a run waiting at its start and its end", gt=0
    )


class ClusterConfig(Section):
    """The Ray cluster that a job runs on."""

    address: str | None = setting(
        None,
        "Ray address to connect to, or `local` for a Ray of its own; null takes the cluster of "
        "the submitted job or RAY_ADDRESS, else local",
    )
    send_code: bool = setting(
        True,
        "send the working directory, Aerie's code, to the nodes; false where Aerie is installed "
        "on each of them. A submitted job's is sent by whoever submits it",
    )
    can_grow: bool = setting(
        True, "whether nodes may still join: wait for what is lacking, instead of refusing"
    )
    num_cpus: int | None = setting(None, "CPUs of a local Ray; null takes the machine's", ge=1)
    object_store_mb: int = setting(256, "object store of a local Ray, MB", ge=80)
