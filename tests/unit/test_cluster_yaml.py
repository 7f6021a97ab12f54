"""cluster.yaml is accepted by Ray and installs what the Makefile installs."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    # The two calls that `ray up` makes before it talks to the provider.
    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_misspelt_key(cluster: dict[str, Any]) -> None:
    # Guards the test above: the schema is strict, so passing it means something.
    cluster["setup_command"] = []
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster))


def test_nodes_are_set_up_from_the_lock(cluster: dict[str, Any]) -> None:
    mounted = set(cluster["file_mounts"].values())
    assert {"requirements.lock", "Makefile"} <= mounted
    assert all((ROOT / name).is_file() for name in ("requirements.lock", "Makefile"))

    prepared = prepare_config(cluster)
    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"]):
        assert any(command.startswith("make -C ~/aerie env ") for command in commands)

    env_target = (ROOT / "Makefile").read_text().split("$(VENV)/.packages:")[1]
    assert "--requirement requirements.lock" in env_target.split("$(VENV)/.installed:")[0]


def test_nodes_run_the_ray_that_the_lock_names() -> None:
    # Ray refuses a node whose version is not the head's.
    assert f"ray=={ray.__version__}" in (ROOT / "requirements.lock").read_text().splitlines()


def test_token_authentication_is_on_everywhere(cluster: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for role in ("head", "worker"):
        starts = [c for c in cluster[f"{role}_start_ray_commands"] if "ray start" in c]
        assert starts, f"{role}_start_ray_commands never starts Ray"
        assert all("export RAY_AUTH_MODE=token" in command for command in starts)


def test_head_does_no_work_and_gpu_workers_scale_from_zero(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    gpu_workers = [t for t in types.values() if t["resources"].get("GPU")]
    assert gpu_workers
    assert all(t["min_workers"] == 0 < t["max_workers"] for t in gpu_workers)
