"""A served tiny model: what the tests of the HTTP service and of the page start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import Config, TargetConfig
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.decode.engine import SpeculativeDecoder
from core.draft.base import DraftBatch, TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target, load_target
from core.models.tiny import save_tiny_target
from core.models.weights import load_embedding, load_output_head
from core.runtime.load.servers import Server, aerie_server
from serve.keys import key_hash

ROOT = Path(__file__).parents[2]
MAX_CONTEXT = 1 << 16
PROMPTS = ("Hello!", "Tell me a story.", "What is 2 + 2?")
ADMIN_KEY = "for /admin"


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    config: Config
    server: Server


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
            "model_name": "tiny",
            "cpus_per_replica": 1,
            "admin_keys": (key_hash(ADMIN_KEY),),
            "autoscaling_log": str(folder / "autoscaling.jsonl"),
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


def expected_text(config: TargetConfig, prompt: str, max_new_tokens: int) -> str:
    """What a target alone answers."""
    target = load_target(config)
    tokens = greedy_answer(target, prompt, max_new_tokens)
    return str(target.tokenizer.decode(tokens, skip_special_tokens=True))


def answered(target: Target, prompt: str, max_new_tokens: int) -> DraftBatch:
    """A prompt and its greedy answer, with features, as a batch of one."""
    before = prompt_ids(target, prompt)
    ids_BT = torch.tensor([before + greedy_answer(target, prompt, max_new_tokens)])
    loss_mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    loss_mask_BT[:, len(before) :] = True
    features_BTLH = target.features(ids_BT).clone()[:, :, None]
    return DraftBatch(ids_BT, features_BTLH, loss_mask_BT, torch.tensor([ids_BT.shape[1]]))


@contextmanager
def serving(config: Config, folder: Path) -> Iterator[Served]:
    """Run `python -m serve.run` as a user would, and stop it as a user would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with aerie_server(config, folder) as server:
            yield Served(server.url, config, server)
