from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import Config
from core.config.draft.eagle1 import Eagle1Config
from core.decode.load import load_decoder
from core.draft.base import DraftHead, TargetGeometry, build_head
from core.draft.folder import load_head, save_head
from core.draft.formats import aerie
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError, MismatchError
from core.models.target import Target
from core.models.weights import load_embedding, load_output_head
from core.train.start import load_start

EAGLE_NAMES = {
    "fc.weight",
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "layers.0.post_attention_layernorm.weight",
}


def _head(target: Target, *, bias: bool = False, draft_size: int = 64, seed: int = 3) -> DraftHead:
    counts_V = torch.arange(target.vocab_size) * 7919 % 259
    vocabulary = DraftVocabulary.from_counts(counts_V, draft_size)
    config = Eagle1Config(bias=bias, noise=0.25)
    return build_head(config, TargetGeometry.of(target.model.config), vocabulary, seed)


def _logits(head: DraftHead, target_folder: Path) -> torch.Tensor:
    head.attach_target(load_embedding(target_folder), load_output_head(target_folder))
    draw = torch.Generator().manual_seed(0)
    features_TLH = torch.randn(5, 1, 32, generator=draw)
    with torch.inference_mode():
        cache = head.new_cache(8)
        return head.extend(cache, features_TLH, torch.arange(5) + 40).logits_KW


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("draft_size", [0, 64])
def test_a_head_comes_back_as_it_was(
    tmp_path: Path, tiny_target: Target, tiny_target_folder: Path, bias: bool, draft_size: int
) -> None:
    head = _head(tiny_target, bias=bias, draft_size=draft_size)
    save_head(tmp_path / "head", head, {"target_fingerprint": "some"})
    back = load_head(tmp_path / "head", target_fingerprint="some")
    assert back.config == head.config and back.geometry == head.geometry
    assert torch.equal(back.vocabulary.d2t_W, head.vocabulary.d2t_W)
    assert torch.equal(_logits(back, tiny_target_folder), _logits(head, tiny_target_folder))


def test_weights_keep_their_dtype(tmp_path: Path, tiny_target: Target) -> None:
    save_head(tmp_path / "head", _head(tiny_target).to(torch.bfloat16), {})
    assert {p.dtype for p in load_head(tmp_path / "head").parameters()} == {torch.bfloat16}


def test_the_layout_is_eagles(tmp_path: Path, tiny_target: Target) -> None:
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target), {"tau": 1.5})
    assert set(load_file(folder / "model.safetensors")) == EAGLE_NAMES
    public = json.loads((folder / "config.json").read_text())
    assert public["architectures"] == ["LlamaForCausalLM"] and public["num_hidden_layers"] == 1
    assert public["bias"] is False
    assert public["max_position_embeddings"] == tiny_target.max_position
    about = json.loads((folder / "aerie.json").read_text())
    assert (about["draft"]["kind"], about["draft"]["noise"], about["tau"]) == ("eagle1", 0.25, 1.5)
    assert "path" not in about["draft"]
    save_head(folder, _head(tiny_target, bias=True, draft_size=0), {})
    assert set(load_file(folder / "model.safetensors")) == {*EAGLE_NAMES, "fc.bias"}
    assert json.loads((folder / "config.json").read_text())["bias"] is True
    assert not (folder / "draft_vocab.safetensors").exists()


