"""The layers of a pipeline, against the HF model they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, MixtralConfig

from core.errors import ConfigError, InputError
from core.models.partition import balance
from core.models.stage_loss import IGNORED, StageLoss
from core.models.stages import (
    DecoderLayer,
    Entry,
    FinalNorm,
    ModelStages,
    OutputHead,
    TokenEmbedding,
)
from tests.tiny_models import TINY_CONFIGS, save_tiny

WINDOWED: dict[str, Any] = {
    **TINY_CONFIGS,
    "mistral": lambda: MistralConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.2,
    ),
}
# Two packed sequences and padding in the first row, one sequence in the second.
POSITIONS_BT = torch.tensor(
    [[*range(7), *range(5), 0, 0, 0, 0], [*range(16)]],
)


@pytest.fixture(scope="module", params=WINDOWED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param) / "model", WINDOWED[request.param]())


def all_layers(stages: ModelStages) -> list[nn.Module]:
    """As a pipeline of one stage has them."""
    entry = [Entry(stages)] if stages.family.entry else []
    layers = [DecoderLayer(stages, index) for index in range(stages.num_layers)]
    head = [] if stages.tied else [OutputHead(stages)]
    built = [TokenEmbedding(stages), *entry, *layers, FinalNorm(stages), *head]
    return [module.eval() for module in built]


def loss_of(stages: ModelStages, ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> StageLoss:
    """The loss, gone backward."""
    pair = (ids_BT, POSITIONS_BT)
    for layer in all_layers(stages):
        pair = layer(pair)
    loss = stages.loss()
    loss(pair, targets_BT).backward()
    return loss


def test_layers_in_a_row_are_the_model(folder: Path):
    """Loss and every gradient, of packed and padded rows; HF's model reads each sequence alone."""
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, 67, POSITIONS_BT.shape, generator=draw)
    targets_BT = torch.roll(ids_BT, -1, dims=1)
    # Questions, last tokens and padding.
    targets_BT[:, :3] = targets_BT[0, 6] = targets_BT[0, 11:] = targets_BT[1, 15] = IGNORED
    stages = ModelStages(folder)
    loss = loss_of(stages, ids_BT, targets_BT)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count, hits = torch.zeros(()), 0, 0
    for row, start, stop in ((0, 0, 7), (0, 7, 12), (1, 0, 16)):
        logits_TV = reference(ids_BT[row : row + 1, start:stop]).logits[0]
        total = total + functional.cross_entropy(
            logits_TV, targets_BT[row, start:stop], reduction="sum", ignore_index=IGNORED
        )
        hits += int((logits_TV.argmax(-1) == targets_BT[row, start:stop]).sum())
        count += int((targets_BT[row, start:stop] != IGNORED).sum())
    total.backward()
    assert loss.sums[0].tolist() == [pytest.approx(total.item(), rel=1e-6), count, hits]
    names = stages.names()
    assert list(names) == [name for name, _ in reference.named_parameters()]
    for name, parameter in reference.named_parameters():
        assert torch.equal(names[name], parameter), name
        found = names[name].grad
        assert found is not None, name
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_stage_reads_its_own_weights_alone(folder: Path):
    stages = ModelStages(folder)
    layer = DecoderLayer(stages, 1)
    built = set(stages.names())
    (own,) = [names for names in stages.block_names() if built & set(names)]
    assert built == set(own)
    assert {name for name, _ in layer.module.named_parameters()} == {
        name.split(".1.", 1)[1] for name in own
    }


def test_the_blocks_have_all_weights_once(folder: Path):
    stages = ModelStages(folder)
    blocks = stages.block_names()
    assert len(blocks) == stages.num_layers + 2
    assert [name for names in blocks for name in names] == list(stages.shapes())
    assert not stages.names(), "nothing is loaded for that"
    sizes = stages.spec_bounds([0, 1, 3, stages.num_layers + 2])
    specs = stages.num_layers + 3 + bool(stages.family.entry)
    assert sizes == [0, 1, 3, specs] or (stages.family.entry and sizes == [0, 2, 4, specs])
    assert sum(balance(stages.costs(rows=2, tokens=16), 2)) == len(blocks)


def test_random_weights_do_not_depend_on_the_stage():
    config = MixtralConfig(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    alone, together = ModelStages(config, seed=3), ModelStages(config, seed=3)
    DecoderLayer(alone, 1)
    all_layers(together)
    assert alone.names()
    for name, parameter in alone.names().items():
        assert torch.equal(parameter, together.names()[name]), name
    other = ModelStages(config, seed=4)
    DecoderLayer(other, 1)
    experts = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(other.names()[experts], alone.names()[experts])


def test_experts_count_as_far_as_a_token_meets_them():
    config = TINY_CONFIGS["mixtral"]()
    costs = ModelStages(config).costs(rows=1, tokens=64)
    config.num_experts_per_tok = 4
    busier = ModelStages(config).costs(rows=1, tokens=64)
    assert busier[1].seconds > costs[1].seconds
    assert busier[1].held_bytes == costs[1].held_bytes
    assert busier[0] == costs[0]


def test_a_routers_loss_is_off_and_refused_where_it_is_not():
    config = TINY_CONFIGS["mixtral"]()
    assert config.output_router_logits is False
    config.output_router_logits = True
    with pytest.raises(ConfigError, match="output_router_logits"):
        ModelStages(config)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="gemma2; pipelines know bloom, gpt2, llama"):
        ModelStages(Gemma2Config())


def test_a_missing_and_a_misshapen_weight_are_named(tmp_path: Path):
    folder = save_tiny(tmp_path, TINY_CONFIGS["llama"]())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    DecoderLayer(ModelStages(folder), 0)
    with pytest.raises(InputError, match=rf"lack 1 weights .* {name}"):
        DecoderLayer(ModelStages(folder), 1)
    save_file(tensors | {name: tensors[name][1:].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"do not fit its config.json: .*{name}"):
        DecoderLayer(ModelStages(folder), 1)


def test_a_truncated_file_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path, TINY_CONFIGS["llama"]())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        DecoderLayer(ModelStages(folder), 0)
