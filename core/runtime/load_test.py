"""The stage load_test: a server is started and put under load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config
from core.models.target import target_folder
from core.provenance import RunFolder
from core.runtime.conversion import conversion_inputs, with_converted_target
from core.runtime.load.autoscaling import autoscaling, show_autoscaling
from core.runtime.load.comparison import comparison, show_comparison
from core.runtime.load.overload import overload, show_overload
from core.runtime.load.prompts import load_prompts
from core.runtime.load.soak import show_soak, soak
from core.runtime.resources import Resources


@dataclass(frozen=True)
class LoadTest:
    """What is done with a server, and how its report is printed."""

    run: Callable[[Config, Sequence[str], Path], Coroutine[Any, Any, Mapping[str, Any]]]
    show: Callable[[Mapping[str, Any]], None]


LOAD_TESTS = {
    "soak": LoadTest(soak, show_soak),
    "overload": LoadTest(overload, show_overload),
    "autoscaling": LoadTest(autoscaling, show_autoscaling),
    "comparison": LoadTest(comparison, show_comparison),
}


def load_inputs(config: Config) -> Mapping[str, Path]:
    """The target's folder, or what it is made from."""
    if config.convert.source and not config.target.path:
        return conversion_inputs(config)
    return {"target.path": target_folder(config.target.path)}


def load_resources(config: Config) -> Resources:
    """What the server's replicas take."""
    serve = config.serve
    return Resources(
        cpus=serve.most_replicas * serve.cpus_per_replica,
        gpus=serve.most_replicas * serve.gpus_per_replica,
        because="serve.max_replicas × serve.cpus_per_replica",
    )


def run_load_test(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Run the load test asked for; returns the report."""
    made = with_converted_target(config.replace(output=str(folder.path / "target")))
    config = made.replace(output=config.output)
    prompts = load_prompts(config.load)
    report = asyncio.run(LOAD_TESTS[config.load.name].run(config, prompts, folder.path))
    return {"load_test": config.load.name, **report}


def show(report: Mapping[str, Any]) -> None:
    """Print a report."""
    LOAD_TESTS[report["load_test"]].show(report)
