"""Writing heads for other engines: what lies in the files, and that nothing of the head is lost.

The names that engines load were read from SGLang 0.5.23 (`srt/models/llama_eagle*.py`), vLLM 0.32
(`model_executor/models/llama_eagle*.py`), SpecForge 0.2.0 (`export/to_sglang.py`), speculators
(`models/eagle3/core.py`) and EAGLE (`eagle/model/cnets*.py`); `tests/engines` holds exported
folders against the packages themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.config.draft.eagle1 import Eagle1Config
from core.config.draft.eagle3 import Eagle3Config
from core.draft.base import DraftHead, TargetGeometry, build_head
from core.draft.export import export_head
from core.draft.folder import load_head, save_head
from core.draft.formats import WRITABLE, ExportTarget
from core.draft.vocabulary import DraftVocabulary
from core.errors import ConfigError, MismatchError
from core.models.target import Target
from jobs import export_draft
from tests.checkpoints import HIDDEN, VOCAB

LAYER = {
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "post_attention_layernorm.weight",
}
EAGLE1 = {"fc.weight", *(f"layers.0.{name}" for name in LAYER)}
MIDLAYER = {*LAYER, "hidden_norm.weight", "input_layernorm.weight"}
AROUND = {"fc.weight", "norm.weight", "lm_head.weight"}
EAGLE3 = {*AROUND, *(f"midlayer.{name}" for name in MIDLAYER)}
BFLOAT16 = "bfloat16"


@pytest.fixture(scope="module")
def export_target(tiny_target: Target) -> ExportTarget:
    geometry = TargetGeometry.of(tiny_target.model.config)
    return ExportTarget("some/target", ("LlamaForCausalLM",), geometry, 30)


def _eagle1(target: ExportTarget, *, bias: bool = False, draft_size: int = 0) -> DraftHead:
    vocabulary = DraftVocabulary.from_counts(torch.arange(VOCAB) * 7919 % VOCAB, draft_size)
    config = Eagle1Config(bias=bias, vocab_size=draft_size)
    return build_head(config, target.geometry, vocabulary, seed=7)


def _eagle3(target: ExportTarget, *, draft_size: int = 64, **settings: Any) -> DraftHead:
    vocabulary = DraftVocabulary.from_counts(torch.arange(VOCAB) * 7919 % VOCAB, draft_size)
    config = Eagle3Config(vocab_size=draft_size, **settings)
    head = build_head(config, target.geometry, vocabulary, seed=8)
    # Norms that differ, so that none can stand for another.
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=draw) + 0.5)
    return head


def _logits(head: DraftHead) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    embedding_VH = torch.randn(VOCAB, HIDDEN, generator=draw)
    head.attach_target(embedding_VH, torch.randn(VOCAB, HIDDEN, generator=draw))
    features_TLH = torch.randn(5, 4, HIDDEN, generator=draw).to(next(head.parameters()).dtype)
    with torch.inference_mode():
        return head.extend(head.new_cache(8), features_TLH, torch.arange(5) + 40).logits_KW


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    pickled = folder / "pytorch_model.bin"
    if pickled.exists():
        return config, torch.load(pickled, weights_only=True)
    return config, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["same", BFLOAT16])
@pytest.mark.parametrize("draft_size", [0, 64])
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        (n, b)
        for n in ("eagle", "sglang", "vllm")
        for b in (False, True)
        if (n, b) != ("vllm", True)
    ],
)
def test_an_eagle1_head_comes_back_bit_for_bit(
    tmp_path: Path, export_target: ExportTarget, name: str, bias: bool, draft_size: int, dtype: str
) -> None:
    head = _eagle1(export_target, bias=bias, draft_size=draft_size)
    report = export_head(tmp_path / "head", head, export_target, name, dtype)
    back = load_head(tmp_path / "head")
    assert torch.equal(back.vocabulary.d2t_W, head.vocabulary.d2t_W)
    assert torch.equal(_logits(back), _logits(head))
    assert report["dtype"] == ("float32" if dtype == "same" else dtype)
    assert {p.dtype for p in back.parameters()} == {getattr(torch, report["dtype"])}
    assert report["draft_vocab_size"] == (draft_size or VOCAB)
    assert set(report["files"]) == {file.name for file in (tmp_path / "head").iterdir()}


def test_eagle1_as_the_reference_reads_it(tmp_path: Path, export_target: ExportTarget) -> None:
    for bias in (False, True):
        folder = tmp_path / str(bias)
        export_head(folder, _eagle1(export_target, bias=bias), export_target, "eagle", "same")
        config, tensors = _read(folder)
        assert (folder / "pytorch_model.bin").exists()
        assert set(tensors) == EAGLE1 | ({"fc.bias"} if bias else set())
        # Its code takes true where the config does not say.
        assert config["bias"] is bias
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert "draft_vocab_size" not in config


def test_eagle1_as_sglang_reads_it(tmp_path: Path, export_target: ExportTarget) -> None:
    head = _eagle1(export_target, draft_size=64)
    report = export_head(tmp_path / "head", head, export_target, "sglang", BFLOAT16)
    config, tensors = _read(tmp_path / "head")
    # Its fc has a bias in any case; `bias` in the config would be the attention's.
    assert set(tensors) == {*EAGLE1, "fc.bias"} and not tensors["fc.bias"].any()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert config["bias"] is False and "draft_vocab_size" not in config
    assert config["architectures"] == ["LlamaForCausalLMEagle"]
    assert config["torch_dtype"] == BFLOAT16
    ids_W = torch.load(tmp_path / "head" / "token_map.pt", weights_only=True)
    assert torch.equal(ids_W, head.vocabulary.d2t_W)
    token_map = f"--speculative-token-map {tmp_path / 'head'}/token_map.pt"
    assert token_map in report["run_with"]
    assert any("--speculative-token-map" in sentence for sentence in report["differences"])


def test_eagle1_as_vllm_reads_it(tmp_path: Path, export_target: ExportTarget) -> None:
    head = _eagle1(export_target, draft_size=64)
    report = export_head(tmp_path / "head", head, export_target, "vllm", "same")
    config, tensors = _read(tmp_path / "head")
    assert set(tensors) == EAGLE1
    assert config["architectures"] == ["EagleLlamaForCausalLM"]
    assert config["max_position_embeddings"] == export_target.geometry.max_position_embeddings
    assert "bias" not in config
    assert any("chain" in sentence for sentence in report["differences"])
    assert any("all 259 tokens" in sentence for sentence in report["differences"])
    assert '"method": "eagle"' in report["run_with"]


def test_positions_are_the_targets(tmp_path: Path, export_target: ExportTarget) -> None:
    """A head of others' making may have been trained with fewer."""
    short = TargetGeometry(**{**export_target.geometry.__dict__, "max_position_embeddings": 512})
    head = build_head(Eagle1Config(), short, DraftVocabulary.whole(VOCAB))
    for name in ("eagle", "sglang", "vllm"):
        export_head(tmp_path / name, head, export_target, name, "same")
        assert _read(tmp_path / name)[0]["max_position_embeddings"] == 2048


