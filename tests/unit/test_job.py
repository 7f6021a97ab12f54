"""What all jobs share: exit codes, messages, dry run, skipping; and that their files are pages."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from core.cli import job_names
from core.config import Config, load_config
from core.errors import InputError, StageError
from core.paths import resolve_path
from core.provenance import RunFolder
from core.runtime import chain, job
from core.runtime.resources import Resources, check_resources
from jobs import convert_model, quickstart

ROOT = Path(__file__).parents[2]
NOWHERE = "203.0.113.1:6379"  # reserved for documentation: connecting to it would hang


def _inputs(config: Config) -> dict[str, Path]:
    return {"data.path": resolve_path(str(config.data.path or ""), field="data.path")}


def _count(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    text = resolve_path(str(config.data.path or ""), field="data.path").read_text()
    with (folder.path / "runs").open("a") as file:
        file.write("x")
    return {"characters": len(text)}


COUNT = job.Job(
    name="count",
    summary="Count characters.",
    sections=("data",),
    inputs=_inputs,
    run=_count,
    uses_ray=False,
)


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = tmp_path / "data.txt"
    data.write_text("abc")
    return [f"output={tmp_path / 'run'}", f"data.path={data}"]


def _fails(error: BaseException) -> job.Job:
    def run(config: Config, folder: RunFolder) -> Mapping[str, Any]:
        raise error

    return dataclasses.replace(COUNT, run=run)


def test_done(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(COUNT, argv) == 0
    folder = RunFolder(
        "count", load_config(None, argv), ("data",), _inputs(load_config(None, argv))
    )
    assert folder.finished and folder.report()["characters"] == 3
    assert "[count] → " in capsys.readouterr().out


def test_a_finished_run_is_skipped_and_another_is_not(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert job.main(COUNT, argv) == 0
    assert "finished before, skipped" in capsys.readouterr().out
    assert (tmp_path / "run" / "runs").read_text() == "x"
    assert job.main(COUNT, [*argv, "data.seed=1"]) == 2
    assert "data.seed: 0 → 1" in capsys.readouterr().err
    assert job.main(COUNT, [*argv, "data.seed=1", "overwrite=true"]) == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["data.pth=x"], "unknown key data.pth; did you mean data.path?"),
        (["data.path=no/such"], "data.path=no/such: no such file or folder"),
        (["output="], "output is not set; pass output=<folder>"),
        (["output=s3://bucket/run"], "object-store addresses are not supported"),
        (["--config", "no/such.yaml"], "--config no/such.yaml: no such file"),
        (["data"], "expected section.field=value"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_users_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    said: str,
    flags: list[str],
) -> None:
    assert job.main(COUNT, [*argv, *flags, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("count: error: ") and said in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_mistake_found_while_running_is_the_users_too(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(_fails(InputError("record 3 is no conversation")), argv) == 2
    assert capsys.readouterr().err == "count: error: record 3 is no conversation\n"
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("error", [StageError("a worker died"), RuntimeError("odd")])
def test_a_failure_is_exit_code_1_with_its_traceback(
    argv: list[str], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert job.main(_fails(error), argv) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and str(error) in said
    assert said.endswith("count: failed; the same command goes on\n")


def test_an_interrupt_is_exit_code_1_without_a_traceback(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(_fails(KeyboardInterrupt()), argv) == 1
    assert capsys.readouterr().err == "count: interrupted; the same command goes on\n"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_flag_may_stand_anywhere(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    argv.insert(place, "--dry-run")
    assert job.main(COUNT, argv) == 0
    assert not (tmp_path / "run").exists()


def test_a_wrong_flag_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.main(COUNT, [*argv, "--drx"])
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_dry_run_shows_config_inputs_and_resources(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(COUNT, [*argv, "--dry-run", "data.seed=7"]) == 0
    shown = capsys.readouterr().out
    config, _, rest = shown.partition("inputs:\n")
    values = yaml.safe_load(config)
    assert values["data"]["seed"] == 7 and values["data"]["max_length"] == 2048
    assert values["output"] == str(tmp_path / "run") and "train" not in values
    assert f"  data.path: {tmp_path / 'data.txt'}" in rest
    assert "CPUs: needs 1" in rest and "disk: needs" in rest


def test_a_dry_run_that_lacks_cpus_is_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    needy = dataclasses.replace(
        COUNT, resources=lambda config: Resources(cpus=9999, because="data.seed")
    )
    assert job.main(needy, [*argv, "--dry-run"]) == 2
    assert "count needs 9999 CPUs (data.seed)" in capsys.readouterr().err


def test_too_little_disk_is_said_before_anything_is_written(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needy = dataclasses.replace(COUNT, resources=lambda config: Resources(disk_gb=1e9))
    assert job.main(needy, argv) == 2
    assert "count needs about 1000000000.0 GB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_on_a_cluster_a_lack_of_cpus_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["output=/tmp", f"cluster.address={NOWHERE}"])
    check_resources(Resources(cpus=9999, because="x"), config, "count")
    assert "waiting for the cluster to grow" in capsys.readouterr().out


def test_an_action_looks_at_results_instead_of_making_them(argv: list[str], tmp_path: Path) -> None:
    seen: list[int] = []
    actions = {
        "inspect": job.Action("print N", lambda config, value: seen.append(value), "N"),
        "verify": job.Action("check", lambda config, value: seen.append(-1)),
    }
    with_actions = dataclasses.replace(COUNT, actions=actions)
    assert job.main(with_actions, [*argv, "--inspect", "3"]) == 0
    assert job.main(with_actions, [*argv, "--verify"]) == 0
    assert seen == [3, -1]
    assert not (tmp_path / "run").exists()


# --- On a cluster -----------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize("by", ["environment", "config"])
def test_a_relative_output_on_a_cluster_is_refused_before_connecting(
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    by: str,
    flags: list[str],
) -> None:
    if by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    else:
        argv.append(f"cluster.address={NOWHERE}")
    on_ray = dataclasses.replace(COUNT, uses_ray=True)
    assert job.main(on_ray, [*argv, "output=runs/here", *flags]) == 2
    assert "output=runs/here is relative" in capsys.readouterr().err
    assert not ray.is_initialized()
    assert not Path("runs/here").exists()


def test_an_absolute_or_home_output_is_fine_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    for output in ("/data/run", "~/run"):
        job.check_output(load_config(None, [f"output={output}"]))


def test_a_relative_output_is_fine_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job.check_output(load_config(None, ["output=runs/here"]))


# --- The jobs themselves ----------------------------------------------------


@pytest.mark.parametrize("name", job_names())
def test_a_job_is_a_page(name: str) -> None:
    text = (ROOT / "jobs" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 70
    module = importlib.import_module(f"jobs.{name}")
    assert module.JOB.name == name
    assert f"python -m jobs.{name}" in (module.__doc__ or "")
    assert set(module.JOB.sections) <= set(Config.model_fields)
    assert 'if __name__ == "__main__":' in text


@pytest.mark.parametrize("name", job_names())
def test_a_job_without_output_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"jobs.{name}").main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: error: output is not set") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["convert.source=no/such.gguf"], "convert.source=no/such.gguf: no such file"),
        (["data.path=no/such.json"], "data.path=no/such.json: no such file"),
        (["data.path="], "data.path is not set"),
        (["cluster.address=auto", "output=runs/x"], "output=runs/x is relative"),
        (["eval.fixed_total_tokens=[54]"], "54 is outside 1..53"),
        (["train.num_workers=3"], "not a multiple of"),
        (
            ["draft.kind=eagle3"],
            "extract them with features.layers=eagle3",
        ),
    ],
)
def test_the_quick_start_says_what_is_wrong_before_ray_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(ROOT)
    argv = ["--config", "configs/smoke.yaml", f"output={tmp_path}", *overrides]
    assert quickstart.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not ray.is_initialized()


def test_each_stage_reads_what_the_one_before_wrote(tmp_path: Path) -> None:
    config = load_config(str(ROOT / "configs" / "smoke.yaml"), [f"output={tmp_path}"])
    stages = {stage.name: chain.stage_config(config, stage.name) for stage in quickstart.STAGES}
    outputs = {name: Path(stage.output or "").name for name, stage in stages.items()}
    assert outputs == {
        "convert_model": "target",
        "prepare_data": "examples",
        "extract_features": "features",
        "train_draft": "draft",
        "evaluate_draft": "evaluation",
    }
    evaluated = stages["evaluate_draft"]
    assert evaluated.target.path == f"{tmp_path}/target/model"
    assert evaluated.draft.path == f"{stages['train_draft'].output}/head"
    assert evaluated.eval.prompts == f"{stages['prepare_data'].output}/prompts.jsonl"
    assert stages["train_draft"].features.path == stages["extract_features"].output
    assert stages["extract_features"].data.examples == stages["prepare_data"].output
    assert stages["extract_features"].target.dtype == config.features.dtype
    int8 = chain.stage_config(config.replace(features={"dtype": "int8"}), "extract_features")
    assert (int8.target.dtype, int8.features.dtype) == ("bfloat16", "int8")
    assert stages["train_draft"].train == config.train
    assert quickstart.JOB.sections == chain.SECTIONS


def test_converting_the_tiny_model_is_a_whole_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"output={tmp_path / 'run'}", "convert.source=tiny-random", "convert.dtype=float32"]
    assert convert_model.main(argv) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert convert_model.main(argv) == 0
    assert "finished before, skipped" in capsys.readouterr().out


def test_a_refused_input_leaves_the_folder_free(argv: list[str], tmp_path: Path) -> None:
    assert job.main(_fails(InputError("mend the data")), argv) == 2
    assert job.main(COUNT, argv) == 0, "the corrected command was taken for another run"


def test_files_that_are_no_run_are_never_replaced(argv: list[str], tmp_path: Path) -> None:
    precious = tmp_path / "run" / "model" / "weights"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert job.main(COUNT, [*argv, "overwrite=true"]) == 2
    assert precious.read_text() == "mine"


def test_the_main_job_refuses_what_it_makes_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "configs/smoke.yaml", f"output={tmp_path}/run", "target.path=some/model"]
    assert quickstart.main([*given, "--dry-run"]) == 2
    assert "target.path" in capsys.readouterr().err


def test_the_main_job_refuses_a_machine_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "configs/smoke.yaml", f"output={tmp_path}/run"]
    assert quickstart.main([*given, "--dry-run", "train.cpus_per_worker=4000"]) == 2
    assert "8000 CPUs" in capsys.readouterr().err


def test_readme_has_no_blanks_left() -> None:
    assert not re.findall(r"\b[A-Z]+_(?:TIME|TABLE|MEMORY)\b", (ROOT / "README.md").read_text())
