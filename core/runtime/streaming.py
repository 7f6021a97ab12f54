"""Features that flow from target replicas to training workers without touching disk.

Each worker asks the replicas for its own coming passes, a bounded number ahead, and takes the
results out of Ray's object store. What is computed together is one pass of one worker, so that
features depend on the pass alone: neither the number of replicas, nor a replaced one, nor where
a run goes on changes a bit of them. Ray restarts a lost replica and repeats what it was at.

Shapes: T tokens (of all sequences of a pass), L feature layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from core import errors
from core.config import Config, FeaturesConfig, TargetConfig
from core.data.batches import plan_batches
from core.data.example_dataset import ExampleDataset
from core.data.examples import Example
from core.data.feature_manifest import Manifest
from core.data.feature_shards import FeatureExample
from core.errors import AerieError, ConfigError, ResourceError, StageError
from core.models.features import batch_features, load_for_extraction
from core.models.target import Target
from core.progress import say
from core.runtime.pool import MAX_ATTEMPTS, load_on_replica
from core.runtime.resources import check_placement
from core.train.order import Selection
from core.train.prefetch import Prefetch
from core.train.task import HELD_OUT, DraftTask

STAGE = "train_draft"
# Above this share Ray begins to move objects to disk.
OBJECT_STORE_SHARE = 0.8
WIRE_DTYPES = ("bfloat16", "float32")

Ids = npt.NDArray[np.int32]


def streams(config: Config) -> bool:
    """Whether this run streams its features."""
    return config.features.mode == "stream"


class StreamBroken(Exception):
    """A worker's pass could not be computed; `error` says why.

    No AerieError itself: it strikes one worker alone, and must take that worker down, so that
    the others, which wait for it, are ended too.
    """

    def __init__(self, error: AerieError) -> None:
        super().__init__(error)
        self.error = error


class FeatureReplica:
    """One target, as a Ray actor that answers passes in the order in which they come."""

    def __init__(self, target: TargetConfig, features: FeaturesConfig, manifest: Manifest) -> None:
        self.target_config, self.config, self.manifest = target, features, manifest
        self._failure: tuple[str, str] | None = None
        self._served = 0

    @cached_property
    def _target(self) -> Target:
        """Loaded at the first call: Ray would try a failing constructor again and again."""
        cpus, fingerprint = self.config.cpus_per_replica, self.manifest.target
        return load_on_replica(load_for_extraction, self.target_config, cpus, fingerprint)

    def load(self) -> str:
        """Load the target, and say on which node.

        Raises:
            UserError: it cannot be loaded here, or is another than the job's.
        """
        assert self._target is not None
        return str(ray.get_runtime_context().get_node_id())

    def features(self, sequences: list[Ids]) -> npt.NDArray[Any]:
        """Features of a pass, one sequence behind the other: [T, L, H].

        NumPy knows no bfloat16: it comes as the bits, uint16.
        """
        try:
            found_TLH = compute_features(self._target, sequences, self.manifest, self.config)
        except Exception as error:
            self._failure = (type(error).__name__, str(error))
            raise
        self._served += 1
        return _to_wire(found_TLH)

    def failure(self) -> tuple[str, str] | None:
        """Name and message of the last error that was no loss of the replica; None without."""
        return self._failure

    def served(self) -> int:
        """Passes answered since the replica was started."""
        return self._served


def compute_features(
    target: Target, sequences: Sequence[Ids], manifest: Manifest, config: FeaturesConfig
) -> Tensor:
    """Features [T, L, H] of sequences, in target passes of at most `features.batch_tokens`."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shape = (int(offsets[-1]), len(manifest.feature_layers), manifest.hidden_size)
    found_TLH = torch.empty(shape, dtype=wire_dtype(manifest))
    nothing = np.zeros(0, dtype=np.uint8)
    examples = [Example("", ids, nothing, "", 0) for ids in sequences]
    for batch in plan_batches(lengths, config.batch_tokens).batches:
        batch_BTLH = batch_features(
            target, [examples[index] for index in batch], manifest.feature_layers
        )
        for row, index in enumerate(batch):
            begin, end = offsets[index], offsets[index + 1]
            found_TLH[begin:end] = batch_BTLH[row, : lengths[index]].to(found_TLH.dtype)
    return found_TLH