def test_the_folder_appears_whole_or_not_at_all(
    tmp_path: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails half-way leaves the old head, and the next one succeeds."""
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target, seed=1), {"number": 1})

    def full(head: DraftHead, dtype: str) -> dict:
        raise OSError("no space left on device")

    monkeypatch.setattr(aerie, "_public_config", full)
    with pytest.raises(OSError, match="no space"):
        save_head(folder, _head(tiny_target, seed=2), {"number": 2})
    monkeypatch.undo()
    assert json.loads((folder / "aerie.json").read_text())["number"] == 1
    load_head(folder)
    save_head(folder, _head(tiny_target, seed=2), {"number": 2})
    assert json.loads((folder / "aerie.json").read_text())["number"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["head"]


def test_another_targets_head_is_refused(tmp_path: Path, tiny_target: Target) -> None:
    save_head(tmp_path / "head", _head(tiny_target), {"target_fingerprint": "a" * 64})
    with pytest.raises(MismatchError, match="trained for target aaaaaaaaaaaa, but"):
        load_head(tmp_path / "head", target_fingerprint="b" * 64)


def test_the_decoder_refuses_another_targets_head(
    tmp_path: Path, tiny_target: Target, tiny_target_folder: Path
) -> None:
    def decoder(fingerprint: str):
        save_head(tmp_path / "head", _head(tiny_target), {"target_fingerprint": fingerprint})
        config = Config().replace(
            target={"path": str(tiny_target_folder), "dtype": "float32"},
            draft={"path": str(tmp_path / "head")},
            decode={"total_tokens": 8},
        )
        return load_decoder(config, num_threads=1).decoder

    with pytest.raises(MismatchError):
        decoder("another")
    assert decoder(tiny_target.fingerprint).plan.total_tokens == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("fc.weight"), "missing: fc.weight"),
        (lambda t: t.update({"norm.weight": torch.zeros(32)}), "unknown: norm.weight"),
        (
            lambda t: t.update({"fc.weight": torch.zeros(32, 32)}),
            r"of another shape: fc.weight \[32, 32\] instead of \[32, 64\]",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(
    tmp_path: Path, tiny_target: Target, change, said: str
) -> None:
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target), {})
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=said):
        load_head(folder)


def test_the_references_embedding_is_passed_over(tmp_path: Path, tiny_target: Target) -> None:
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target), {})
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] = torch.zeros(259, 32)
    save_file(tensors, folder / "model.safetensors")
    load_head(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(
    tmp_path: Path, tiny_target: Target, name: str
) -> None:
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target), {})
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"no {name} there"):
        load_head(folder)


def test_without_aeries_record_it_is_an_official_head(tmp_path: Path, tiny_target: Target) -> None:
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target, bias=True, draft_size=0), {})
    before = load_head(folder).state_dict()
    (folder / "aerie.json").unlink()
    after = load_head(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layers", [[1, 2, 3, 4], [4]])
def test_eagle1_goes_on_from_whatever_layers_its_features_held_besides(
    tmp_path: Path, tiny_target: Target, layers: list[int]
) -> None:
    head, geometry = _head(tiny_target), TargetGeometry.of(tiny_target.model.config)
    save_head(tmp_path / "head", head, {"feature_layers": layers, "target_fingerprint": "some"})
    assert load_head(tmp_path / "head").aux_layers is None
    for aux_layers in ((), (1, 2, 3)):
        load_start(tmp_path / "head", Eagle1Config(), geometry, "some", aux_layers)
    with pytest.raises(MismatchError, match="bias is False, not True"):
        load_start(tmp_path / "head", Eagle1Config(bias=True), geometry, "some", ())


def test_another_layer_convention_is_refused(tmp_path: Path, tiny_target: Target) -> None:
    save_head(tmp_path / "head", _head(tiny_target), {"layer_convention": "leaving"})
    with pytest.raises(InputError, match="layer_convention is leaving; a layer's id must mean"):
        load_head(tmp_path / "head")


@pytest.mark.parametrize("change", [{"format_version": 99}, {"draft": {"kind": "from_the_future"}}])
def test_another_versions_head_is_refused(
    tmp_path: Path, tiny_target: Target, change: dict
) -> None:
    folder = tmp_path / "head"
    save_head(folder, _head(tiny_target), {})
    about = json.loads((folder / "aerie.json").read_text())
    (folder / "aerie.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(InputError, match="this version reads format 1 of eagle1, eagle3"):
        load_head(folder)


def test_the_seed_alone_decides_new_weights(tiny_target: Target) -> None:
    a, b, c = (_head(tiny_target, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
