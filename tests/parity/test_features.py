"""Features against a plain forward pass of transformers: every storage type, layer and way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from core.config import DRAFT_CONFIGS, TargetConfig
from core.data.examples import Example
from core.data.feature_manifest import Manifest
from core.data.feature_shards import FeatureDataset, FeatureExample
from core.errors import ConfigError, InputError
from core.models import attention
from core.models.features import (
    check_layers,
    extract_shard,
    feature_layers,
    load_for_extraction,
)
from core.models.target import Target, load_target
from core.models.tiny import byte_tokenizer
from core.runtime.feature_checks import relative_errors, tolerance

SIZES = {"vocab_size": 259, "hidden_size": 96, "initializer_range": 0.1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
LAYERS = 8
EAGLE3 = (2, 4, 5, LAYERS)


def _save(config, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight layers; H = 96 is a group of 64 and a shorter one."""
    path = tmp_path_factory.mktemp("target")
    return _save(LlamaConfig(**SIZES, **HEADS, num_hidden_layers=LAYERS), path)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    generator = np.random.default_rng(0)
    made = []
    for number, length in enumerate((70, 5, 33, 34, 1, 120, 64, 31)):
        ids = generator.integers(3, 250, length, dtype=np.int32)
        made.append(Example(str(number), ids, np.ones(length, np.uint8), "made", 2))
    return made


def _extract(
    target: Target,
    examples: Sequence[Example],
    folder: Path,
    *,
    layers: tuple[int, ...],
    dtype: str,
    budget: int = 256,
    top: int = 0,
) -> FeatureDataset:
    manifest = Manifest(
        target=target.fingerprint,
        feature_layers=layers,
        final_norm=True,
        dtype=dtype,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        max_length=128,
        tokenizer_hash="tokenizer",
        template_hash="template",
        shards={"train": ("shard",)},
        top_logits=top,
    )
    manifest.write(folder)
    extract_shard(target, examples, folder / "train" / "shard.safetensors", manifest, budget)
    return FeatureDataset(folder, "train")


