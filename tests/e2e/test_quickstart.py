"""The main job at toy size: from the command line, on two raylets, and through kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from core.data.feature_manifest import read_manifest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["--config", "configs/smoke.yaml"]
PATIENCE_SECONDS = 400
SMALL = {"object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run on one node, which starts Ray and submits itself."""
    output = tmp_path_factory.mktemp("one") / "run"
    done = _run([sys.executable, "-m", "jobs.quickstart", *SMOKE, f"output={output}"])
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("stage 5 of 5", "lossless: ", "repetition rate", "τ"):
        assert said in done.stdout
    return output


@pytest.fixture(scope="module")
def two_raylets() -> Iterator[str]:
    """The dashboard's address of a cluster of two nodes with one CPU each."""
    port = _free_port()
    head = {
        "num_cpus": 1,
        "include_dashboard": True,
        "dashboard_port": port,
        "dashboard_agent_listen_port": _free_port(),
        **SMALL,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _settings().items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1, dashboard_agent_listen_port=_free_port(), **SMALL)
        cluster.wait_for_nodes()
        yield f"http://127.0.0.1:{port}"
        cluster.shutdown()


def test_report_holds_what_was_measured(one_node: Path) -> None:
    report = json.loads((one_node / "evaluation" / "report.json").read_text())
    overall = report["overall"]
    assert overall["lossless_total"] >= overall["prompts"] > 0
    assert overall["lossless_identical"] + overall["lossless_near_tie"] == overall["lossless_total"]
    assert {"autoregressive", "chosen", "tree_16", "untrained_16", "hf_generate"} == set(
        overall["ways"]
    )
    page = (one_node / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5


def test_finished_stages_are_skipped(one_node: Path) -> None:
    done = _run([sys.executable, "-m", "jobs.quickstart", *SMOKE, f"output={one_node}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished before, skipped") == 5


def test_two_raylets_give_the_result_of_one(
    one_node: Path, two_raylets: str, tmp_path: Path
) -> None:
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "job", "submit", "--address", two_raylets, "--working-dir", "."]
    output = tmp_path / "run"
    done = _run([*command, "--", "python", "-m", "jobs.quickstart", *SMOKE, f"output={output}"])
    assert done.returncode == 0, done.stdout + done.stderr
    _assert_same_result(one_node, output)
    # A replica that starts late may find the few shards of this size done by the other, so that
    # tests/cluster/test_extraction_faults.py is what counts the nodes of extraction.
    assert json.loads((output / "draft" / "report.json").read_text())["nodes"] == 2


def test_exit_codes_pass_through_aerie_submit(two_raylets: str, tmp_path: Path) -> None:
    aerie = [sys.executable, "-m", "core.cli", "submit", "quickstart", "--address", two_raylets]
    for overrides, said in (
        (["output=relative/path"], "absolute path"),
        ([f"output={tmp_path}/x", "train.lrr=1"], "did you mean train.lr"),
        ([f"output={tmp_path}/x", "data.path=/no/such/file.json"], "no such file"),
    ):
        done = _run([*aerie, *SMOKE, *overrides])
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stdout
        assert "Traceback" not in done.stdout


def test_a_record_that_is_no_conversation(two_raylets: str, tmp_path: Path) -> None:
    """The others go on and are counted; the job ends with 2 and says what to do."""
    records = json.loads((ROOT / "configs" / "smoke_conversations.json").read_text())
    data = tmp_path / "chats.json"
    data.write_text(json.dumps([*records, {"foo": 1}]))
    aerie = [sys.executable, "-m", "core.cli", "submit", "quickstart", "--address", two_raylets]
    done = _run([*aerie, *SMOKE, f"data.path={data}", f"output={tmp_path}/run"])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "data.max_bad_records" in done.stdout
    assert "Traceback" not in done.stdout
    assert len(list((tmp_path / "run" / "examples" / "train").glob("*.parquet"))) > 0


@pytest.mark.soak
def test_kills_change_nothing(one_node: Path, tmp_path: Path) -> None:
    """SIGKILL amid features and again amid training; then to the end."""
    output = tmp_path / "run"

    command = [sys.executable, "-m", "jobs.quickstart", *SMOKE, f"output={output}"]

    def some_shard_is_done() -> bool:
        # The sidecar, which is written last, makes a shard a finished one.
        return any((output / "features" / "train").glob("shard-*.json"))

    def training_is_under_way() -> bool:
        log = output / "draft" / "metrics.jsonl"
        return log.exists() and log.stat().st_size > 0

    _run_until(some_shard_is_done, command)
    assert not (output / "features" / "report.json").exists()
    finished = next((output / "features" / "train").glob("shard-*.json"))
    shard = finished.with_suffix(".safetensors")
    written = shard.stat().st_mtime_ns
    _run_until(training_is_under_way, command)
    assert not (output / "draft" / "report.json").exists()
    assert shard.stat().st_mtime_ns == written, "a finished shard was computed again"
    done = _run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished before, skipped") == 3
    _assert_same_result(one_node, output)


def _assert_same_result(expected: Path, got: Path) -> None:
    """Same examples, features and weights by the byte, same answers by the token."""
    files = [*expected.glob("examples/*/*.parquet"), *expected.glob("features/*/*.safetensors")]
    assert len(files) >= 6
    for file in [*files, expected / "draft" / "head" / "model.safetensors"]:
        assert (got / file.relative_to(expected)).read_bytes() == file.read_bytes(), file
    assert read_manifest(got / "features") == read_manifest(expected / "features")
    ours, theirs = _answers(expected), _answers(got)
    assert ours == theirs


def _answers(output: Path) -> dict[str, Any]:
    """Tokens of each answer; `chosen` is left out, since its tree is chosen by time."""
    lines = (output / "evaluation" / "outputs.jsonl").read_text("utf-8").split("\n")[:-1]
    results = {values["id"]: values for values in map(json.loads, lines)}
    return {
        name: {
            way: [answer["token_ids"] for answer in repeats]
            for way, repeats in values["answers"].items()
            if way != "chosen"
        }
        for name, values in results.items()
    }


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def _run_until(reached: Callable[[], bool], command: list[str]) -> None:
    """Start a run and SIGKILL all of it, Ray included, as soon as `reached`."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | _settings()


def _settings() -> dict[str, str]:
    # Both Python and Ray's command line are found beside the interpreter that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PATH": path}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
