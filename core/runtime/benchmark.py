"""Which benchmarks there are: name → what it needs and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config
from core.provenance import RunFolder
from core.runtime.decoding_benchmark import (
    benchmark_decoding,
    decoding_inputs,
    decoding_resources,
)
from core.runtime.extraction import extraction_inputs, extraction_resources
from core.runtime.extraction_benchmark import benchmark_extraction
from core.runtime.resources import Resources
from core.runtime.training import training_inputs, training_resources
from core.runtime.training_benchmark import benchmark_training


@dataclass(frozen=True)
class Benchmark:
    """Sections, inputs, resources and work of one benchmark, as a `Job` has them."""

    sections: tuple[str, ...]
    inputs: Callable[[Config], Mapping[str, Path]]
    resources: Callable[[Config], Resources]
    run: Callable[[Config, RunFolder], Mapping[str, Any]]


BENCHMARKS = {
    "decoding": Benchmark(
        ("benchmark", "target", "eval"), decoding_inputs, decoding_resources, benchmark_decoding
    ),
    "extraction": Benchmark(
        ("benchmark", "target", "features"),
        extraction_inputs,
        extraction_resources,
        benchmark_extraction,
    ),
    "training": Benchmark(
        ("benchmark", "draft", "train"), training_inputs, training_resources, benchmark_training
    ),
}


def sections(config: Config) -> tuple[str, ...]:
    """Those that count for the benchmark asked for."""
    return BENCHMARKS[config.benchmark.name].sections


def inputs(config: Config) -> Mapping[str, Path]:
    """Those of the benchmark asked for."""
    return BENCHMARKS[config.benchmark.name].inputs(config)


def resources(config: Config) -> Resources:
    """Those of the benchmark asked for."""
    return BENCHMARKS[config.benchmark.name].resources(config)


def run(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Run the benchmark asked for; returns the report."""
    return BENCHMARKS[config.benchmark.name].run(config, folder)
