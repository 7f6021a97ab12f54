"""serve.run: what is wrong is said before anything starts."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve as ray_serve
from ray._private.thirdparty.pathspec import PathSpec

from core.config import Config, load_config
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import ResourceError, StageError
from core.models.target import target_fingerprint
from core.models.tiny import save_tiny_target, tiny_config
from core.paths import resolve_path
from core.runtime.conversion import with_converted_target
from core.runtime.load.servers import free_port
from serve import run
from serve.app import INGRESS_RESERVE, application
from serve.checks import check, check_port, check_room, surge_that_fits

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
    checked = check(with_converted_target(Config.model_validate(
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
    assert check(config).draft.path == "pkg://some_package/head"


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
    checked = check(Config().replace(target={"path": "target"}))
    assert checked.target.path == str(target)
    assert checked.draft.path is None


def test_a_port_that_is_taken() -> None:
    check_port("127.0.0.1", free := free_port())
    with (
        socket.create_server(("127.0.0.1", free)),
        pytest.raises(ValueError, match=rf"serve\.port={free}: cannot listen"),
    ):
        check_port("127.0.0.1", free)


@pytest.mark.parametrize(
    ("models", "room", "said"),
    [
        ({}, 2, None),
        ({}, 1, "serve.replicas × serve.cpus_per_replica: 1 × 2 need 2 CPUs, 1 are there"),
        ({"a": {}, "b": {"serve": {"replicas": 2, "cpus_per_replica": 0.5}}}, 3, None),
        (
            {"a": {}, "b": {"serve": {"replicas": 2, "cpus_per_replica": 1}}},
            3,
            "1 × 2 + 2 × 1, for a, b, need 4 CPUs, 3 are there",
        ),
        # Without requests they have no replica, and one at a time needs room.
        ({name: {"serve": {"replicas": 0}} for name in "abc"}, 2, None),
        ({"a": {}, "b": {"serve": {"replicas": 0}}}, 3, "1 × 2 + 0 × 2, for a, b, need 4 CPUs"),
    ],
)
def test_there_is_room_for_all_models_together(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Any], room: float, said: str | None
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(room)})
    config = Config().replace(serve={"models": models}, cluster={"address": "local"})
    if said is None:
        check_room(config)
        return
    with pytest.raises(ResourceError, match=re.escape(said)):
        check_room(config)


def test_an_old_replica_stops_first_where_all_models_together_leave_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"a": {}, "b": {"serve": {"cpus_per_replica": 1}}}
    config = Config().replace(serve={"models": models}, cluster={"address": "local"})
    for room, percent in ((6, 100), (5, 0)):
        monkeypatch.setattr(ray, "cluster_resources", lambda room=room: {"CPU": float(room)})
        served = surge_that_fits(config).served_models()
        assert {one.serve.max_surge_percent for one in served.values()} == {percent}


def test_each_model_is_checked(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target.parent)
    models: dict[str, Any] = {"a": {}, "b": {"draft": {"path": "nowhere"}}}
    config = Config().replace(target={"path": "target"}, serve={"models": models})
    with pytest.raises(ValueError, match=r"^serve\.models\.b: draft\.path=nowhere: no such file"):
        check(config)
    models = {"a": {}, "b": {"decode": {"total_tokens": 4}}}
    with pytest.raises(
        ValueError, match=r"^serve\.models\.b: decode\.total_tokens=4 needs a draft"
    ):
        check(Config().replace(target={"path": "target"}, serve={"models": models}))
    # A model that names its own target needs none to be made.
    models = {"a": {"target": {"path": "target"}}}
    config = Config().replace(convert={"source": "tiny-random"}, serve={"models": models})
    assert with_converted_target(config) is config
    assert [one.target.path for one in check(config).served_models().values()] == [str(target)]


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
    old = check(Config().replace(target={"path": str(target)}))
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
    old = check(Config().replace(target={"path": str(target)}))
    assert run._renewed(old, lambda: old.replace(**changes)) == old
    assert deployed == []
    shown = capsys.readouterr().out
    assert "nothing is changed: " in shown and said in shown


def test_whatever_reading_one_fails_with_the_server_goes_on(
    target: Path, deployed: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    old = check(Config().replace(target={"path": str(target)}))

    def read() -> Config:
        raise StageError("the conversion failed")

    assert run._renewed(old, read) == old
    assert deployed == []
    assert "nothing is changed: StageError: the conversion failed" in capsys.readouterr().out


def test_one_that_does_not_start_is_taken_back(
    target: Path, deployed: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    old = check(Config().replace(target={"path": str(target)}))
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
    monkeypatch.setattr(run, "application", lambda config: None)
    monkeypatch.setattr(run, "surge_that_fits", lambda config: config)
    monkeypatch.setattr(
        ray_serve, "run", lambda app, name, logging_config: seen.append(logging_config)
    )
    run.deploy(Config().replace(serve={"log_level": level}))
    assert [one.log_level for one in seen] == [level]
    assert Config().serve.log_level == "INFO"


def test_serve_lets_more_into_the_ingress_than_the_guard_does() -> None:
    """Where Serve would let all wait, the guard could no longer refuse, nor health be answered."""
    ingress = application(Config().replace(serve={"max_requests": 7}))._bound_deployment
    assert ingress.max_ongoing_requests == 7 + INGRESS_RESERVE
