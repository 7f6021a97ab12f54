"""serve.arguments, and what becomes of them: the application of `serve run` and Serve's YAML."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app as built_by_serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from core.config import Config, load_config
from core.models.tiny import save_tiny_target
from serve.app import application, build_app
from serve.arguments import Arguments

DEPLOYED = sorted((Path(__file__).parents[2] / "configs").glob("serve_deploy_*.yaml"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save_tiny_target(tmp_path / "target")
    return tmp_path / "target"


def test_serve_yaml_is_checked_against_the_schema() -> None:
    # By this annotation Ray Serve turns the `args` of its YAML into a config.
    assert inspect.signature(build_app).parameters["args"].annotation is Arguments


@pytest.mark.parametrize(
    "given",
    [
        {"target": {"path": "/model", "dtype": "float32"}, "decode": {"total_tokens": 4}},
        {"target.path": "/model", "target.dtype": "float32", "decode.total_tokens": "4"},
        {"target.path": "/model", "target": {"dtype": "float32"}, "decode.total_tokens": 4},
    ],
)
def test_sections_and_dotted_names_say_the_same(given: dict[str, Any]) -> None:
    wanted = Config().replace(
        target={"path": "/model", "dtype": "float32"}, decode={"total_tokens": 4}
    )
    assert Arguments.model_validate(given).model_dump() == wanted.model_dump()


def test_a_file_is_what_the_rest_is_laid_over(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("target: {path: /model, dtype: float16}\ndraft: {path: /head}\n")
    given = {"config": str(file), "target": {"dtype": "float32"}, "draft.path": "null"}
    found = Arguments.model_validate(given)
    assert (found.target.path, found.target.dtype) == ("/model", "float32")
    assert found.draft.path is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"serve": {"prot": 1}}, "unknown key serve.prot; did you mean serve.port?"),
        ({"serve.prot": "1"}, "unknown key serve.prot; did you mean serve.port?"),
        ({"config": "/nowhere.yaml"}, "--config /nowhere.yaml: no such file"),
        ({"target": {"path": "/nowhere"}}, "target.path=/nowhere: no such folder"),
        ({}, "target.path is not set"),
        (
            {"serve": {"models": {"a": {"target": {"path": "/nowhere"}}}}},
            "serve.models.a: target.path=/nowhere: no such folder",
        ),
    ],
)
def test_what_is_wrong_is_said_as_serve_shows_it(given: dict[str, Any], said: str) -> None:
    """Of an exception of Serve's own kind, its status has the message and no traceback."""
    with pytest.raises(RayServeException) as caught:
        call_user_app_builder_with_args_if_necessary(build_app, given)
    assert said in str(caught.value)


@pytest.mark.parametrize("path", DEPLOYED, ids=lambda path: path.stem)
def test_the_files_for_serve_deploy_fit_both_schemas(path: Path) -> None:
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications
    assert app.import_path == "serve.app:build_app"
    found = Arguments.model_validate(app.args)
    # What it serves is what `aerie serve` does.
    wanted = load_config(str(path.with_stem(path.stem.replace("deploy_", ""))))
    sections = ("convert", "target", "draft", "decode")
    assert found.shown(sections) == wanted.shown(sections) and found.output == wanted.output
    assert found.serve.model_name == wanted.serve.model_name


def test_one_model_has_the_deployments_of_ever(target: Path) -> None:
    app = call_user_app_builder_with_args_if_necessary(build_app, {"target.path": str(target)})
    names = [one.name for one in built_by_serve(app, name="aerie").deployments]
    assert sorted(names) == ["Decoder", "Heads", "Ingress"]


def test_several_models_have_deployments_of_their_own(target: Path) -> None:
    models = {"a": {}, "org/b": {"serve": {"replicas": 0, "cpus_per_replica": 1}}}
    config = Config().replace(target={"path": str(target)}, serve={"models": models})
    built = built_by_serve(application(config), name="aerie")
    deployments = {one.name: one for one in built.deployments}
    assert sorted(deployments) == [
        "Decoder:a",
        "Decoder:org~b",
        "Heads:a",
        "Heads:org~b",
        "Ingress",
    ]
    cpus = {
        name: deployments[name].ray_actor_options["num_cpus"]
        for name in ("Decoder:a", "Decoder:org~b")
    }
    assert cpus == {"Decoder:a": 2, "Decoder:org~b": 1}
    bounds = deployments["Decoder:org~b"]._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas) == (0, 1)


def test_the_ingress_loads_no_framework() -> None:
    """It imports what the application is built by, and would hold some 300 MB of it for nothing."""
    code = (
        "import sys; from serve.app import build_app\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
