"""A served tiny model: what the tests of the HTTP service and of the page start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from core.config import Config
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.decode.engine import SpeculativeDecoder
from core.draft.base import DraftBatch, TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target, load_target
from core.models.tiny import save_tiny_target
from core.models.weights import load_embedding, load_output_head
from serve.keys import key_hash

ROOT = Path(__file__).parents[2]
MAX_CONTEXT = 1 << 16
PROMPTS = ("Hello!", "Tell me a story.", "What is 2 + 2?")
ADMIN_KEY = "for /admin"
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 90


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    config: Config


def make_models(folder: Path) -> Config:
    """A tiny target that never ends by itself, and a head that often guesses it right.

    An end token would come sooner or later in the babble of random weights. Without it, an answer
    lasts as long as it is asked to, so that a test can tell a cancelled one from a finished one.
    The head is honestly trained, if only on the answers to `PROMPTS`.
    """
    model = folder / "target"
    save_tiny_target(model)
    weights = load_file(model / "model.safetensors")
    settings = json.loads((model / "config.json").read_text())
    # Its logit is zero, and some other token's is always above.
    weights["lm_head.weight"][settings["eos_token_id"]] = 0
    settings["max_position_embeddings"] = MAX_CONTEXT
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(settings))
    config = Config().replace(
        target={"path": str(model), "dtype": "float32"},
        draft={"path": str(folder / "head")},
        decode={"total_tokens": 16, "max_context": MAX_CONTEXT, "cache_tokens": MAX_CONTEXT + 100},
        serve={
            "port": free_port(),
            "model_name": "tiny",
            "cpus_per_replica": 1,
            "admin_keys": (key_hash(ADMIN_KEY),),
        },
        cluster={"address": "local", "num_cpus": 2, "object_store_mb": 100},
    )
    with one_thread():
        train_head(config, steps=60)
    return config


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small take longer with two, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_head(config: Config, steps: int) -> None:
    """Overfit a head on the target's own greedy answers to `PROMPTS`."""
    target = load_target(config.target)
    model, path = Path(config.target.path or ""), Path(config.draft.path)
    vocabulary = DraftVocabulary.whole(target.vocab_size)
    head = build_head(config.draft, TargetGeometry.of(target.model.config), vocabulary)
    head.attach_target(load_embedding(model), load_output_head(model))
    batches = [answered(target, prompt, 160) for prompt in PROMPTS]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        for batch in batches:
            sums = head.losses(batch)
            optimizer.zero_grad()
            (sums.loss / sums.num_tokens).backward()
            optimizer.step()
    save_head(path, head, {"target_fingerprint": target.fingerprint})


def prompt_ids(target: Target, prompt: str) -> list[int]:
    return encode_prompt(target.tokenizer, [Message("user", prompt)])


def greedy_answer(target: Target, prompt: str, max_new_tokens: int) -> list[int]:
    """The tokens of plain greedy decoding."""
    decoder = SpeculativeDecoder(target, None, Config().decode)
    rounds = decoder.generate(prompt_ids(target, prompt), max_new_tokens=max_new_tokens)
    return [token for one in rounds for token in one.tokens]


def answered(target: Target, prompt: str, max_new_tokens: int) -> DraftBatch:
    """A prompt and its greedy answer, with features, as a batch of one."""
    before = prompt_ids(target, prompt)
    ids_BT = torch.tensor([before + greedy_answer(target, prompt, max_new_tokens)])
    loss_mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    loss_mask_BT[:, len(before) :] = True
    features_BTLH = target.features(ids_BT).clone()[:, :, None]
    return DraftBatch(ids_BT, features_BTLH, loss_mask_BT, torch.tensor([ids_BT.shape[1]]))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(config: Config, folder: Path) -> Iterator[Served]:
    """Run `python -m serve.run` as a user would, and stop it as a user would."""
    (folder / "serve.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    log = folder / "serve.log"
    command = [sys.executable, "-m", "serve.run", "--config", str(folder / "serve.yaml")]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until_ready(process, log)
        yield Served(f"http://127.0.0.1:{config.serve.port}", config)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_TIMEOUT_S) == 0, log.read_text()
    finally:
        if process.poll() is None:
            # Ray's processes end with the one that started them.
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ready: " not in log.read_text():
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the server did not start:\n{log.read_text()}"
        time.sleep(0.2)