def test_a_bias_is_refused_by_vllm_and_one_of_zeros_is_none(
    tmp_path: Path, export_target: ExportTarget
) -> None:
    head = _eagle1(export_target, bias=True)
    said = "cannot hold eagle1 heads with bias; choose eagle or sglang, or train with draft.bias=fa"
    with pytest.raises(ConfigError, match=said):
        export_head(tmp_path / "head", head, export_target, "vllm", "same")
    assert not list(tmp_path.iterdir())
    plain = _eagle1(export_target)
    export_head(tmp_path / "sglang", plain, export_target, "sglang", "same")
    again = load_head(tmp_path / "sglang")
    export_head(tmp_path / "head", again, export_target, "vllm", "same")
    assert torch.equal(_logits(load_head(tmp_path / "head")), _logits(plain))


def test_formats_that_cannot_hold_a_head_are_refused(
    tmp_path: Path, export_target: ExportTarget
) -> None:
    head = _eagle1(export_target)
    for name, said in (
        ("speculators", "cannot hold eagle1 heads; choose eagle or sglang or vllm"),
        ("aerie", "the formats are eagle, sglang, speculators, vllm"),
        ("tensorrt", "the formats are eagle, sglang, speculators, vllm"),
    ):
        with pytest.raises(ConfigError, match=said):
            export_head(tmp_path / "head", head, export_target, name, "same")
    wide = TargetGeometry(**{**export_target.geometry.__dict__, "head_dim": 16})
    head = build_head(Eagle1Config(), wide, DraftVocabulary.whole(VOCAB))
    with pytest.raises(ConfigError, match="wants heads of 32 / 4 values, this head's have 16"):
        export_head(tmp_path / "head", head, export_target, "eagle", "same")
    export_head(tmp_path / "head", head, export_target, "vllm", "same")
    assert _read(tmp_path / "head")[0]["head_dim"] == 16


