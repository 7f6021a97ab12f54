"""A Ray Data pool of target replicas that work through shards."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from core import errors
from core.config import TargetConfig
from core.errors import AerieError, MismatchError, StageError
from core.models.target import Target
from core.paths import TEMPORARY, naming_a_full_disk
from core.progress import say
from core.runtime.blocks import quiet_ray_data

# A shard, or a streamed pass, that took its replica down so often (out of memory, most likely)
# ends the run.
MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class PoolSize:
    """How many replicas are wanted, what each takes of its node, and how many are kept idle."""

    replicas: int
    cpus: float
    gpus: float
    fewest: int = 1


class ShardReplica(ABC):
    """One target, in an actor of the pool. It makes a shard at a time and writes it itself.

    Attributes:
        advice: what to lower when replicas crash, for the message.
    """

    advice: str

    @abstractmethod
    def load(self) -> Target:
        """The target."""

    @abstractmethod
    def finished(self, shard: Path) -> int | None:
        """Tokens of a shard that is finished, else None."""

    @abstractmethod
    def make(self, target: Target, shard: Path, work: str) -> int:
        """Write a shard; returns the tokens that it took."""

    @cached_property
    def target(self) -> Target:
        """Loaded at the first shard, where a user's error can be reported like any other."""
        return self.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Make one shard; the row says what came of it."""
        (name,), (work,) = batch["shard"], batch["work"]
        shard = Path(str(name))
        row: dict[str, Any] = {"shard": str(shard), "tokens": 0, "error": "", "kind": ""}
        row["started"] = time.time()
        try:
            # A replica may die between finishing a shard and saying so.
            tokens = self.finished(shard)
            if tokens is None:
                count_attempt(shard, self.advice)
                target = self.target
                row["started"] = time.time()
                tokens = self.make(target, shard, str(work))
                attempts_file(shard).unlink(missing_ok=True)
            row["tokens"] = tokens
        except AerieError as error:
            # As a row it reaches the driver as one message, not as Ray's nested tracebacks.
            row["error"], row["kind"] = str(error), type(error).__name__
        context = ray.get_runtime_context()
        row.update(ended=time.time(), node=context.get_node_id(), replica=context.get_actor_id())
        return {key: [value] for key, value in row.items()}


def load_on_replica(
    load: Callable[[TargetConfig, int], Target], config: TargetConfig, cpus: float, fingerprint: str
) -> Target:
    """Load a replica's target, on as many threads as it has CPUs.

    Raises:
        UserError: it cannot be loaded.
        MismatchError: it is another than the job's.
    """
    target = load(config, max(1, int(cpus)))
    if target.fingerprint != fingerprint:
        raise MismatchError(
            f"target.path={config.path} is another model on this node "
            f"({ray.util.get_node_ip_address()}) than where the job was started; give a folder "
            "that every node mounts"
        )
    return target


def unseen(shard: Path) -> StageError:
    """A replica finished this shard, and the driver does not find it."""
    return StageError(
        f"{shard} was made on another node and is not to be seen here; output must be on a file "
        "system that every node mounts"
    )


class PoolFigures:
    """What the rows of a run of the pool add up to.

    Attributes:
        tokens: of its shards.
        nodes: that took part.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.nodes: set[str] = set()
        self._started, self._ended = float("inf"), 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row of `run_pool`."""
        self.tokens += int(row["tokens"])
        self.nodes.add(row["node"])
        self._started = min(self._started, row["started"])
        self._ended = max(self._ended, row["ended"])

    @property
    def seconds(self) -> float:
        """From the first shard's start to the last one's end; loading is not in it."""
        return max(0.0, self._ended - self._started)


def replicas_that_fit(size: PoolSize, num_tasks: int, stage: str, field: str) -> int:
    """As many as asked for, as there are tasks, and as the nodes hold now; at least one."""
    hold = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            fits = there.get("CPU", 0.0) // size.cpus
            if size.gpus:
                fits = min(fits, there.get("GPU", 0.0) // size.gpus)
            hold += int(fits)
    if hold < min(size.replicas, num_tasks):
        say(stage, f"{field}={size.replicas}, of which {hold} fit now")
    return max(1, min(size.replicas, num_tasks, hold))


def run_pool(
    tasks: Sequence[Mapping[str, str]],
    replica: type[ShardReplica],
    settings: Any,
    size: PoolSize,
    replicas: int,
) -> Generator[Mapping[str, Any]]:
    """Have the replicas work through tasks, each one row; rows come back in any order.

    Args:
        tasks: at least one; `shard`, the file to write, and `work`, what `replica` makes it of.
        replica: its constructor takes `settings`.
        settings: can be pickled.
        size: see `PoolSize`.
        replicas: to start with.
    Yields:
        As shards are done: `shard`, `tokens`, `started` and `ended` (seconds since the epoch),
        `node` and `replica`.
    Raises:
        AerieError: what a replica raised.
    """
    quiet_ray_data()
    # With one shard in flight a replica is fully used at 1.0.
    context = DataContext.get_current()
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    most = max(replicas, min(size.replicas, len(tasks)))
    rows = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).map_batches(
        replica,
        fn_constructor_args=(settings,),
        batch_size=1,
        # Fewer than it starts with will do: when a node is lost for good, the others finish its
        # work, and when one joins, the pool grows.
        compute=ActorPoolStrategy(
            min_size=min(size.fewest, replicas),
            initial_size=replicas,
            max_size=most,
            # A shard takes long enough that queueing a second behind it gains nothing.
            max_tasks_in_flight_per_actor=1,
        ),
        num_cpus=size.cpus,
        num_gpus=size.gpus or None,
    )
    # Ray Data spreads the actors over the nodes and restarts them, with their shard, for ever.
    for row in rows.iter_rows():
        if row["error"]:
            raise getattr(errors, row["kind"], StageError)(row["error"])
        yield row


def attempts_file(shard: Path) -> Path:
    """A file as long as there were attempts at a shard; it outlives a replica that crashes."""
    return shard.with_name(f".{shard.name}.attempts{TEMPORARY}")


def count_attempt(shard: Path, advice: str) -> None:
    """Take note of an attempt at a shard.

    Raises:
        StageError: it has been tried too often.
    """
    with naming_a_full_disk(shard):
        shard.parent.mkdir(parents=True, exist_ok=True)
        with attempts_file(shard).open("ab") as file:
            file.write(b".")
    if attempts_file(shard).stat().st_size > MAX_ATTEMPTS:
        raise StageError(
            f"{MAX_ATTEMPTS} replicas crashed while they computed {shard}; out of memory? {advice}"
        )
