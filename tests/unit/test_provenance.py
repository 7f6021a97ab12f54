"""The run folder: identity, skipping, refusal, overwriting."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from core.config import load_config
from core.errors import ConfigError
from core.provenance import (
    GIT_REVISION_VARIABLE,
    PACKAGES,
    RunFolder,
    fingerprint,
    git_revision,
)

SECTIONS = ("train", "target")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "input.json"
    path.write_text("[1]")
    return path


def _folder(source: Path, *overrides: str, job: str = "train_draft") -> RunFolder:
    config = load_config(None, [f"output={source.parent / 'run'}", *overrides])
    return RunFolder(job, config, SECTIONS, {"data.path": source})


def test_identity_changes_with_what_can_change_the_result(source: Path) -> None:
    identity = _folder(source).identity
    assert _folder(source).identity == identity
    assert _folder(source, "train.lr=1").identity != identity
    assert _folder(source, "target.dtype=float32").identity != identity
    assert _folder(source, job="evaluate_draft").identity != identity
    source.write_text("[2]")
    assert _folder(source).identity != identity


def test_identity_does_not_change_with_settings_or_places(source: Path, tmp_path: Path) -> None:
    identity = _folder(source).identity
    for setting in ("train.cpus_per_worker=2", "target.path=/x", "output=/y", "overwrite=true"):
        assert _folder(source, setting).identity == identity, setting
    assert _folder(source, "decode.depth=2").identity == identity, "of another section"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert _folder(Path(shutil.move(source, moved / "renamed.json"))).identity == identity


def test_an_output_must_be_set(source: Path) -> None:
    with pytest.raises(ConfigError, match="pass output=<folder>"):
        RunFolder("train_draft", load_config(None), SECTIONS, {})


def test_the_record_says_what_made_the_result(source: Path) -> None:
    folder = _folder(source, "train.lr=0.5")
    folder.start()
    record = yaml.safe_load((folder.path / "run.yaml").read_text())
    assert record["identity"] == folder.identity and record["job"] == "train_draft"
    assert record["config"]["train"]["lr"] == 0.5
    assert record["config"]["decode"]["depth"] == 5, "defaults included"
    assert record["inputs"] == {"data.path": fingerprint(source)}
    assert set(record["versions"]) == {"aerie", "python", *PACKAGES}


def test_a_run_is_finished_once_its_report_is_there(source: Path) -> None:
    folder = _folder(source)
    assert not folder.finished
    folder.start()
    assert not folder.finished
    assert folder.finish({"tokens": 3}) == folder.report()
    assert folder.finished and _folder(source).finished
    assert folder.report() == {"job": "train_draft", "run": folder.identity, "tokens": 3}
    assert not _folder(source, "train.lr=1").finished


def test_two_runs_do_not_share_a_folder(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _folder(source).held():
        with (
            pytest.raises(ConfigError, match="another run is writing there"),
            _folder(source).held(wait_seconds=0),
        ):
            pytest.fail("both hold the folder")
        assert "waiting for another run" not in capsys.readouterr().out
    with _folder(source).held(wait_seconds=0):
        pass


def test_the_lock_outlives_an_overwrite(source: Path) -> None:
    _folder(source).start()
    other = _folder(source, "train.lr=1", "overwrite=true")
    with other.held():
        other.start()
        with pytest.raises(ConfigError), _folder(source).held(wait_seconds=0):
            pytest.fail("both hold the folder")


def test_a_submitted_job_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GIT_REVISION_VARIABLE, "abc+changes")
    assert git_revision() == "abc+changes"


def test_an_interrupted_run_goes_on(source: Path) -> None:
    _folder(source).start()
    part = source.parent / "run" / "part.bin"
    part.touch()
    _folder(source, "train.cpus_per_worker=2").start()
    assert part.exists()


@pytest.mark.parametrize(
    ("change", "job", "said"),
    [
        (["train.lr=1"], "train_draft", "train.lr: 3e-05 → 1.0"),
        (["target.dtype=float32"], "train_draft", "target.dtype: bfloat16 → float32"),
        ([], "evaluate_draft", "another train_draft run (this is evaluate_draft)"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    source: Path, change: list[str], job: str, said: str
) -> None:
    _folder(source).start()
    with pytest.raises(ConfigError) as caught:
        _folder(source, *change, job=job).start()
    assert said in str(caught.value) and "overwrite=true" in str(caught.value)


def test_other_input_is_refused_with_its_name(source: Path) -> None:
    _folder(source).start()
    source.write_text("[2]")
    with pytest.raises(ConfigError, match=r"the content of data\.path"):
        _folder(source).start()


def test_overwriting_leaves_nothing_of_the_other_run(source: Path) -> None:
    first = _folder(source)
    first.start()
    first.finish({})
    (first.path / "shards").mkdir()
    (first.path / "shards" / "part.bin").touch()
    (first.path / "outputs.jsonl").touch()
    second = _folder(source, "train.lr=1", "overwrite=true")
    second.start()
    assert [entry.name for entry in second.path.iterdir()] == ["run.yaml"]
    record = yaml.safe_load((second.path / "run.yaml").read_text())
    assert record["identity"] == second.identity


def test_killed_while_overwriting_it_is_still_the_other_run(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not yet removed must not be taken for a part of the new run."""
    first = _folder(source)
    first.start()
    (first.path / "shards").mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        _folder(source, "train.lr=1", "overwrite=true").start()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds another"):
        _folder(source, "train.lr=1").start()


