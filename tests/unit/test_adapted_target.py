"""A target with adapters: what `target.adapter` makes of a folder, and the heads that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import Config, ConvertConfig, FinetuneConfig, TargetConfig
from core.decode.load import load_head_for
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import ConfigError, InputError, MismatchError
from core.models.adapters import adapted_fingerprint, load_for_training, save_adapters
from core.models.convert import convert
from core.models.target import load_target, target_fingerprint
from tests.tiny_targets import save_tiny


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Adapters that do something, upon the target in the folder `base` beside them."""
    base = save_tiny(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    finetune = FinetuneConfig.model_validate({"method": "lora", "rank": 4, "alpha": 8})
    model = load_for_training(base, finetune, torch.float32)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    weights = {n: w + 0.1 if "lora_B" in n else w for n, w in weights.items()}
    save_adapters(tmp_path / "adapter", weights, finetune, base, str(base))
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_with_adapters_is_the_folder_that_they_are_merged_to(
    adapter: Path, dtype: str
) -> None:
    base, merged = adapter.parent / "base", adapter.parent / "merged"
    convert(ConvertConfig(source=str(adapter), dtype="float32"), merged, base)
    settings: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    plain = load_target(TargetConfig(path=str(base), **settings))
    wanted = load_target(TargetConfig(path=str(merged), **settings))
    found = load_target(TargetConfig(path=str(base), adapter=str(adapter), **settings))
    ids_1T = torch.arange(3, 60)[None]
    torch.testing.assert_close(found.features(ids_1T), wanted.features(ids_1T), rtol=0, atol=0)
    assert not torch.allclose(found.features(ids_1T), plain.features(ids_1T), atol=0.1)
    assert found.eos_token_ids == wanted.eos_token_ids and found.dtype == wanted.dtype
    assert (found.fused is None) == (wanted.fused is None)
    assert found.base_fingerprint == plain.fingerprint != found.fingerprint
    assert plain.base_fingerprint is None


def test_other_adapters_are_another_target(adapter: Path) -> None:
    base = adapter.parent / "base"
    before = adapted_fingerprint(target_fingerprint(base), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, adapter / "adapter_model.safetensors")
    assert adapted_fingerprint(target_fingerprint(base), adapter) not in (
        before,
        target_fingerprint(base),
    )


def test_adapters_that_cannot_be_merged(adapter: Path) -> None:
    base, other = adapter.parent / "base", save_tiny(adapter.parent / "other", "llama")
    with pytest.raises(MismatchError, match="was trained on another model than"):
        load_target(TargetConfig(path=str(other), adapter=str(adapter)))
    with pytest.raises(InputError, match=r"target\.adapter=/nowhere: no such file or folder"):
        load_target(TargetConfig(path=str(base), adapter="/nowhere"))
    with pytest.raises(ConfigError, match=r"leave target\.quantization and target\.device_map out"):
        load_target(TargetConfig(path=str(base), adapter=str(adapter), quantization="int8"))


def test_heads_of_the_model_below_are_taken_and_others_are_not(adapter: Path) -> None:
    base, folder = adapter.parent / "base", adapter.parent / "head"
    config = Config().replace(
        target={"path": str(base), "adapter": str(adapter), "dtype": "float32"},
        draft={"path": str(folder)},
    )
    target = load_target(config.target)
    geometry = TargetGeometry.of(target.model.config)
    head = build_head(config.draft, geometry, DraftVocabulary.whole(geometry.vocab_size))
    for known in (target.fingerprint, target_fingerprint(base)):
        save_head(folder, head, {"target_fingerprint": known})
        assert load_head_for(target, config) is not None
    save_head(folder, head, {"target_fingerprint": "another"})
    with pytest.raises(MismatchError, match="was trained for target another"):
        load_head_for(target, config)