def wire_dtype(manifest: Manifest) -> torch.dtype:
    """In which features are sent.

    Raises:
        ConfigError: one that features are only stored in.
    """
    if manifest.dtype not in WIRE_DTYPES:
        raise ConfigError(
            f"features.dtype={manifest.dtype} is for features in shards; a stream sends "
            f"{' or '.join(WIRE_DTYPES)}: set features.dtype to one of them"
        )
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    return dtype


def _to_wire(features_TLH: Tensor) -> npt.NDArray[Any]:
    bits = features_TLH.dtype == torch.bfloat16
    return (features_TLH.view(torch.uint16) if bits else features_TLH).numpy()


def _from_wire(array_TLH: npt.NDArray[Any]) -> Tensor:
    # A copy: what Ray hands out is read-only, and keeps its place in the object store.
    copy_TLH = torch.from_numpy(array_TLH.copy())
    return copy_TLH.view(torch.bfloat16) if copy_TLH.dtype == torch.uint16 else copy_TLH


class StreamedFeatures:
    """A worker's end of the stream for one split: `core.train.order.FeatureSource`.

    With `keep_bytes`, results are kept in this process while they fit, and not asked for again:
    the held-out passes are the same at every evaluation.
    """

    def __init__(
        self,
        replicas: Sequence[Any],
        examples: ExampleDataset,
        max_length: int,
        ahead: int,
        *,
        first_replica: int = 0,
        keep_bytes: int = 0,
    ) -> None:
        self._replicas, self._examples, self._max_length = replicas, examples, max_length
        self._next = first_replica
        self._prefetch: Prefetch[Any] = Prefetch(self._request, ahead)
        self._keep_bytes = keep_bytes
        self._kept: dict[tuple[int, ...], list[FeatureExample]] = {}

    def announce(self, passes: Iterable[Sequence[int]]) -> None:
        """See `FeatureSource`."""
        self._prefetch.announce(p for p in passes if tuple(p) not in self._kept)

    def take(self, indices: Sequence[int]) -> list[FeatureExample]:
        """See `FeatureSource`.

        Raises:
            StreamBroken: no replica could compute this pass.
        """
        key = tuple(indices)
        if key in self._kept:
            return self._kept[key]
        try:
            flat_TLH = _from_wire(received(self._prefetch.take(indices)))
        except AerieError as error:
            raise StreamBroken(error) from error
        examples = [self._examples[index] for index in indices]
        lengths = [min(example.num_tokens, self._max_length) for example in examples]
        found = [
            FeatureExample(
                input_ids=torch.from_numpy(example.input_ids_T[:length].astype(np.int64)),
                loss_mask=torch.from_numpy(example.loss_mask_T[:length].astype(bool)),
                features=features_TLH,
            )
            for example, length, features_TLH in zip(
                examples, lengths, flat_TLH.split(lengths), strict=True
            )
        ]
        if flat_TLH.nbytes <= self._keep_bytes:
            self._keep_bytes -= flat_TLH.nbytes
            self._kept[key] = found
        return found

    def _request(self, indices: Sequence[int]) -> Any:
        # In turn, so that the passes of a worker are computed by several replicas at once.
        replica = self._replicas[self._next % len(self._replicas)]
        self._next += 1
        return replica.features.remote(
            [self._examples[index].input_ids_T[: self._max_length] for index in indices]
        )


@dataclass(frozen=True)
class FeatureStream:
    """What a training worker needs to open its end of the stream; sent to every worker."""

    replicas: tuple[Any, ...]
    config: FeaturesConfig

    def open(self, task: DraftTask, split: str, rank: int) -> StreamedFeatures:
        """This worker's source for a split."""
        held_out = split == HELD_OUT
        return StreamedFeatures(
            self.replicas,
            ExampleDataset(task.features, split),
            task.config.train.max_length,
            self.config.stream_ahead,
            first_replica=rank,
            keep_bytes=self.config.keep_held_out_mb * 10**6 if held_out else 0,
        )

    def failure(self) -> AerieError | None:
        """An error that a replica has met before, which trying again will not mend."""
        for replica in self.replicas:
            found = received(replica.failure.remote())
            if found is not None:
                return _as_aerie_error(*found)
        return None


