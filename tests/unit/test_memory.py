from __future__ import annotations

import pytest
import torch

from core.config import TargetConfig
from core.evaluate.memory import memory_figures, read_bandwidth, weight_bytes
from core.models.target import Target, load_target


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("packed", [True, False])
def test_a_plain_step_reads_every_linear_layer(
    tiny_target_folder, dtype: str, size: int, packed: bool
) -> None:
    config = TargetConfig(path=str(tiny_target_folder), dtype=dtype, pack_linear=packed)
    model = load_target(config).model
    shape = model.config
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    head_size = hidden // heads
    layer = hidden * head_size * (2 * heads + 2 * shape.num_key_value_heads)
    layer += 3 * hidden * shape.intermediate_size
    wanted = shape.num_hidden_layers * layer + shape.vocab_size * hidden
    assert weight_bytes(model) == wanted * size


def test_memory_bounds_plain_decoding(tiny_target: Target) -> None:
    assert 1e8 < read_bandwidth(torch.device("cpu")) < 1e13
    figures = memory_figures(tiny_target)
    assert figures["tokens_per_second_limit"] == pytest.approx(
        figures["bytes_per_second"] / figures["weight_bytes_per_token"]
    )