def test_a_dtype_that_cannot_hold_the_weights_is_refused(
    tmp_path: Path, export_target: ExportTarget
) -> None:
    head = _eagle1(export_target)
    with torch.no_grad():
        head.get_parameter("fc.weight")[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"export\.dtype=float16: fc\.weight has values beyond"):
        export_head(tmp_path / "head", head, export_target, "sglang", "float16")


@pytest.mark.parametrize("dtype", ["same", BFLOAT16])
@pytest.mark.parametrize("draft_size", [0, 64])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eagle", {}),
        ("sglang", {}),
        ("vllm", {}),
        ("speculators", {"rope_theta": None}),
        ("vllm", {"norm_before_residual": True}),
        ("speculators", {"norm_before_residual": True}),
    ],
)
def test_an_eagle3_head_comes_back_bit_for_bit(
    tmp_path: Path,
    export_target: ExportTarget,
    name: str,
    settings: dict[str, Any],
    draft_size: int,
    dtype: str,
) -> None:
    head = _eagle3(export_target, draft_size=draft_size, **settings)
    export_head(tmp_path / "head", head, export_target, name, dtype)
    back = load_head(tmp_path / "head")
    assert torch.equal(back.vocabulary.d2t_W, head.vocabulary.d2t_W)
    assert torch.equal(_logits(back), _logits(head))
    assert back.geometry.rope_theta == head.geometry.rope_theta
    assert {p.dtype for p in back.parameters()} == {p.dtype for p in head.parameters()}


def test_eagle3_as_the_engines_read_it(tmp_path: Path, export_target: ExportTarget) -> None:
    tables = {"d2t", "t2d"}
    names = {
        "eagle": EAGLE3 | tables,
        "sglang": EAGLE3 | tables,
        "vllm": EAGLE3 | tables,
        "speculators": {*AROUND, *tables, *(f"layers.0.{name}" for name in MIDLAYER)},
    }
    for draft_size in (0, 64):
        head = _eagle3(export_target, draft_size=draft_size)
        for name, wanted in names.items():
            folder = tmp_path / f"{name}{draft_size}"
            report = export_head(folder, head, export_target, name, "same")
            config, tensors = _read(folder)
            # vLLM has nothing to load a whole vocabulary's tables into, and fails at them.
            left_out = tables if name in ("vllm", "speculators") and not draft_size else set()
            assert set(tensors) == wanted - left_out, name
            # A null would have SGLang take the target's output head for the draft's own.
            assert config["draft_vocab_size"] == (draft_size or VOCAB)
            assert "layer_ids" not in json.dumps(config), "all take the usual ones by themselves"
            if draft_size:
                offsets_W = head.vocabulary.d2t_W - torch.arange(64)
                assert (
                    torch.equal(tensors["d2t"], offsets_W) and tensors["d2t"].dtype == torch.int64
                )
                assert tensors["t2d"].dtype == torch.bool and int(tensors["t2d"].sum()) == 64
            assert not report["files"].keys() & {"token_map.pt"}


