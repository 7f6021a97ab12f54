"""How Ray Data is used: quietly; by prepare_data in small blocks, of which few are under way."""

from __future__ import annotations

import logging
import warnings

import ray.data
from ray.data import DataContext, ExecutionResources

from core.config.sections import DataConfig

# Blocks under way, in Ray's object store: enough for dozens of workers, and bounded.
STORE_BYTES = 96 * 10**6
TARGET_BLOCK_BYTES = 2**21


def quiet_ray_data() -> None:
    """No progress bars, and no lines about each execution: our own say it."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It would warn that its progress bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # A small input has fewer blocks than there are workers, which is nobody's mistake.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")


def num_workers(data: DataConfig) -> int:
    """Blocks that are worked on at a time."""
    there = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return min(data.num_workers or there, there)


def bounded(dataset: ray.data.Dataset, *, in_order: bool) -> ray.data.Dataset:
    """The data set with small blocks, and few of them under way."""
    context = dataset.context
    context.target_max_block_size = TARGET_BLOCK_BYTES
    context.execution_options.preserve_order = in_order
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=STORE_BYTES
    )
    return dataset
