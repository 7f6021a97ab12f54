from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core import cli

ROOT = Path(__file__).parents[2]


def test_all_jobs_are_found() -> None:
    files = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert set(cli.job_names()) == files
    assert {"quickstart", "prepare_data", "train_draft"} <= files


def test_run_passes_arguments_and_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("convert: {source: tiny-random}\n")
    argv = ["run", "convert_model", "--config", str(file), f"output={tmp_path}", "--dry-run"]
    assert cli.main(argv) == 0
    assert "source: tiny-random" in capsys.readouterr().out
    assert cli.main([*argv, "convert.dtype=float9"]) == 2
    assert "convert_model: error: " in capsys.readouterr().err


def test_run_passes_help_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "convert_model", "--help"])
    assert stopped.value.code == 0
    assert "python -m jobs.convert_model" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "submit"])
def test_an_unknown_job_is_exit_code_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "train_drft"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aerie: error: no job 'train_drft'; there are ")
    assert "train_draft" in error and error.count("\n") == 1


def test_submitting_where_no_cluster_answers_is_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = "http://127.0.0.1:9"
    assert cli.main(["submit", "convert_model", "--address", address, "output=/x"]) == 2
    error = capsys.readouterr().err
    assert f"no Ray dashboard answers at {address}" in error and "Traceback" not in error


def test_no_command_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2


def test_the_command_line_itself_loads_no_framework() -> None:
    """`aerie --help` and a typing mistake answer at once."""
    code = (
        "import sys; from core import cli; assert cli.main(['run', 'nothing']) == 2; "
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