def test_eagle3_configs(tmp_path: Path, export_target: ExportTarget) -> None:
    head = _eagle3(export_target)
    configs = {}
    for name in WRITABLE:
        report = export_head(tmp_path / name, head, export_target, name, "same")
        configs[name] = _read(tmp_path / name)[0]
        assert ("eagle3" in report["run_with"].lower()) and str(tmp_path) in report["run_with"]
    assert configs["eagle"]["architectures"] == ["LlamaForCausalLM"]
    assert configs["sglang"]["architectures"] == ["LlamaForCausalLMEagle3"]
    assert configs["vllm"]["architectures"] == ["Eagle3LlamaForCausalLM"]
    # vLLM takes false by itself here, and true in speculators' config.
    assert configs["vllm"]["norm_before_residual"] is False
    nested = configs["speculators"]
    assert nested["norm_before_residual"] is False
    # By a `model_type`, whatever it is, vLLM would take the folder for another layout.
    assert nested["speculators_model_type"] == "eagle3" and "model_type" not in nested
    about = nested["speculators_config"]
    assert about["verifier"]["name_or_path"] == "some/target"
    assert about["proposal_methods"][0]["speculative_tokens"] > 0
    layer = nested["transformer_layer_config"]
    for config in (layer, *(configs[name] for name in ("eagle", "sglang", "vllm"))):
        assert config["rope_theta"] == 10000.0 and config["vocab_size"] == VOCAB
        assert config["max_position_embeddings"] == 2048 and config["num_hidden_layers"] == 1


def test_layer_ids_are_each_engines_own(tmp_path: Path, export_target: ExportTarget) -> None:
    """For SGLang one lower: it counts the layer that a state leaves."""
    head = _eagle3(export_target)
    head.aux_layers = (2, 15, 27)
    export_head(tmp_path / "usual", head, export_target, "eagle", "same")
    assert load_head(tmp_path / "usual").aux_layers is None
    head.aux_layers = (4, 15, 27)
    for name in ("sglang", "vllm", "speculators"):
        export_head(tmp_path / name, head, export_target, name, "same")
        assert load_head(tmp_path / name).aux_layers == (4, 15, 27), name
    key = "eagle_aux_hidden_state_layer_ids"
    assert _read(tmp_path / "sglang")[0]["eagle_config"][key] == [3, 14, 26]
    assert _read(tmp_path / "vllm")[0][key] == [4, 15, 27]
    assert _read(tmp_path / "speculators")[0][key] == [4, 15, 27]
    with pytest.raises(ConfigError, match="always reads the states entering layers 2, L/2 and"):
        export_head(tmp_path / "eagle", head, export_target, "eagle", "same")


@pytest.mark.parametrize(
    ("setting", "able", "refused"),
    [
        ("norm_before_residual", "speculators or vllm", ("eagle", "sglang")),
        ("qkv_bias", None, ("eagle", "sglang", "speculators", "vllm")),
    ],
)
def test_settings_that_an_engine_lacks_are_refused(
    tmp_path: Path, export_target: ExportTarget, setting: str, able: str | None, refused: tuple
) -> None:
    head = _eagle3(export_target, **{setting: True})
    advice = f"choose {able}, or train" if able else "train"
    for name in refused:
        said = f"{name} cannot hold eagle3 heads with {setting}; {advice} with draft.{setting}=fal"
        with pytest.raises(ConfigError, match=said):
            export_head(tmp_path / "head", head, export_target, name, "same")


def test_an_embedding_of_the_heads_own_goes_with_it(
    tmp_path: Path, export_target: ExportTarget
) -> None:
    head = _eagle3(export_target)
    head.own_embedding_VH = torch.randn(VOCAB, HIDDEN)
    for name in WRITABLE:
        report = export_head(tmp_path / name, head, export_target, name, "same")
        assert torch.equal(_read(tmp_path / name)[1]["embed_tokens.weight"], head.own_embedding_VH)
        back = load_head(tmp_path / name).own_embedding_VH
        assert back is not None and torch.equal(back, head.own_embedding_VH)
        warned = any("target's embedding in place" in line for line in report["differences"])
        assert warned == (name == "sglang")
    save_head(tmp_path / "own", load_head(tmp_path / "vllm"), {})
    back = load_head(tmp_path / "own").own_embedding_VH
    assert back is not None and torch.equal(back, head.own_embedding_VH)


# The job