@functools.cache
def _model(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _plain(folder: Path, example: Example, dtype: torch.dtype):
    ids_1T = torch.from_numpy(example.input_ids_T).long()[None]
    with torch.inference_mode():
        return _model(folder, dtype)(ids_1T, output_hidden_states=True)


def _stacked(output, layers: Sequence[int]) -> torch.Tensor:
    return torch.stack([output.hidden_states[layer][0] for layer in layers], dim=1).float()


@pytest.mark.parametrize("budget", [16, 256], ids=["one_by_one", "bucketed"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("layers", [(LAYERS,), EAGLE3], ids=["eagle1", "eagle3"])
@pytest.mark.parametrize(
    ("computed", "stored"),
    [("float32", "float32"), ("float32", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")],
)
def test_features_are_those_of_a_plain_forward(
    folder: Path,
    examples: list[Example],
    tmp_path: Path,
    computed: str,
    stored: str,
    layers: tuple[int, ...],
    packed: bool,
    budget: int,
) -> None:
    config = TargetConfig.model_validate(
        {"path": str(folder), "dtype": computed, "pack_linear": packed}
    )
    target = load_target(config)
    dataset = _extract(target, examples, tmp_path, layers=layers, dtype=stored, budget=budget)
    dtype = getattr(torch, computed)
    allowed = tolerance(getattr(torch, stored), dtype, LAYERS, 96)
    worst = 0.0
    for index, example in enumerate(examples):
        found = dataset[index].features
        wanted = _stacked(_plain(folder, example, dtype), layers)
        assert found.shape == wanted.shape
        worst = max(worst, relative_errors(found, wanted).mean(0).max().item())
    assert worst <= allowed
    # The layers beside it are another thing altogether.
    if layers == EAGLE3:
        beside = _stacked(_plain(folder, examples[0], dtype), (1, 3, 6, 7))
        assert relative_errors(dataset[0].features, beside).mean(0).min() > 2 * allowed


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SIZES, **HEADS, num_hidden_layers=LAYERS),
        # As many experts as layers: their list must not be taken for that of the layers.
        MixtralConfig(**SIZES, **HEADS, num_hidden_layers=LAYERS, num_local_experts=LAYERS),
        GPTNeoXConfig(
            **SIZES, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128
        ),
        GPT2Config(vocab_size=259, n_embd=96, n_layer=LAYERS, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_of_other_architectures(config, examples: list[Example], tmp_path: Path) -> None:
    folder = _save(config, tmp_path / "target")
    target = load_target(TargetConfig(path=str(folder), dtype="float32", pack_linear=False))
    ids_1T = torch.from_numpy(examples[0].input_ids_T).long()[None]
    output = _plain(folder, examples[0], torch.float32)
    every = tuple(range(LAYERS + 1))
    for layer, found in zip(every, target.layer_features(ids_1T, None, every), strict=True):
        torch.testing.assert_close(found, output.hidden_states[layer], rtol=0, atol=1e-5)


def test_long_sequences_attend_in_blocks(folder: Path, tmp_path: Path) -> None:
    """Three examples in one batch, none a multiple of a block, in bfloat16 against float32."""
    generator = np.random.default_rng(1)
    examples = [
        Example(str(n), generator.integers(3, 250, n, dtype=np.int32), np.ones(n, np.uint8), "", 2)
        for n in (300, 301, 257)
    ]
    target = load_for_extraction(TargetConfig(path=str(folder), dtype="bfloat16"), 1)
    assert target.model.config._attn_implementation == attention.NAME
    dataset = _extract(target, examples, tmp_path, layers=EAGLE3, dtype="bfloat16", budget=1024)
    allowed = tolerance(torch.bfloat16, torch.bfloat16, LAYERS, 96)
    for index, example in enumerate(examples):
        wanted = _stacked(_plain(folder, example, torch.float32), EAGLE3)
        assert relative_errors(dataset[index].features, wanted).mean(0).max() <= allowed


@pytest.mark.parametrize("tokens", [256, 300, 513])
@pytest.mark.parametrize("keys", [1, 3, 6])
def test_block_attention_is_attention(tokens: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, tokens, 16, generator=generator).bfloat16()
    key, value = torch.randn(2, 2, keys, tokens, 16, generator=generator).bfloat16()
    found, _ = attention.block_attention(torch.nn.Module(), query, key, value, None, scaling=0.25)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    # Scores and weights are rounded to bfloat16, 2⁻⁹ each, and sums of weights are near 1.
    torch.testing.assert_close(found.float(), wanted, rtol=2**-6, atol=2**-6)


def test_a_mask_is_obeyed(folder: Path) -> None:
    """What is not plain causal attention is left to torch's kernel."""
    ids_BT = torch.randint(3, 250, (2, 300), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones(2, 300, dtype=torch.int64)
    mask_BT[1, :40] = 0
    config = TargetConfig(path=str(folder), dtype="bfloat16")
    found = load_for_extraction(config, 1).features(ids_BT, mask_BT)
    wanted = load_target(config, 1).features(ids_BT, mask_BT)
    is_token = mask_BT.bool()
    torch.testing.assert_close(found[is_token], wanted[is_token])


def test_likeliest_tokens(folder: Path, examples: list[Example], tmp_path: Path) -> None:
    target = load_target(TargetConfig(path=str(folder), dtype="float32"))
    dataset = _extract(target, examples, tmp_path, layers=(LAYERS,), dtype="int8", top=5)
    for index, example in enumerate(examples):
        top = dataset[index].top
        assert top is not None and top.ids_TK.dtype == torch.int32
        log_probs_TV = _plain(folder, example, torch.float32).logits[0].log_softmax(-1)
        wanted = log_probs_TV.topk(5)
        # float16 near -8 has steps of 2⁻⁸; as for the ids, random logits hold no ties.
        torch.testing.assert_close(top.log_probs_TK.float(), wanted.values, rtol=0, atol=5e-3)
        near = (wanted.values[:, :-1] - wanted.values[:, 1:]).amin(-1) < 1e-3
        assert torch.equal(top.ids_TK.long()[~near], wanted.indices[~near])
        assert near.float().mean() < 0.2


def test_shards_without_likeliest_tokens_have_none(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    target = load_target(TargetConfig(path=str(folder), dtype="float32"))
    dataset = _extract(target, examples[:1], tmp_path, layers=(LAYERS,), dtype="float32")
    example: FeatureExample = dataset[0]
    assert example.top is None


def test_features_that_overflow_are_refused(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    target = load_target(TargetConfig(path=str(folder), dtype="float16"))
    with torch.no_grad():
        target.model.get_input_embeddings().weight.fill_(6e4)
        target.model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(InputError, match=r"not finite.*overflows float16.*target\.dtype=bfloat16"):
        _extract(target, examples[:1], tmp_path, layers=(1, LAYERS), dtype="bfloat16")


@pytest.mark.parametrize(("quantization", "near"), [("int8", 0.2), ("nf4", 0.6)])
def test_quantized_targets(
    tmp_path: Path, examples: list[Example], quantization: str, near: float
) -> None:
    """NF4 wants rows of whole 64 weights. Its steps are 16 times those of int8, and both add up
    over eight random layers; another model's features would be off by 1.4.
    """
    sizes = {**SIZES, **HEADS, "hidden_size": 128}
    folder = _save(LlamaConfig(**sizes, num_hidden_layers=LAYERS), tmp_path / "target")
    config = {"path": str(folder), "dtype": "bfloat16", "quantization": quantization}
    target = load_target(TargetConfig.model_validate(config))
    assert any(
        "bnb" in type(m).__module__ or "bitsandbytes" in type(m).__module__
        for m in target.model.modules()
    )
    dataset = _extract(target, examples, tmp_path / "out", layers=EAGLE3, dtype="int8")
    wanted = _stacked(_plain(folder, examples[0], torch.float32), EAGLE3)
    error = relative_errors(dataset[0].features, wanted).mean().item()
    assert 0.005 < error < near


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_map_needs_gpus(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"target\.device_map=auto spreads a target over GPUs"):
        load_target(TargetConfig(path=str(folder), device_map="auto"))


@pytest.mark.parametrize(
    ("layers", "count", "wanted"),
    [
        ("final", 30, (30,)),
        ("eagle3", 30, (2, 15, 27, 30)),
        ("eagle3", 32, (2, 16, 29, 32)),
        ((9, 0), 30, (0, 9, 30)),
        ((30, 4), 30, (4, 30)),
        ((), 30, (30,)),
    ],
)
def test_which_layers(layers, count: int, wanted: tuple[int, ...]) -> None:
    assert feature_layers(layers, count) == wanted


@pytest.mark.parametrize(
    ("kind", "layers", "named", "fits"),
    [
        ("eagle1", "final", False, True),
        ("eagle1", "eagle3", False, True),
        ("eagle1", (2, 7), True, True),
        ("eagle3", "eagle3", False, True),
        ("eagle3", "final", False, False),
        # In a config the final feature may be left out; in a manifest it is always there.
        ("eagle3", (1, 4, 9), False, True),
        ("eagle3", (1, 4, 9, 12), False, True),
        ("eagle3", (1, 4, 9, 12), True, True),
        ("eagle3", (1, 4, 9), True, False),
        ("eagle3", (1, 4), False, False),
        ("eagle3", (1, 2, 4, 9, 12), True, False),
    ],
)
def test_features_that_a_head_cannot_read_are_refused(kind, layers, named, fits) -> None:
    draft = DRAFT_CONFIGS[kind].model_validate({})
    if fits:
        check_layers(draft, layers, final_named=named)
        return
    with pytest.raises(ConfigError, match=r"reads 3 states .* extract them with"):
        check_layers(draft, layers, final_named=named)


@pytest.mark.parametrize(
    ("layers", "count", "said"),
    [
        ("eagle3", 2, r"features\.layers=eagle3 \(2, 1, -1\)"),
        ("eagle3", 6, r"features\.layers=eagle3 \(2, 3, 3\)"),
        ((3, 31), 30, r"features\.layers=\[3, 31\]: give different layers between 0 and 30"),
        ((3, 3), 30, r"features\.layers=\[3, 3\]"),
    ],
)
def test_layers_that_are_not_there(layers, count: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        feature_layers(layers, count)
