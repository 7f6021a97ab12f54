"""A converted GGUF file against the values in the file itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from core.config import ConvertConfig, TargetConfig
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.models.convert import convert, source_path
from core.models.target import load_target, target_fingerprint
from tests.conftest import SMOLLM2_GGUF

# Stored as they are; queries and keys are stored with another order of rows.
SAME_LAYOUT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.17.ffn_down.weight": "model.layers.17.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    figures = convert(ConvertConfig(source=SMOLLM2_GGUF, dtype="float32"), folder)
    assert figures["parameters"] == 134_515_008
    return folder


@pytest.mark.slow
def test_the_weights_are_those_of_the_file(folder: Path) -> None:
    ours = load_file(folder / "model.safetensors")
    source = source_path(ConvertConfig(source=SMOLLM2_GGUF))
    stored = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for theirs, name in SAME_LAYOUT.items():
        tensor = stored[theirs]
        expected = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        # Both unpack the same blocks in float32.
        np.testing.assert_array_equal(ours[name].numpy(), expected, err_msg=name)


@pytest.mark.slow
def test_it_talks(folder: Path) -> None:
    """Queries, keys and the tokenizer too: a wrong order of rows gives noise."""
    target = load_target(TargetConfig(path=str(folder), dtype="float32"), num_threads=2)
    question = (Message("user", "What is the capital of France? Answer with its name."),)
    ids = torch.tensor([encode_prompt(target.tokenizer, question)])
    answer = target.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in target.tokenizer.decode(answer)


@pytest.mark.slow
def test_the_published_head_is_of_this_target(tmp_path: Path) -> None:
    """Where a release of transformers writes other configs, this head must be named anew."""
    convert(ConvertConfig(source=SMOLLM2_GGUF, dtype="bfloat16"), tmp_path / "model")
    assert target_fingerprint(tmp_path / "model").startswith("aaaedc6b9c3f")