def _arguments(head: Path, target: Path, output: Path, *more: str) -> list[str]:
    return [f"draft.path={head}", f"target.path={target}", f"output={output}", *more]


@pytest.fixture
def saved(tmp_path: Path, tiny_target: Target, export_target: ExportTarget) -> Path:
    head = _eagle1(export_target, draft_size=64)
    save_head(tmp_path / "trained", head, {"target_fingerprint": tiny_target.fingerprint})
    return tmp_path / "trained"


def test_the_job(
    tmp_path: Path, saved: Path, tiny_target_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(saved, tiny_target_folder, tmp_path / "out", "export.format=vllm")
    assert export_draft.main([*arguments, "--dry-run"]) == 0
    assert "format: vllm" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert export_draft.main(arguments) == 0
    said = capsys.readouterr().out
    assert "eagle1 head (aerie) → vllm" in said and "note: vLLM drafts a chain" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["format"], report["source_format"]) == ("vllm", "aerie")
    assert report["head"] == str(tmp_path / "out" / "head")
    assert torch.equal(_logits(load_head(Path(report["head"]))), _logits(load_head(saved)))
    assert export_draft.main(arguments) == 0
    assert "finished before" in capsys.readouterr().out
    # What it wrote is a draft.path again.
    again = _arguments(Path(report["head"]), tiny_target_folder, tmp_path / "again")
    assert export_draft.main([*again, "export.format=sglang", "export.dtype=bfloat16"]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["export.format=null"], "export.format=None: choose one of eagle, sglang, speculators"),
        (["export.format=tensorrt"], "export.format=tensorrt: choose one of eagle, sglang"),
        (["export.dtype=float8"], "export.dtype='float8': input should be 'same'"),
        (["draft.path=null"], "draft.path is not set"),
        (["draft.path=/no/such"], "draft.path=/no/such: no such file or folder"),
        (["target.path=null"], "target.path is not set"),
        (["export.format=speculators"], "cannot hold eagle1 heads; choose eagle or sglang or vllm"),
        (["export.fromat=vllm"], "unknown key export.fromat; did you mean export.format?"),
    ],
)
def test_mistakes_are_exit_code_2(
    tmp_path: Path,
    saved: Path,
    tiny_target_folder: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    said: str,
) -> None:
    arguments = _arguments(saved, tiny_target_folder, tmp_path / "out", "export.format=vllm")
    assert export_draft.main([*arguments, *changes]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out" / "report.json").exists()


def test_another_targets_head_is_not_exported(
    tmp_path: Path,
    tiny_target_folder: Path,
    export_target: ExportTarget,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_head(tmp_path / "other", _eagle1(export_target), {"target_fingerprint": "f" * 64})
    arguments = _arguments(tmp_path / "other", tiny_target_folder, tmp_path / "out")
    assert export_draft.main([*arguments, "export.format=vllm"]) == 2
    assert "was trained for target ffffffffffff" in capsys.readouterr().err
    with pytest.raises(MismatchError):
        load_head(tmp_path / "other", target_fingerprint="e" * 64)


def test_a_head_in_aeries_own_format_and_half_the_size(
    tmp_path: Path, saved: Path, tiny_target_folder: Path
) -> None:
    arguments = _arguments(saved, tiny_target_folder, tmp_path / "out", "export.format=aerie")
    assert export_draft.main([*arguments, "export.dtype=bfloat16"]) == 0
    written = tmp_path / "out" / "head"
    before, after = load_head(saved), load_head(written)
    assert {t.dtype for t in after.eagle_tensors().values()} == {torch.bfloat16}
    for name, tensor in before.eagle_tensors().items():
        assert torch.equal(tensor.bfloat16(), after.eagle_tensors()[name]), name
    assert torch.equal(before.vocabulary.d2t_W, after.vocabulary.d2t_W)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (saved, written)]
    assert sizes[1] < 0.6 * sizes[0]
    # What is known of it is kept, the target it was trained for above all.
    old, new = (json.loads((f / "aerie.json").read_text()) for f in (saved, written))
    assert old.items() <= new.items() and old["target_fingerprint"]
