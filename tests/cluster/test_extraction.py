"""The stage extract_features as a job: what it writes, goes on with, refuses and survives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.data.examples import (
    Example,
    ExampleMetadata,
    read_examples,
    read_metadata,
    shard_name,
    write_examples,
)
from core.data.feature_shards import FeatureDataset
from core.data.template import template_hash, tokenizer_hash
from core.errors import StageError
from core.models.target import target_fingerprint
from core.models.tiny import byte_tokenizer, save_tiny_target
from core.models.weights import load_embedding
from core.runtime.pool import MAX_ATTEMPTS, count_attempt
from jobs import benchmark, train_draft
from jobs.extract_features import main

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_target(folder)
    return folder


def write_split(folder: Path, split: str, shards: int, seed: int, count: int = 12) -> None:
    generator = np.random.default_rng(seed)
    tokenizer = byte_tokenizer()
    metadata = ExampleMetadata(
        split, tokenizer_hash(tokenizer), template_hash(tokenizer), max_length=200, cleaning={}
    )
    for number in range(shards):
        examples = []
        for i in range(count):
            length = int(generator.integers(4, 200))
            ids = generator.integers(0, len(tokenizer), length, dtype=np.int32)
            mask = generator.integers(0, 2, length, dtype=np.uint8)
            examples.append(Example(f"{split}-{number}-{i}", ids, mask, "made", 2))
        write_examples(folder / split / shard_name(number), examples, metadata)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_split(folder, "train", shards=4, seed=0)
    write_split(folder, "held_out", shards=1, seed=1)
    return folder


def arguments(examples: Path, target: Path, output: Path, *more: str) -> list[str]:
    return [
        f"data.examples={examples}",
        f"target.path={target}",
        f"output={output}",
        "target.dtype=float32",
        "features.dtype=float32",
        "features.batch_tokens=512",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
    examples: Path,
    target: Path,
) -> Path:
    """A whole extraction that nothing disturbed."""
    output = tmp_path_factory.mktemp("features") / "out"
    assert main(arguments(examples, target, output)) == 0
    return output


def checksums(folder: Path) -> dict[str, str]:
    """Of every file that later stages read."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/*"))
        if not path.name.startswith(".")
    }


def modification_times(folder: Path) -> dict[Path, int]:
    """Of the shards that are finished."""
    return {
        path.relative_to(folder): path.with_suffix(".safetensors").stat().st_mtime_ns
        for path in folder.glob("*/*.json")
    }


def report_of(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "report.json").read_text())
    return content


