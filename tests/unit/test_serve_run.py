"""serve.run: what is wrong is said before anything starts."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path
from typing import Any

import pytest
from ray import serve as ray_serve
from ray._private.thirdparty.pathspec import PathSpec

from core.config import Config, load_config
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import target_fingerprint
from core.models.tiny import save_tiny_target, tiny_config
from core.paths import resolve_path
from core.runtime.conversion import with_converted_target
from core.runtime.load.servers import free_port
from serve import run
from serve.app import INGRESS_RESERVE, build_app

CONFIG = Path(__file__).parents[2] / "configs" / "serve_smollm2.yaml"
HEAD = Path(__file__).parents[2] / "serve" / "heads" / "smollm2-135m-instruct"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save_tiny_target(tmp_path / "target")
    return tmp_path / "target"


def test_the_target_is_made_first_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["output=made", "convert.source=tiny-random", "draft.path=nowhere"]
    for said in ("→", "finished before, skipped"):
        # The head is looked for next, and stops it before anything is served.
        assert run.main(arguments) == 2
        shown = capsys.readouterr()
        assert said in shown.out and "draft.path=nowhere" in shown.err
    checked = run.check(with_converted_target(Config.model_validate(
        {"output": "made", "convert": {"source": "tiny-random"}}
    )))  # fmt: skip
    assert checked.target.path == str(tmp_path / "made" / "model")


def test_a_target_that_is_named_is_taken_and_none_is_made(tmp_path: Path) -> None:
    config = load_config(str(CONFIG), [f"target.path={tmp_path}", f"output={tmp_path / 'made'}"])
    assert with_converted_target(config) == config
    assert not (tmp_path / "made").exists()


def test_the_published_heads_place_is_the_same_on_every_node(target: Path) -> None:
    """Ray unpacks Aerie's code elsewhere on each; a path of this machine would be none there."""
    place = load_config(str(CONFIG), []).draft.path or ""
    assert place == "pkg://serve/heads/smollm2-135m-instruct"
    assert resolve_path(place, field="draft.path") == HEAD


def test_a_head_in_a_package_stays_an_address(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = target.parent / "some_package"
    head = build_head(
        Config().draft, TargetGeometry.of(tiny_config(259)), DraftVocabulary.whole(259)
    )
    save_head(package / "head", head, {"target_fingerprint": target_fingerprint(target)})
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(target.parent)
    config = load_config(None, [f"target.path={target}", "draft.path=pkg://some_package/head"])
    assert run.check(config).draft.path == "pkg://some_package/head"


def test_the_published_head_goes_with_the_code() -> None:
    """Other weights do not; this is how Ray reads the file."""
    lines = (HEAD.parents[2] / ".rayignore").read_text().splitlines()
    left_out = PathSpec.from_lines("gitwildmatch", lines).match_file
    assert not left_out("serve/heads/smollm2-135m-instruct/model.safetensors")
    assert left_out("model.safetensors") and left_out("serve/web/model.safetensors")


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


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What is deployed, where no Ray runs; a model named `broken` does not start."""
    seen: list[Config] = []

    def deploy(config: Config) -> None:
        seen.append(config)
        if config.serve.model_name == "broken":
            raise RuntimeError("a replica did not start")

    monkeypatch.setattr(run, "deploy", deploy)
    monkeypatch.setattr(run, "check_room", lambda config: None)
    return seen


def test_a_new_configuration_is_taken(target: Path, deployed: list[Config]) -> None:
    old = run.check(Config().replace(target={"path": str(target)}))
    new = old.replace(decode={"batch_size": 2})
    assert run._renewed(old, lambda: new) == new
    assert deployed == [new]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"serve": {"port": 9}}, "serve.port cannot change while it serves"),
        ({"cluster": {"num_cpus": 7}}, "the section cluster cannot change"),
        ({"target": {"path": "/nowhere"}}, "/nowhere"),
    ],
)
def test_one_that_cannot_be_used_is_not(
    target: Path,
    deployed: list[Config],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    old = run.check(Config().replace(target={"path": str(target)}))
    assert run._renewed(old, lambda: old.replace(**changes)) == old
    assert deployed == []
    shown = capsys.readouterr().out
    assert "nothing is changed: " in shown and said in shown


def test_one_that_does_not_start_is_taken_back(
    target: Path, deployed: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    old = run.check(Config().replace(target={"path": str(target)}))
    broken = old.replace(serve={"model_name": "broken"})
    assert run._renewed(old, lambda: broken) == old
    assert deployed == [broken, old]
    assert "a replica did not start" in capsys.readouterr().out


# --- The end ---------------------------------------------------------------------


class Ingress:
    """A handle: how many requests are at work, each time it is asked, or a failure."""

    def __init__(self, *at_work: int | Exception) -> None:
        self.at_work = list(at_work)
        self.drain = self

    def remote(self) -> Ingress:
        return self

    def result(self, timeout_s: float) -> int:
        found = self.at_work.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def ingress(monkeypatch: pytest.MonkeyPatch) -> Ingress:
    ingress = Ingress()
    monkeypatch.setattr(ray_serve, "get_app_handle", lambda name: ingress)
    monkeypatch.setattr(run, "LOOK_EVERY_S", 0.0)
    return ingress


def test_running_answers_are_waited_for(ingress: Ingress) -> None:
    ingress.at_work = [2, 1, 0]
    assert run.drain()
    assert ingress.at_work == []


def test_but_not_without_end(ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "DRAIN_S", -1.0)
    ingress.at_work = [1, 1]
    assert not run.drain()
    assert ingress.at_work == [1]


def test_an_ingress_that_is_gone_does_not_keep_the_server(
    ingress: Ingress, capsys: pytest.CaptureFixture[str]
) -> None:
    ingress.at_work = [TimeoutError("no answer")]
    assert not run.drain()
    assert "does not answer (TimeoutError)" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["INFO", "ERROR"])
def test_the_applications_log_has_its_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run, "build_app", lambda config: None)
    monkeypatch.setattr(run, "_with_surge_that_fits", lambda config: config)
    monkeypatch.setattr(
        ray_serve, "run", lambda app, name, logging_config: seen.append(logging_config)
    )
    run.deploy(Config().replace(serve={"log_level": level}))
    assert [one.log_level for one in seen] == [level]
    assert Config().serve.log_level == "INFO"


def test_serve_lets_more_into_the_ingress_than_the_guard_does() -> None:
    """Where Serve would let all wait, the guard could no longer refuse, nor health be answered."""
    ingress = build_app(Config().replace(serve={"max_requests": 7}))._bound_deployment
    assert ingress.max_ongoing_requests == 7 + INGRESS_RESERVE