def test_a_run_of_parts_is_followed_by_another_of_its_kind(source: Path) -> None:
    first = _folder(source, job="quickstart")
    first.start(of_parts=True)
    part = first.path / "features" / "run.yaml"
    part.parent.mkdir()
    part.touch()
    second = _folder(source, "train.lr=1", job="quickstart")
    second.start(of_parts=True)
    assert part.exists()
    assert not first.finished
    record = yaml.safe_load((second.path / "run.yaml").read_text())
    assert record["identity"] == second.identity


def test_a_run_of_parts_does_not_take_another_jobs_folder(source: Path) -> None:
    _folder(source).start()
    with pytest.raises(ConfigError, match="another train_draft run"):
        _folder(source, job="quickstart").start(of_parts=True)


# --- Fingerprints -----------------------------------------------------------


def test_a_folder_counts_by_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.bin").write_text("a")
    (folder / "b.bin").write_text("b")
    before = fingerprint(folder)
    assert fingerprint(Path(shutil.copytree(folder, tmp_path / "copy"))) == before
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    assert fingerprint(folder) == before, "hidden files do not count"
    os.utime(folder / "b.bin", (0, 0))
    assert fingerprint(folder) == before, "time does not count"
    (folder / "b.bin").rename(folder / "c.bin")
    renamed = fingerprint(folder)
    assert renamed != before
    (folder / "c.bin").write_text("c")
    assert fingerprint(folder) not in (before, renamed)


def test_a_jobs_folder_counts_by_its_run(source: Path) -> None:
    folder = _folder(source)
    folder.start()
    (folder.path / "anything.bin").touch()
    assert fingerprint(folder.path) == folder.identity


def test_a_large_file_counts_by_size_and_samples(tmp_path: Path) -> None:
    """Sparse, so that 300 MiB take no room."""
    path = tmp_path / "weights.bin"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)
    found = {fingerprint(path)}
    for place in (0, 300 * 2**20 - 1):
        with path.open("rb+") as file:
            file.seek(place)
            file.write(b"x")
        found.add(fingerprint(path))
    with path.open("rb+") as file:
        file.truncate(300 * 2**20 + 1)
    found.add(fingerprint(path))
    assert len(found) == 4


def test_the_report_is_plain_json(source: Path) -> None:
    folder = _folder(source)
    folder.start()
    folder.finish({"rates": [0.5, 1]})
    assert json.loads((folder.path / "report.json").read_text())["rates"] == [0.5, 1]
