"""Five kills during one extraction: replicas, raylets and the driver; and a disk that fills up."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from core.config import TargetConfig
from core.data.examples import Example, ExampleMetadata, read_examples, shard_name, write_examples
from core.data.feature_manifest import read_manifest
from core.data.template import template_hash, tokenizer_hash
from core.models.features import extract_shard
from core.models.target import load_target
from core.models.tiny import byte_tokenizer, save_tiny_target
from jobs.extract_features import main

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BATCH_TOKENS = 512
SHARDS, EXAMPLES = 40, 120
# One of each after another: a shard in flight at two kills in a row is still within what a run
# takes for bad luck, and a new driver begins counting anew.
VICTIMS = ("replica", "raylet", "driver", "replica", "raylet")
PATIENCE = 180.0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_target(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    generator, tokenizer = np.random.default_rng(0), byte_tokenizer()
    metadata = ExampleMetadata(
        "train", tokenizer_hash(tokenizer), template_hash(tokenizer), max_length=200, cleaning={}
    )
    for number in range(SHARDS):
        made = []
        for i in range(EXAMPLES):
            length = int(generator.integers(4, 200))
            ids = generator.integers(0, len(tokenizer), length, dtype=np.int32)
            made.append(Example(f"{number}-{i}", ids, np.ones(length, np.uint8), "made", 2))
        write_examples(folder / "train" / shard_name(number), made, metadata)
    (folder / "held_out").mkdir()
    return folder


def arguments(examples: Path, target: Path, output: Path) -> list[str]:
    return [
        f"data.examples={examples}",
        f"target.path={target}",
        f"output={output}",
        "target.dtype=float32",
        "features.dtype=int8",
        "features.layers=[0, 1]",
        f"features.batch_tokens={BATCH_TOKENS}",
    ]


class Finished:
    """Watches a folder: which file a shard was when its mark first appeared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first: dict[str, tuple[int, int]] = {}
        self.in_flight: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Finished:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        for mark in self.folder.glob("train/[!.]*.json"):
            if mark.stem not in self.first:
                self.first[mark.stem] = self.now(mark.stem)

    def now(self, stem: str) -> tuple[int, int]:
        stat = (self.folder / "train" / f"{stem}.safetensors").stat()
        return stat.st_ino, stat.st_mtime_ns

    def note_in_flight(self) -> None:
        """Before a kill: the shards that are being computed have a count of attempts."""
        found = {p.name.split(".")[1] for p in self.folder.glob("train/.*.attempts.tmp")}
        self.in_flight |= found

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.look()


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Nodes that have Aerie already, as from an image.

    Raylets that share a machine share the folder into which a job's code is unpacked, and each
    new one deletes it under the feet of the others' workers. Machines of their own do not.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000},
        )
        try:
            for _ in range(2):
                add_node(cluster)
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Replica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.pid)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.mark.soak
def test_five_kills_cost_nothing_but_the_shards_in_flight(
    examples: Path, target: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    chance = random.Random(0)
    with two_nodes() as cluster, Finished(output) as finished:
        command = [sys.executable, "-m", "jobs.extract_features"]
        command += [*arguments(examples, target, output), f"cluster.address={cluster.address}"]
        command += ["cluster.send_code=false"]
        log = (tmp_path / "log").open("w")

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

        driver = start()
        for victim in VICTIMS:
            there = len(finished.first)
            more = chance.randint(2, 4)
            wait_for(lambda: len(finished.first) >= there + more and replicas(), "shards")  # noqa: B023
            finished.note_in_flight()
            if victim == "driver":
                driver.kill()
                driver.wait()
                driver = start()
            elif victim == "replica":
                chance.choice(replicas()).kill()
            else:
                node = chance.choice(sorted(cluster.worker_nodes, key=lambda n: n.unique_id))
                cluster.remove_node(node, allow_graceful=False)
                add_node(cluster)
        assert len(finished.first) < SHARDS - 2, "the last kill came too late to show anything"
        code = driver.wait(timeout=PATIENCE)
        assert code == 0, (tmp_path / "log").read_text()
        finished.look()
        rewritten = {s for s in finished.first if finished.now(s) != finished.first[s]}
        assert len(finished.first) == SHARDS
        assert rewritten <= finished.in_flight
        assert len(finished.in_flight) <= 2 * len(VICTIMS)
    assert json.loads((output / "report.json").read_text())["nodes"] >= 2
    assert not list(output.glob("train/.*")), "a killed writer's leftovers"
    assert_as_undisturbed(examples, target, output, tmp_path / "undisturbed")


def assert_as_undisturbed(examples: Path, target: Path, output: Path, other: Path) -> None:
    """Byte for byte what one process makes of the examples, sidecars included."""
    manifest = read_manifest(output)
    loaded = load_target(TargetConfig(path=str(target), dtype="float32"), num_threads=1)
    for source in sorted((examples / "train").iterdir()):
        shard = other / "train" / f"{source.stem}.safetensors"
        extract_shard(loaded, read_examples(source), shard, manifest, BATCH_TOKENS)
        for path in (shard, shard.with_suffix(".json")):
            assert path.read_bytes() == (output / "train" / path.name).read_bytes(), path.name


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_when_there_is_room(
    examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    some = tmp_path / "some"
    for split in ("train", "held_out"):
        (some / split).mkdir(parents=True)
    for number in range(12):
        shutil.copy(examples / "train" / shard_name(number), some / "train")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
    try:
        output, ballast = disk / "out", disk / "ballast"

        def fill() -> None:
            wait_for(lambda: len(list(output.glob("train/[!.]*.json"))) >= 2, "two shards")
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

        filler = threading.Thread(target=fill)
        filler.start()
        command = arguments(some, target, output)
        assert main(command) == 2
        filler.join()
        error = capsys.readouterr().err
        assert str(output) in error and "No space left on device" in error
        assert "MB are free" in error and "Traceback" not in error and error.count("\n") == 1
        before = {p.name for p in output.glob("train/[!.]*.json")}
        assert 2 <= len(before) < 12
        assert not [p for p in output.glob("train/.*") if "attempts" not in p.name]
        assert not (output / "report.json").exists()
        ballast.unlink()
        assert main(command) == 0
        assert f"{len(before)} of 12 shards were finished before" in capsys.readouterr().out
        assert_as_undisturbed(some, target, output, tmp_path / "undisturbed")
    finally:
        ray.shutdown()
        subprocess.run(["umount", "-l", str(disk)], check=True)
