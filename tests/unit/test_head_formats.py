"""Reading heads of others' making: what is told apart, and what is refused and how."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.config import DRAFT_CONFIGS, Config
from core.decode.load import load_decoder
from core.decode.tree import PLAIN, TreePlan
from core.draft import formats
from core.draft.folder import check_folder, load_head, save_head
from core.draft.formats import FORMATS, read_head, recognize
from core.errors import InputError, MismatchError
from core.models.target import Target
from core.models.weights import load_embedding
from tests import checkpoints
from tests.checkpoints import CONFIG, HIDDEN, VOCAB

SGLANG = {**CONFIG, "architectures": ["LlamaForCausalLMEagle"]}
VLLM = {**CONFIG, "architectures": ["EagleLlamaForCausalLM"]}


def _eagle1(
    folder: Path, config: dict[str, Any] = CONFIG, more: checkpoints.Weights | None = None
) -> Path:
    return checkpoints.write(folder, config, {**checkpoints.eagle1(), **(more or {})})


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG, "eagle"),
        ({k: v for k, v in CONFIG.items() if k != "architectures"}, "eagle"),
        (SGLANG, "sglang"),
        ({**CONFIG, "architectures": ["LlamaForCausalLMEagle3"]}, "sglang"),
        (VLLM, "vllm"),
        ({**CONFIG, "architectures": ["Eagle3LlamaForCausalLM"]}, "vllm"),
        (checkpoints.speculators_config(), "speculators"),
    ],
)
def test_formats_are_told_apart_by_content(tmp_path: Path, config: dict, name: str) -> None:
    folder = checkpoints.write(tmp_path / "head", config, {})
    assert recognize(folder).name == name
    check_folder(folder)


def test_formats_are_found_by_their_files_alone() -> None:
    shared = {"__init__", "common", "files", "public"}
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")}
    assert set(FORMATS) == files - shared


def test_a_head_of_others_drafts_and_the_text_is_the_targets(
    tmp_path: Path, tiny_target: Target, tiny_target_folder: Path
) -> None:
    weights = {**checkpoints.eagle1(), "embed_tokens.weight": load_embedding(tiny_target_folder)}
    folder = checkpoints.write(tmp_path / "head", CONFIG, weights, pickled=True)
    config = Config().replace(
        target={"path": str(tiny_target_folder), "dtype": "float32"},
        draft={"path": str(folder)},
        decode={"total_tokens": 12, "depth": 3},
    )
    decoder = load_decoder(config, num_threads=1).decoder
    prompt = [1, *range(40, 60)]

    def text(plan: TreePlan | None) -> tuple[list[int], set[int]]:
        rounds = list(decoder.generate(prompt, max_new_tokens=40, plan=plan))
        return [t for r in rounds for t in r.tokens], {r.tree_size for r in rounds[1:]}

    drafted, sizes = text(None)
    assert sizes == {12} and text(PLAIN) == (drafted, {1})


def test_aeries_own_folder_is_told_whatever_its_config_says(tmp_path: Path) -> None:
    head = load_head(_eagle1(tmp_path / "head", SGLANG))
    save_head(tmp_path / "own", head, {"note": 1})
    assert recognize(tmp_path / "own").name == "aerie"
    assert read_head(tmp_path / "own").record["note"] == 1


@pytest.mark.parametrize("content", [None, {}, {**CONFIG, "num_hidden_layers": 30}])
def test_what_is_no_head_is_refused_with_the_formats(tmp_path: Path, content: Any) -> None:
    """Among them a target model's folder, which looks much like an official head's."""
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no draft head there that Aerie reads") as caught:
        load_head(tmp_path)
    assert all(name in str(caught.value) for name in FORMATS)


def test_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    folder = _eagle1(tmp_path / "head")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors and no pytorch_model\.bin there"):
        load_head(folder)


def test_weights_may_be_in_several_files(tmp_path: Path) -> None:
    weights = checkpoints.eagle1()
    folder = checkpoints.write(tmp_path / "head", CONFIG, weights)
    whole = load_head(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    split = load_head(folder)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(a, b)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors: no such file, though the index"):
        load_head(folder)


class _Runs:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "head", CONFIG, checkpoints.eagle1(), pickled=True)
    marker = tmp_path / "was run"
    torch.save({"fc.weight": _Runs(str(marker))}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds other things than tensors"):
        load_head(folder)
    assert not marker.exists()
    # The attack is real: Python's own unpickler falls for it.
    pickle.loads(pickle.dumps(_Runs(str(marker))))
    assert marker.exists()


@pytest.mark.parametrize("pickled", [False, True])
def test_a_damaged_file_is_said(tmp_path: Path, pickled: bool) -> None:
    folder = checkpoints.write(tmp_path / "head", CONFIG, checkpoints.eagle1(), pickled=pickled)
    file = folder / ("pytorch_model.bin" if pickled else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"{file.name}: damaged"):
        load_head(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = checkpoints.eagle1()
    weights["layers.0.mlp.up_proj.weight"][3, 4] = value
    folder = checkpoints.write(tmp_path / "head", CONFIG, weights)
    with pytest.raises(InputError, match=r"up_proj\.weight holds 1 values that are NaN or inf"):
        load_head(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fc_norm": True}, r"fc_norm \(norms of the features before fc\)"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ({"norm_output": True}, r"norm_output .*EAGLE-3\.1"),
        ({"add_para_norm": True}, "HASS"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "positions of type linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "positions of type yarn"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
    ],
)
def test_what_aeries_heads_do_not_do_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_head(_eagle1(tmp_path / "head", {**CONFIG, **change}))


def test_settings_that_say_no_are_no_reason(tmp_path: Path) -> None:
    config = {**SGLANG, "fc_norm": False, "attention_bias": False, "rope_scaling": None}
    load_head(_eagle1(tmp_path / "head", {**config, "quantization_config": None}))


def test_sizes_that_a_config_leaves_out(tmp_path: Path) -> None:
    """As transformers fills them in, which the engines go by."""
    less = {k: v for k, v in CONFIG.items() if k not in ("rms_norm_eps", "max_position_embeddings")}
    geometry = load_head(_eagle1(tmp_path / "head", less)).geometry
    assert (geometry.rope_theta, geometry.rms_norm_eps) == (10000.0, 1e-6)
    assert (geometry.head_dim, geometry.max_position_embeddings) == (8, 2048)
    newer = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert load_head(_eagle1(tmp_path / "newer", newer)).geometry.rope_theta == 5e5
    without = {k: v for k, v in CONFIG.items() if k != "hidden_size"}
    with pytest.raises(InputError, match=r"config\.json: no hidden_size there"):
        load_head(_eagle1(tmp_path / "without", without))


def test_unknown_and_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = _eagle1(tmp_path / "more", more={"some.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"unknown: some\.weight"):
        load_head(folder)
    weights = checkpoints.eagle1()
    del weights["layers.0.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"missing: layers\.0\.mlp\.up_proj\.weight"):
        load_head(checkpoints.write(tmp_path / "less", CONFIG, weights))
    folder = checkpoints.write(tmp_path / "other", CONFIG, {"h.0.attn.weight": torch.zeros(2)})
    with pytest.raises(InputError, match="weights of no algorithm that Aerie has") as caught:
        load_head(folder)
    assert all(kind in str(caught.value) for kind in DRAFT_CONFIGS)


def test_another_targets_sizes_are_refused(tmp_path: Path, tiny_target: Target) -> None:
    folder = _eagle1(tmp_path / "head")
    config = copy.deepcopy(tiny_target.model.config)
    load_head(folder, target_config=config, target_fingerprint="any: it names none")
    config.vocab_size = 300
    with pytest.raises(MismatchError, match=f"a vocabulary of {VOCAB} instead of 300, which"):
        load_head(folder, target_config=config)
    config.hidden_size = 64
    with pytest.raises(MismatchError, match=f"300 and a hidden size of {HIDDEN} instead of 64"):
        load_head(folder, target_config=config)


def test_an_embedding_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = _eagle1(
        tmp_path / "head", more={"embed_tokens.weight": torch.zeros(VOCAB - 1, HIDDEN)}
    )
    with pytest.raises(InputError, match=rf"embed_tokens\.weight is \[{VOCAB - 1}, {HIDDEN}\]"):
        load_head(folder)


def test_a_token_map_is_the_draft_vocabulary(tmp_path: Path) -> None:
    folder = _eagle1(tmp_path / "head", SGLANG)
    ids_W = torch.tensor([3, 8, 250])
    torch.save(ids_W, folder / "token_map.pt")
    head = load_head(folder)
    assert torch.equal(head.vocabulary.d2t_W, ids_W) and head.config.vocab_size == 3
    for wrong, said in (
        (torch.tensor([3, VOCAB]), "1 are outside the vocabulary of 259, 0 are there twice"),
        (torch.tensor([3, 3]), "0 are outside the vocabulary of 259, 1 are there twice"),
        ([3], "expected a list of token ids as a tensor"),
    ):
        torch.save(wrong, folder / "token_map.pt")
        with pytest.raises(InputError, match=said):
            load_head(folder)


def test_speculators_heads_of_other_types_are_refused(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"speculators_model_type": "dflash"}, "of type dflash; Aerie reads eagle3"),
        ({"transformer_layer_config": None}, "no transformer_layer_config"),
        ({"transformer_layer_config": {**CONFIG, "model_type": "qwen3"}}, "of type qwen3"),
        ({"fc_norm": True}, "fc_norm"),
    ]
    for number, (change, said) in enumerate(changes):
        config = checkpoints.speculators_config(**change)
        folder = checkpoints.write(tmp_path / str(number), config, {})
        with pytest.raises(InputError, match=said):
            load_head(folder)
    config = checkpoints.speculators_config()
    del config["norm_before_residual"]
    with pytest.raises(InputError, match="does not say norm_before_residual"):
        load_head(checkpoints.write(tmp_path / "unsaid", config, {}))


def _eagle3(folder: Path, config: dict[str, Any], **changes: torch.Tensor) -> Path:
    weights = {**checkpoints.eagle3(), **changes}
    return checkpoints.write(folder, {**CONFIG, "draft_vocab_size": 40, **config}, weights)


def test_vocabularies_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    weights = checkpoints.eagle3()
    ids_W = weights["d2t"] + torch.arange(40)
    moved = weights["t2d"].roll(1)
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"d2t": ids_W}, r"d2t holds target ids; the formats want offsets"),
        ({"t2d": moved}, r"d2t names 40 target tokens, t2d marks 40, and they are not the same"),
        ({"d2t": weights["d2t"][:39]}, r"d2t names 39 target tokens, t2d marks 40"),
    ]
    for number, (change, said) in enumerate(wrong):
        with pytest.raises(InputError, match=said):
            load_head(_eagle3(tmp_path / str(number), {}, **change))
    weights["d2t"][-1] = VOCAB
    del weights["t2d"]
    config = {**CONFIG, "draft_vocab_size": 40}
    with pytest.raises(InputError, match="of its 40 draft tokens 1 are outside the vocabulary"):
        load_head(checkpoints.write(tmp_path / "outside", config, weights))


def test_without_tables_an_eagle3_head_has_the_whole_vocabulary(tmp_path: Path) -> None:
    weights = checkpoints.eagle3(draft_size=VOCAB)
    del weights["d2t"], weights["t2d"]
    head = load_head(checkpoints.write(tmp_path / "whole", CONFIG, weights))
    assert head.vocabulary.is_whole and head.config.vocab_size == 0
    weights = checkpoints.eagle3()
    del weights["d2t"], weights["t2d"]
    with pytest.raises(InputError, match=r"lm_head\.weight \[40, 32\] instead of \[259, 32\]"):
        load_head(checkpoints.write(tmp_path / "part", CONFIG, weights))


def test_layer_ids_are_read_as_their_engine_means_them(tmp_path: Path, tiny_target: Target) -> None:
    key = "eagle_aux_hidden_state_layer_ids"
    sglang = {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {key: [0, 1, 3]}}
    vllm = {"architectures": ["Eagle3LlamaForCausalLM"], key: [1, 2, 4]}
    nvidia = {"architectures": ["Eagle3LlamaForCausalLM"], "eagle_config": {key: [1, 2, 4]}}
    for name, config in (("sglang", sglang), ("vllm", vllm), ("nvidia", nvidia)):
        folder = _eagle3(tmp_path / name, config)
        assert load_head(folder).aux_layers == (1, 2, 4)
    folder = checkpoints.write(
        tmp_path / "speculators",
        checkpoints.speculators_config(**{key: [1, 2, 4]}),
        checkpoints.eagle3(layer="layers.0"),
    )
    assert load_head(folder).aux_layers == (1, 2, 4)
    with pytest.raises(MismatchError, match=r"entering layers 1, 2, 4, target\.path has 2 layers"):
        load_head(folder, target_config=tiny_target.model.config)


def test_a_head_on_another_number_of_states_is_refused(tmp_path: Path) -> None:
    """One for four of the target's states, as the newer trainers can make."""
    with pytest.raises(InputError, match=r"fc\.weight \[32, 128\] instead of \[32, 96\]"):
        load_head(_eagle3(tmp_path / "head", {}, **{"fc.weight": torch.zeros(32, 128)}))
    with pytest.raises(InputError, match=r"target_hidden_size=64"):
        load_head(_eagle3(tmp_path / "other", {"target_hidden_size": 64}))
