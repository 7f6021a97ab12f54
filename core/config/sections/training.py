"""How a model is trained, and where its figures go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config.base import Section, field, setting

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """How a model is trained."""

    parallelism: Literal["ddp", "zero0", "zero1", "zero2", "zero3", "pipeline"] = setting(
        "zero1",
        "what workers divide: DeepSpeed's ZeRO stage (1 the optimizer's state, 2 gradients too, 3 "
        "weights too), ddp: nothing, by torch alone, or pipeline: the target's layers "
        "(finetune_target), and the optimizer's state among the workers of a stage; a run goes on "
        "with another, and its result is the same up to rounding",
    )
    pipeline_stages: int = setting(
        2,
        "parts of a pipeline; num_workers is a multiple of it, and that many workers of each stage "
        "share the batch",
        ge=1,
    )
    parts: tuple[int, ...] = setting(
        (),
        "blocks of each stage of a pipeline, the embedding and the head counting as one each; "
        "empty to have them balanced by what they cost",
    )
    stage_memory_gib: float | None = setting(
        None,
        "largest estimate of what a stage of a pipeline holds, GiB, that balancing may come to; "
        "null for any",
        gt=0,
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
    min_workers: int | None = setting(
        None,
        "go on with as few workers as this where nodes are lost, and with more again, up to "
        "num_workers, when there are nodes; null waits for num_workers of them",
        ge=1,
    )
    on_notice: bool = setting(
        False,
        "write a checkpoint when the loss of a node is announced, as spot instances are; such "
        "losses do not count towards max_failures",
    )
    placement: Literal["spread", "strict_spread", "pack", "strict_pack"] = setting(
        "spread",
        "on which nodes processes go: spread over many, pack on few; strictly: each on a node of "
        "its own, or all on one",
    )
    global_batch_size: int = field(
        16, "sequences an optimizer step, over all workers; a multiple of num_workers", ge=1
    )
    micro_batch_size: int = setting(
        8, "sequences a forward pass of one worker; lower it where memory is short", ge=1
    )
    offload: Literal["none", "optimizer", "all"] = setting(
        "none",
        "what DeepSpeed's ZeRO keeps in the CPU's memory instead of the GPU's: the optimizer's "
        "state, or with zero3 the weights too",
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    max_length: int = field(512, "longest training sequence, in tokens; longer ones are cut", ge=8)
    lr: float = field(3e-5, "peak learning rate", gt=0)
    betas: tuple[Beta, Beta] = field((0.9, 0.95), "betas of AdamW or Lion")
    weight_decay: float = field(0.0, "weight decay; in fine-tuning of matrices alone", ge=0)
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
    eval_every: int = field(200, "steps between evaluations on held-out data", ge=1)
    accepted_depth: int = field(
        5, "tokens drafted ahead where evaluations simulate the accepted length", ge=1, le=16
    )
    accepted_tokens: int = field(
        16384, "held-out tokens on which they do so, each time; 0 for none", ge=0
    )
    keep: Literal["best", "last"] = field(
        "best",
        "what is saved: of the evaluation with the largest accepted length (a fine-tuned target's: "
        "with the least loss), or of the last step; without held-out data it is the last one's",
    )
    checkpoint_every: int = field(100, "steps between checkpoints", ge=1)
    keep_checkpoints: int = setting(
        2, "latest checkpoints that are kept; each has the best weights so far with it", ge=1
    )
    max_failures: int = setting(3, "lost workers that are survived; -1 for any number", ge=-1)
    seed: int = field(0, "seed of initialization, data order and noise")

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        shares, named = self.num_workers, f"train.num_workers={self.num_workers}"
        if self.parallelism == "pipeline":
            if self.num_workers % self.pipeline_stages:
                raise ValueError(
                    f"{named} is not a multiple of train.pipeline_stages={self.pipeline_stages}; "
                    "change one of them"
                )
            shares //= self.pipeline_stages
            named += f" / train.pipeline_stages={self.pipeline_stages}"
        if self.global_batch_size % shares:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"{named}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_of_a_pipeline(self) -> TrainConfig:
        if self.parts and self.parallelism != "pipeline":
            raise ValueError(
                f"train.parts={list(self.parts)} with train.parallelism={self.parallelism}: a "
                "pipeline alone is made of parts; choose train.parallelism=pipeline, or leave "
                "train.parts out"
            )
        return self

    @model_validator(mode="after")
    def _workers_may_vary(self) -> TrainConfig:
        least = self.min_workers
        if least is None:
            return self
        where = f"train.min_workers={least} with train.num_workers={self.num_workers}"
        if least > self.num_workers:
            raise ValueError(f"{where}: it is the larger of the two; change one of them")
        if self.parallelism == "pipeline" and least < self.num_workers:
            raise ValueError(
                f"{where} and train.parallelism=pipeline: a pipeline needs all of its workers; "
                "leave train.min_workers out, or choose train.parallelism=zero3"
            )
        counts = range(least, self.num_workers + 1)
        if bad := [count for count in counts if self.global_batch_size % count]:
            raise ValueError(
                f"{where}: train.global_batch_size={self.global_batch_size} is no multiple of "
                f"{', '.join(map(str, bad))}; choose one that every number of workers divides"
            )
        return self

    @model_validator(mode="after")
    def _offload_is_possible(self) -> TrainConfig:
        zero = self.parallelism in ("zero1", "zero2", "zero3")
        if self.offload != "none" and not zero:
            raise ValueError(
                f"train.offload={self.offload} with train.parallelism={self.parallelism}: it is "
                "ZeRO's; choose train.parallelism=zero1, zero2 or zero3, or train.offload=none"
            )
        if self.offload == "all" and self.parallelism != "zero3":
            raise ValueError(
                f"train.offload=all with train.parallelism={self.parallelism}: weights are moved "
                "by ZeRO-3 alone; choose train.parallelism=zero3, or train.offload=optimizer"
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


class TrackingConfig(Section):
    """Where metrics go besides <output>/metrics.jsonl."""

    wandb: Literal["auto", "disabled", "offline", "online"] = setting(
        "auto",
        "Weights & Biases mode; auto is online where the training worker has an API key "
        "(WANDB_API_KEY, or `wandb login`), else offline: `wandb sync <output>/wandb/*` sends it",
    )
    tensorboard: bool = setting(
        False, "also write TensorBoard's event files, into <output>/tensorboard"
    )
    project: str = setting("aerie", "Weights & Biases project")
    wandb_seconds: float = setting(
        30.0, "longest that Weights & Biases may keep a run waiting at its start and its end", gt=0
    )
