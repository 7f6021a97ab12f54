"""What a job needs, checked before anything loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from core.config import Config
from core.errors import ResourceError
from core.progress import say
from core.runtime.connect import on_cluster


@dataclass(frozen=True)
class Resources:
    """The least that a job needs at one time, and the config field that decides it."""

    cpus: float = 1.0
    gpus: float = 0.0
    disk_gb: float = 0.1
    because: str = ""


def check_resources(needs: Resources, config: Config, job: str) -> None:
    """Compare with this machine, or with the cluster if one is connected.

    Raises:
        ResourceError: this machine lacks something. On a cluster, which may still scale up,
            a lack of CPUs or GPUs is a warning.
    """
    disk = shutil.disk_usage(_existing_parent(Path(config.output or "."))).free / 1e9
    if disk < needs.disk_gb:
        raise ResourceError(
            f"output={config.output}: {disk:.1f} GB free, {job} needs about "
            f"{needs.disk_gb:.1f} GB; free some or choose another output"
        )
    for name, wanted, there in _compared(needs, config):
        if there < wanted:
            message = f"{job} needs {wanted:g} {name} ({needs.because}), {there:g} are there"
            if not (on_cluster(config.cluster) and config.cluster.can_grow):
                raise ResourceError(f"{message}; lower it, or run on a larger machine or cluster")
            say(job, f"warning: {message}; waiting for the cluster to grow")


def check_placement(
    bundles: Sequence[tuple[float, float]], config: Config, what: str, *, apart: bool = False
) -> None:
    """Make sure that the nodes can hold all of these at one time, each on one node.

    The sum may be there and yet lie in pieces too small; what waits for each other would then
    wait for ever.

    Args:
        bundles: CPUs and GPUs of each.
        config: whose cluster may grow.
        what: they are, for the message.
        apart: whether each must have a node of its own.
    Raises:
        ResourceError: they do not fit and the cluster cannot grow; otherwise it is a warning.
    """
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(n.get("CPU", 0.0), n.get("GPU", 0.0)) for n in there]
    if _fits(bundles, nodes, apart):
        return
    message = f"the nodes cannot hold {what} at the same time{' and apart' if apart else ''}"
    if not (on_cluster(config.cluster) and config.cluster.can_grow):
        raise ResourceError(f"{message}; lower their number, or what each takes of a node")
    say("resources", f"warning: {message}; waiting for the cluster to grow")


def _fits(
    bundles: Sequence[tuple[float, float]],
    nodes: Sequence[tuple[float, float]],
    apart: bool = False,
) -> bool:
    """Largest first, each where it fits and leaves the least GPUs, then CPUs."""
    free = [list(node) for node in nodes]
    for cpus, gpus in sorted(bundles, key=lambda bundle: (bundle[1], bundle[0]), reverse=True):
        room = [node for node in free if node[0] >= cpus and node[1] >= gpus]
        if not room:
            return False
        chosen = min(room, key=lambda node: (node[1], node[0]))
        if apart:
            free.remove(chosen)
        chosen[0] -= cpus
        chosen[1] -= gpus
    return True


def describe_resources(needs: Resources, config: Config) -> str:
    """The check as a few lines for `--dry-run`."""
    lines = [
        f"  {name}: needs {wanted:g}, has {there:g}"
        for name, wanted, there in _compared(needs, config)
    ]
    free = shutil.disk_usage(_existing_parent(Path(config.output or "."))).free / 1e9
    memory = psutil.virtual_memory().available / 1e9
    lines.append(f"  disk: needs about {needs.disk_gb:.1f} GB, has {free:.0f} GB")
    lines.append(f"  memory: {memory:.1f} GB available on this machine")
    return "\n".join(lines)


def _compared(needs: Resources, config: Config) -> list[tuple[str, float, float]]:
    if ray.is_initialized():
        there = ray.cluster_resources()
        cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    else:
        cpus = float(config.cluster.num_cpus or psutil.cpu_count() or 1)
        gpus = float(len(list(Path("/dev").glob("nvidia[0-9]*"))))
    return [("CPUs", needs.cpus, cpus), ("GPUs", needs.gpus, gpus)]


def _existing_parent(path: Path) -> Path:
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path
