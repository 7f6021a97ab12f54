"""The main job: all stages of the flow, one after the other, and one report of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from core.config import Config
from core.errors import ConfigError
from core.evaluate.page import print_table, read_samples, write_page
from core.models.features import check_layers
from core.progress import say
from core.provenance import RunFolder
from core.runtime import job as jobs
from core.runtime.connect import connect, inside_submitted_job, jobs_api_is_free, ray_address
from core.runtime.evaluation import check_tree_sizes
from core.runtime.job import Job, Report
from core.runtime.preparation import data_inputs
from core.runtime.resources import Resources, check_resources
from core.runtime.submit import NoJobsAgent, submit

# A Ray on the same machine takes jobs after some seconds, where it can.
AGENT_PATIENCE = 90.0
SECTIONS = ("convert", "target", "data", "features", "draft", "train", "decode", "eval", "tracking")


def chain_resources(config: Config) -> Resources:
    """The most that any stage needs at one time."""
    train, evaluation, features = config.train, config.eval, config.features
    return Resources(
        cpus=max(
            features.cpus_per_replica, train.num_workers * train.cpus_per_worker, evaluation.cpus
        ),
        gpus=max(
            features.gpus_per_replica, train.num_workers * train.gpus_per_worker, evaluation.gpus
        ),
        disk_gb=2.0,
        because="the CPUs and GPUs of the sections features, train and eval",
    )


def stage_config(config: Config, name: str) -> Config:
    """The config of one stage: what the stages before it wrote is its input."""
    output = Path(config.output or "")
    if name == "convert_model":
        return config.replace(output=str(output / "target"))
    config = config.replace(target={"path": str(output / "target" / "model")})
    if name == "prepare_data":
        return config.replace(output=str(output / "examples"))
    if name == "extract_features":
        # Features are extracted in the dtype that they are stored in, decoding has its own; int8
        # is a way of storing what is computed in bfloat16.
        stored = config.features.dtype
        return config.replace(
            output=str(output / "features"),
            target={"dtype": "bfloat16" if stored == "int8" else stored},
            data={"examples": str(output / "examples")},
        )
    if name == "train_draft":
        return config.replace(
            output=str(output / "draft"), features={"path": str(output / "features")}
        )
    assert name == "evaluate_draft", name
    return config.replace(
        output=str(output / "evaluation"),
        draft={"path": str(output / "draft" / "head")},
        eval={"prompts": str(output / "examples" / "prompts.jsonl")},
    )


def data_input(config: Config) -> dict[str, Path]:
    """The conversations, which must be there before the first stage starts.

    What later stages would refuse is refused here too, before anything is computed.
    """
    inputs = data_inputs(config.data)
    check_tree_sizes(config)
    check_layers(config.draft, config.features.layers)
    if config.features.mode == "stream":
        raise ConfigError(
            "features.mode=stream: the main job keeps its features in shards; leave it out, or "
            "run prepare_data and then train_draft with it"
        )
    made_here = {
        "target.path": config.target.path,
        "data.examples": config.data.examples,
        "features.path": config.features.path,
        "eval.prompts": config.eval.prompts,
    }
    if given := [name for name, value in made_here.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(given)}: the main job makes its own; leave it out, or run the jobs one by "
            "one with it (README, `Your own model, data and cluster`)"
        )
    return inputs


def run_chain(config: Config, folder: RunFolder, stages: Sequence[Job]) -> Report:
    """Run the stages in order; those that have finished before are skipped."""
    reports: dict[str, Mapping[str, Any]] = {}
    for number, stage in enumerate(stages, start=1):
        say("quickstart", f"stage {number} of {len(stages)}: {stage.name}")
        reports[stage.name] = jobs.run_stage(stage, stage_config(config, stage.name))
    folders = {stage.name: Path(stage_config(config, stage.name).output or "") for stage in stages}
    samples = read_samples(folders["evaluate_draft"])
    page = write_page(folder.path / "report.html", folders, reports, samples)
    print_table(reports["evaluate_draft"])
    say("quickstart", f"report: {page}")
    return {"stages": reports}


def main(job: Job, argv: Sequence[str] | None = None) -> int:
    """Run a chain where it is: in a submitted job, or in a Ray started here that it submits to.

    Everything that the configuration and the inputs can have wrong is said before Ray starts.
    """
    arguments = jobs.parse(job, argv)
    return jobs.guarded(lambda: _run_or_submit(job, arguments), job.name)


def _run_or_submit(job: Job, arguments: argparse.Namespace) -> int | None:
    config = jobs.load(arguments)
    if arguments.dry_run or inside_submitted_job() or ray_address(config.cluster) != "local":
        jobs.act(job, arguments, config)
        return None
    jobs.check_output(config)
    job.inputs(config)
    if not jobs_api_is_free():
        say(job.name, "another Ray on this machine holds the jobs API's port; running right here")
        jobs.act(job, arguments, config)
        return None
    try:
        return _submit_here(job, config, arguments.config, arguments.overrides)
    except NoJobsAgent as error:
        say(job.name, f"{error}. Running right here instead")
        jobs.act(job, arguments, config)
        return None
    finally:
        ray.shutdown()


def _submit_here(job: Job, config: Config, path: str | None, overrides: Sequence[str]) -> int:
    connect(config.cluster, dashboard=True)
    check_resources(job.resources(config), config, job.name)
    address = f"http://{ray.get_runtime_context().worker.node.webui_url}"
    say(job.name, f"Ray's dashboard: {address}")
    # A submitted job runs in a copy of the working directory, where relative paths are lost.
    output = Path(config.output or "").expanduser().absolute()
    # The address too, since Ray tells a job that of whichever Ray was started last here.
    address_here = ray.get_runtime_context().gcs_address
    command = [*(["--config", str(Path(path).absolute())] if path else []), *overrides]
    command += [f"output={output}", f"cluster.address={address_here}", "cluster.can_grow=false"]
    # Those that exist here are absolute since the config was loaded.
    inputs = {"convert.source": config.convert.source, "data.path": config.data.path}
    command += [f"{name}={json.dumps(place, ensure_ascii=False)}" for name, place in inputs.items()]
    # This Ray has this environment, which need not be on the PATH.
    module = f"jobs.{job.name}"
    return submit(module, command, address, python=sys.executable, patience=AGENT_PATIENCE)