def received(reference: Any) -> Any:
    """The result of a call to a replica.

    Raises:
        AerieError: what went wrong there, in one message.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # Ray wraps what the replica raised, with its traceback.
        cause = getattr(error, "cause", error)
        raise _as_aerie_error(type(cause).__name__, str(cause)) from None
    except RayActorError as error:
        raise StageError(
            f"a target replica was lost {MAX_ATTEMPTS} times over the same sequences ({error}); "
            "out of memory? Lower features.batch_tokens, features.num_replicas or "
            "train.micro_batch_size"
        ) from error


def _as_aerie_error(name: str, message: str) -> AerieError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, AerieError):
        return kind(message)
    return StageError(f"a target replica failed: {name}: {message}")


@contextmanager
def feature_stream(task: DraftTask) -> Iterator[FeatureStream]:
    """Start the replicas and wait until each has its target; they end with the block.

    Raises:
        UserError: too little room for them, or a target that cannot be loaded.
        StageError: a replica died while it loaded.
    """
    config, target = task.config.features, task.config.target
    train = task.config.train
    check_object_store(task)
    check_placement(
        [(train.cpus_per_worker, train.gpus_per_worker)] * train.num_workers
        + [(config.cpus_per_replica, config.gpus_per_replica)] * config.num_replicas,
        task.config,
        f"{train.num_workers} training workers and {config.num_replicas} target replicas",
    )
    options = {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica,
        "max_restarts": -1,
        "max_task_retries": MAX_ATTEMPTS - 1,
        "scheduling_strategy": "SPREAD",
        # OpenMP reads this when torch is loaded, before any code of ours runs.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(config.cpus_per_replica)))}},
    }
    actor = ray.remote(FeatureReplica).options(**options)
    replicas = tuple(
        actor.remote(target.model_copy(update={"path": task.target}), config, task.manifest)
        for _ in range(config.num_replicas)
    )
    try:
        say(STAGE, f"loading the target in {len(replicas)} replica(s)")
        nodes = [received(reference) for reference in [r.load.remote() for r in replicas]]
        say(
            STAGE,
            f"features are streamed from {len(replicas)} replica(s), {len(set(nodes))} node(s)",
        )
        yield FeatureStream(replicas, config)
    finally:
        for replica in replicas:
            ray.kill(replica)


def in_flight_bytes(task: DraftTask) -> int:
    """The most that results of the stream can take in the object store at one time."""
    train = task.config.train
    per_token = (
        len(task.manifest.feature_layers)
        * task.manifest.hidden_size
        * wire_dtype(task.manifest).itemsize
    )
    splits = [task.training] if task.held_out is None else [task.training, task.held_out]
    passes = train.num_workers * (task.config.features.stream_ahead + 1)
    tokens = sum(_longest(split, train.micro_batch_size) for split in splits)
    return passes * tokens * per_token


def _longest(selection: Selection, count: int) -> int:
    """Tokens of the longest `count` sequences."""
    return int(np.sort(selection.lengths_N)[-count:].sum())


def check_object_store(task: DraftTask) -> None:
    """Make sure that what is in flight fits into the object store, so that nothing is spilled.

    Raises:
        ResourceError: it might not.
    """
    needed = in_flight_bytes(task)
    there = float(ray.cluster_resources().get("object_store_memory", 0.0))
    if needed > OBJECT_STORE_SHARE * there:
        raise ResourceError(
            f"up to {needed / 1e6:,.0f} MB of features are in flight, and Ray's object store has "
            f"{there / 1e6:,.0f} MB; lower features.stream_ahead="
            f"{task.config.features.stream_ahead} or train.micro_batch_size, or raise "
            "cluster.object_store_mb"
        )
