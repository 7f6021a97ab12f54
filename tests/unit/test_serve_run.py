"""serve.run: what is wrong is said before anything starts."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path

import pytest

from core.config import Config
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.models.tiny import save_tiny_target, tiny_config
from serve import run
from serve.app import build_app
from tests.e2e.serving import free_port

CONFIG = Path(__file__).parents[2] / "configs" / "serve_smollm2.yaml"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save_tiny_target(tmp_path / "target")
    return tmp_path / "target"


def test_without_the_quick_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["--config", str(CONFIG)]) == 2
    error = capsys.readouterr().err
    assert "target.path=runs/quickstart/target/model" in error
    assert "make quickstart" in error


def test_without_the_head(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([f"target.path={target}", "draft.path=nowhere"]) == 2
    assert "draft.path=nowhere" in capsys.readouterr().err


def test_a_head_of_another_target(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    geometry = TargetGeometry.of(tiny_config(259))
    head = build_head(Config().draft, geometry, DraftVocabulary.whole(259))
    save_head(target.parent / "head", head, {"target_fingerprint": "another"})
    assert run.main([f"target.path={target}", f"draft.path={target.parent / 'head'}"]) == 2
    assert "was trained for target another" in capsys.readouterr().err


def test_an_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["serve.prot=80"]) == 2
    assert "did you mean serve.port?" in capsys.readouterr().err


def test_paths_become_absolute(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target.parent)
    checked = run.check(Config().replace(target={"path": "target"}))
    assert checked.target.path == str(target)
    assert checked.draft.path is None


def test_a_port_that_is_taken() -> None:
    run.check_port("127.0.0.1", free := free_port())
    with (
        socket.create_server(("127.0.0.1", free)),
        pytest.raises(ValueError, match=rf"serve\.port={free}: cannot listen"),
    ):
        run.check_port("127.0.0.1", free)


def test_fewer_replicas_at_most_than_at_least() -> None:
    with pytest.raises(ValueError, match=r"serve\.max_replicas=1 is below serve\.replicas=2"):
        build_app(Config().replace(serve={"replicas": 2}))


def test_serve_yaml_is_checked_against_the_schema() -> None:
    # By this annotation Ray Serve turns the `args` of its YAML into a config.
    assert inspect.signature(build_app).parameters["args"].annotation is Config


def test_help_names_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert caught.value.code == 0
    assert "serve.port=8000" in capsys.readouterr().out
