"""finetune_target from conversations on a local Ray: as ever after a worker is killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.config import Config
from core.models.adapters import check_adapters, merge_adapters
from core.runtime.job import run_stage
from core.runtime.workers import FAILURES
from core.tracking import read_json_lines, read_metrics
from jobs.finetune_target import JOB

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_EVERY = 10
PATIENCE_SECONDS = 240


def _config(output: Path, steps: int = 60, **finetune: Any) -> Config:
    return Config().replace(
        output=str(output),
        convert={"source": "tiny-random", "dtype": "float32"},
        data={
            "path": str(ROOT / "configs" / "smoke_conversations.json"),
            "max_length": 128,
            "too_long": "cut",
            "held_out": 0.2,
        },
        finetune={"rank": 4, **finetune},
        train={
            "parallelism": "zero2",
            "num_workers": 2,
            "max_length": 96,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "lr": 0.003,
            "warmup_steps": 5,
            "epochs": steps,
            "max_steps": steps,
            "eval_every": 20,
            "checkpoint_every": CHECKPOINT_EVERY,
        },
        tracking={"wandb": "disabled"},
    )


def _curve(folder: Path) -> list[dict[str, Any]]:
    timed = ("time", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(folder)]


class _Killer(threading.Thread):
    """Kills a worker once, some steps behind the first checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.killed_after: int | None = None
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        step = random.randint(2 * CHECKPOINT_EVERY, 4 * CHECKPOINT_EVERY)
        while self.killed_after is None and time.monotonic() < deadline:
            time.sleep(0.02)
            last = max((record["step"] for record in read_metrics(self.folder)), default=0)
            if last < step:
                continue
            workers = [p.pid for p in psutil.Process().children(recursive=True) if _trains(p)]
            if workers:
                os.kill(random.choice(workers), signal.SIGKILL)
                self.killed_after = last


def _trains(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


@pytest.mark.soak
def test_a_killed_worker_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # So many that the worker is killed long before the end.
    undisturbed, killed = (_config(tmp_path / name, 240) for name in ("undisturbed", "killed"))
    report = dict(run_stage(JOB, undisturbed))
    assert report["steps"] == 240 and report["workers"] == 2
    assert report["final_loss"] <= 0.9 * report["initial_loss"]
    assert report["held_out_loss"] < report["held_out_loss_before"]
    assert report["tokens_per_second"] > 0

    killer = _Killer(tmp_path / "killed")
    again = dict(run_stage(JOB, killed))
    assert killer.killed_after is not None, "the run ended before a worker was killed"
    (failure,) = read_json_lines(tmp_path / "killed" / FAILURES)
    assert failure["workers"]
    assert "going on from the last checkpoint" in capfd.readouterr().out
    assert not (tmp_path / "undisturbed" / FAILURES).exists()
    same = ("initial_loss", "final_loss", "held_out_loss", "train_tokens", "model_step")
    assert {name: again[name] for name in same} == {name: report[name] for name in same}
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "undisturbed")
    models = [tmp_path / name / "model" for name in ("killed", "undisturbed")]
    found, wanted = (load_file(folder / "model.safetensors") for folder in models)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    # An HF folder like any other, and a finished run is not done again.
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    model = AutoModelForCausalLM.from_pretrained(models[0])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=4).shape[1] == prompt["input_ids"].shape[1] + 4
    assert run_stage(JOB, killed) == again


def test_adapters_are_all_that_a_checkpoint_holds(tmp_path: Path) -> None:
    report = dict(run_stage(JOB, _config(tmp_path / "out", method="qlora")))
    assert report["held_out_loss"] < report["held_out_loss_before"]
    base, adapters = tmp_path / "out" / "target" / "model", tmp_path / "out" / "adapter"
    (checkpoint,) = (tmp_path / "out" / "ray_train" / "target").glob("step-00000060")
    held = load_file(checkpoint / "engine.safetensors")
    assert {name.partition("/")[0] for name in held} == {"weights", "exp_avg", "exp_avg_sq"}
    assert all(".lora_" in name for name in held)
    trained = sum(t.numel() for name, t in held.items() if name.startswith("weights/"))
    assert trained == report["trained_parameters"] < 0.5 * report["parameters"]
    assert report["adapter_bytes"] == sum(file.stat().st_size for file in adapters.iterdir())
    assert report["checkpoint_bytes"] < 4.5 * report["adapter_bytes"]
    assert check_adapters(base, adapters) == "qlora"
    merged = merge_adapters(base, adapters)
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for name, parameter in merged.named_parameters():
        assert torch.equal(written[name], parameter.detach()), name