def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_features_are_those_of_a_plain_forward(
    finished: Path, examples: Path, target: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for split, shards in (("train", 4), ("held_out", 1)):
        dataset = FeatureDataset(finished, split, target=target_fingerprint(target))
        expected = [
            example
            for number in range(shards)
            for example in read_examples(examples / split / shard_name(number))
        ]
        assert len(dataset) == len(expected)
        for index, example in enumerate(expected):
            found = dataset[index]
            assert found.input_ids.tolist() == example.input_ids_T.tolist()
            assert found.loss_mask.tolist() == example.loss_mask_T.astype(bool).tolist()
            with torch.inference_mode():
                output = model(found.input_ids[None], output_hidden_states=True)
            # Two layers in float32, summed in another order: a few units in the last place.
            torch.testing.assert_close(
                found.features[:, 0], output.hidden_states[-1][0], rtol=1e-4, atol=1e-5
            )


def test_report(finished: Path) -> None:
    report = report_of(finished)
    assert report["train_tokens"] == FeatureDataset(finished, "train").num_tokens
    assert report["held_out_tokens"] == FeatureDataset(finished, "held_out").num_tokens
    assert report["bytes"] == sum(p.stat().st_size for p in finished.glob("*/*.safetensors"))
    assert (report["shards"], report["shards_before"]) == (5, 0)
    assert (report["replicas"], report["nodes"]) == (2, 1)
    assert (report["hidden_size"], report["features_dtype"]) == (32, "float32")
    assert 0 <= float(str(report["padding_waste"])) < 0.1
    assert float(str(report["tokens_per_second"])) > 0


def test_a_shard_that_is_missing_is_computed_alone(
    finished: Path, examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy(finished, tmp_path)
    before = modification_times(output)
    (output / "train" / "shard-00002.safetensors").unlink()
    (output / "report.json").unlink()
    # One replica now, two before.
    assert main(arguments(examples, target, output, "features.num_replicas=1")) == 0
    assert report_of(output)["shards_before"] == 4
    assert "4 of 5 shards were finished before" in capsys.readouterr().out
    assert checksums(output) == checksums(finished)
    after = modification_times(output)
    changed = [str(path) for path in before if after[path] != before[path]]
    assert changed == ["train/shard-00002.json"]


def test_verify_finds_a_flipped_bit_and_the_next_run_mends_it(
    finished: Path, examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy(finished, tmp_path)
    command = arguments(examples, target, output)
    assert main([*command, "--verify"]) == 0
    assert "relative error" in capsys.readouterr().out
    shard = output / "held_out" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert main([*command, "--verify"]) == 2
    assert str(shard) in capsys.readouterr().err
    assert main(command) == 0
    assert report_of(output)["shards_before"] == 4
    assert checksums(output) == checksums(finished)


def test_verify_finds_features_that_the_target_does_not_give(
    finished: Path, examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The right checksum of the wrong content: here, examples that were made anew since."""
    output = copy(finished, tmp_path)
    other = Path(shutil.copytree(examples, tmp_path / "other"))
    write_split(other, "train", shards=4, seed=5)
    assert main([*arguments(other, target, output), "--verify"]) == 2
    assert "is not that of data.examples" in capsys.readouterr().err


def test_training_names_a_cut_off_shard_and_following_the_message_mends_it(
    finished: Path, examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy(finished, tmp_path)
    shard = output / "train" / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    before = modification_times(output)
    training = [f"features.path={output}", f"target.path={target}", f"output={tmp_path / 'draft'}"]
    training += ["train.global_batch_size=2", "train.warmup_steps=1"]
    assert train_draft.main(training) == 2
    error = capsys.readouterr().err
    assert f"{shard} is missing, cut off or unfinished" in error and error.count("\n") == 1
    assert "once with --verify" in error and "once without" in error
    command = arguments(examples, target, output)
    assert main([*command, "--verify"]) == 2
    assert main(command) == 0
    assert checksums(output) == checksums(finished)
    after = modification_times(output)
    assert [str(p) for p in after if after[p] != before.get(p)] == ["train/shard-00001.json"]


def test_layers_likely_tokens_and_int8_from_one_command(
    examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["features.layers=[0, 1]", "features.top_logits=3", "features.dtype=int8"]
    command = arguments(examples, target, tmp_path / "out", *more)
    assert main(command) == 0
    report = report_of(tmp_path / "out")
    assert report["feature_layers"] == [0, 1, 2]
    # Of 32 values and a scale, three layers; three tokens with a probability each; ids and mask.
    assert 3 * 34 + 3 * 6 + 5 <= float(str(report["bytes_per_token"])) < 3 * 34 + 3 * 6 + 7
    assert main([*command, "--verify"]) == 0
    assert "relative error" in capsys.readouterr().out
    example = FeatureDataset(tmp_path / "out", "train")[0]
    assert example.features.shape[1:] == (3, 32) and example.top is not None
    embedding = load_embedding(target)[example.input_ids]
    # What enters layer 0 is the embedding.
    torch.testing.assert_close(example.features[:, 0], embedding, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("features.layers=eagle3", "features.layers=eagle3 (2, 1, -1)"),
        ("features.top_logits=300", "features.top_logits=300 exceeds the target's vocabulary"),
        ("features.gpus_per_replica=2", "set target.device_map=auto to spread it"),
        ("target.device_map=balanced", "set features.gpus_per_replica to the GPUs of a replica"),
        ("features.min_replicas=3", "features.min_replicas=3 exceeds features.num_replicas=2"),
    ],
)
def test_settings_that_cannot_be(
    examples: Path,
    target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    said: str,
) -> None:
    assert main(arguments(examples, target, tmp_path / "out", override)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "train").exists()


def test_benchmark(examples: Path, target: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = arguments(examples, target, output, "features.num_replicas=1")
    assert benchmark.main([*command, "benchmark.repeats=2"]) == 0
    report = report_of(output)
    ways, ratios = report["ways"], report["ratios"]
    assert isinstance(ways, dict) and isinstance(ratios, dict)
    assert list(ways) == ["reference", "reference_without_logits", "bare_loop", "ray_pipeline"]
    for figures in ways.values():
        assert 0 < figures["tokens_per_second"]["min"] <= figures["tokens_per_second"]["max"]
    # The pool writes what the bare loop writes.
    assert ways["bare_loop"]["bytes_per_token"] == ways["ray_pipeline"]["bytes_per_token"]
    assert 0 <= ways["bare_loop"]["padding_waste"]["median"] < 0.1
    assert ratios["bare_loop_speed_to_reference"]["at_least"] == 1.3
    assert ratios["ray_pipeline_time_to_bare_loop"]["at_most"] == 1.1
    storage = report["storage"]
    assert isinstance(storage, dict)
    assert storage["float32"]["error"] == 0 < storage["int8"]["error"] < 0.02
    assert storage["int8"]["bytes_per_token"] < 0.6 * storage["bfloat16"]["bytes_per_token"]
    assert not (output / "work").exists()
    few = [*arguments(examples, target, tmp_path / "few"), "benchmark.max_tokens=2500"]
    assert benchmark.main(few) == 2


def test_inspect_prints_shapes_and_norms(
    finished: Path, examples: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(examples, target, finished), "--inspect", "2"]) == 0
    printed = capsys.readouterr().out
    length = len(FeatureDataset(finished, "train")[1].input_ids)
    assert f"1: {length} tokens" in printed
    assert f"features [{length}, 1, 32] torch.float32, norm" in printed
    assert "held_out: 12 examples" in printed


def test_another_target_is_refused(
    finished: Path, examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy(finished, tmp_path)
    save_tiny_target(tmp_path / "target", seed=1)
    command = arguments(examples, tmp_path / "target", output)
    assert main([*command, "--verify"]) == 2
    assert "its features come from the target" in capsys.readouterr().err
    assert main(command) == 2
    assert "the content of target.path" in capsys.readouterr().err
    (output / "run.yaml").unlink()
    (output / "report.json").unlink()
    assert main(command) == 2
    assert "no run of Aerie" in capsys.readouterr().err
    assert checksums(output) == checksums(finished)


def test_what_a_replica_refuses_ends_the_run_with_one_message(
    examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(examples, tmp_path / "other"))
    shard = other / "train" / shard_name(1)
    long, *rest = read_examples(shard)
    most = AutoConfig.from_pretrained(target).max_position_embeddings
    ids = np.zeros(most + 1, dtype=np.int32)
    mask = np.ones(most + 1, dtype=np.uint8)
    metadata = read_metadata(shard)
    write_examples(shard, [Example("long", ids, mask, "made", 2), long, *rest], metadata)
    assert main(arguments(other, target, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert f"example 'long' has {most + 1} tokens, the target takes {most}" in message
    assert "Traceback" not in message


def test_examples_of_another_tokenizer_are_refused(
    examples: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = ExampleMetadata("train", "another", "template", max_length=200, cleaning={})
    path = examples / "train" / shard_name(0)
    write_examples(tmp_path / "x" / "train" / path.name, read_examples(path), metadata)
    (tmp_path / "x" / "held_out").mkdir()
    assert main(arguments(tmp_path / "x", target, tmp_path / "out")) == 2
    assert "another tokenizer" in capsys.readouterr().err


def replica_processes() -> list[int]:
    """Process ids of the replicas of this test's Ray."""
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "_Replica" in " ".join(process.cmdline())
    ]


@pytest.mark.slow
def test_a_killed_replica_costs_nothing_but_its_shard(target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    write_split(folder, "train", shards=12, seed=2, count=300)
    (folder / "held_out").mkdir()
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert main(arguments(folder, target, undisturbed)) == 0
    finished_at_kill: dict[Path, int] = {}

    def kill_a_replica_after_two_shards() -> None:
        while len(list(output.glob("train/*.json"))) < 2:
            time.sleep(0.02)
        finished_at_kill.update(modification_times(output))
        os.kill(max(replica_processes()), signal.SIGKILL)

    killer = threading.Thread(target=kill_a_replica_after_two_shards)
    killer.start()
    assert main(arguments(folder, target, output)) == 0
    killer.join(timeout=60)
    assert 2 <= len(finished_at_kill) < 11, "the kill came too late to show anything"
    after = modification_times(output)
    assert {path: after[path] for path in finished_at_kill} == finished_at_kill
    assert checksums(output) == checksums(undisturbed)
    assert not list(output.glob("*/.*")), "a killed writer's leftovers"


def test_a_shard_that_kills_every_replica_does_not_do_so_for_ever(
    examples: Path, target: Path, tmp_path: Path
) -> None:
    """The count outlives a replica, but not the run."""
    output = tmp_path / "out"
    shard = output / "train" / "shard-00000.safetensors"
    for _ in range(MAX_ATTEMPTS):
        count_attempt(shard, "Lower features.batch_tokens")
    with pytest.raises(StageError, match=r"4 replicas crashed .*features\.batch_tokens"):
        count_attempt(shard, "Lower features.batch_tokens")
    assert main(arguments(examples, target, output)) == 0
    assert not list(output.glob("*/.*"))
