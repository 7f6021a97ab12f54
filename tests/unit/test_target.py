from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    GenerationConfig,
    GraniteConfig,
    LlamaForCausalLM,
)

from core.config import TargetConfig
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.decode.cache import SequenceCache
from core.errors import ConfigError, InputError
from core.models.packed import PackedLinear
from core.models.target import (
    Target,
    load_target,
    load_tokenizer,
    target_fingerprint,
    target_folder,
)
from core.models.tiny import byte_tokenizer, tiny_config

IDS_BT = torch.tensor([[1, 17, 80, 33, 200], [1, 90, 12, 0, 0]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


def test_features_are_the_last_hidden_state_after_the_final_norm(tiny_target: Target) -> None:
    found = tiny_target.features(IDS_BT, MASK_BT)
    with torch.inference_mode():
        output = tiny_target.model(IDS_BT, attention_mask=MASK_BT, output_hidden_states=True)
    is_token = MASK_BT.bool()
    assert torch.equal(found[is_token], output.hidden_states[-1][is_token])
    torch.testing.assert_close(
        tiny_target.logits(found)[is_token], output.logits[is_token], rtol=0, atol=1e-5
    )


def test_features_of_a_padded_row_are_those_of_the_row(tiny_target: Target) -> None:
    alone = tiny_target.features(IDS_BT[1:, :3])
    batched = tiny_target.features(IDS_BT, MASK_BT)
    torch.testing.assert_close(batched[1:, :3], alone, rtol=0, atol=4e-5)


def test_reading_through_a_cache_is_reading_at_once(tiny_target: Target) -> None:
    cache = SequenceCache(tiny_target.model.config, 8)
    ids_T, places_T = IDS_BT[0], torch.arange(5)
    parts = [
        tiny_target.cached_features(ids_T[a:b], places_T[a:b], cache)[:, -1]
        for a, b in ((0, 3), (3, 4), (4, 5))
    ]
    whole = tiny_target.features(IDS_BT[:1])[0]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=4e-5)


def test_packing_keeps_the_logits(tiny_target_folder: Path, tiny_target: Target) -> None:
    plain = load_target(
        TargetConfig(path=str(tiny_target_folder), dtype="float32", pack_linear=False)
    )
    assert any(isinstance(m, PackedLinear) for m in tiny_target.model.modules())
    assert not any(isinstance(m, PackedLinear) for m in plain.model.modules())
    both = [target.logits(target.features(IDS_BT[:1])) for target in (plain, tiny_target)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=4e-5)


def test_sizes(tiny_target: Target) -> None:
    assert (tiny_target.hidden_size, tiny_target.vocab_size) == (32, 259)
    assert tiny_target.max_position == 2048
    assert tiny_target.dtype == tiny_target.model.dtype == torch.float32
    assert not any(p.requires_grad for p in tiny_target.model.parameters())


def test_the_fingerprint_tells_weights_apart(tmp_path: Path, tiny_target_folder: Path) -> None:
    other = tmp_path / "model"
    LlamaForCausalLM(tiny_config(259)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    found = {
        load_target(TargetConfig(path=str(path))).fingerprint
        for path in (tiny_target_folder, other, other)
    }
    assert len(found) == 2


def test_every_end_token_counts(tmp_path: Path) -> None:
    """Chat models name some in the generation config and another in the tokenizer."""
    config = tiny_config(259)
    config.eos_token_id = 5
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[7, 8], pad_token_id=0)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    target = load_target(TargetConfig(path=str(tmp_path)))
    assert target.eos_token_ids == frozenset({5, 7, 8, byte_tokenizer().eos_token_id})


# --- What is refused --------------------------------------------------------


def _with_model(target: Target, config) -> Target:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return replace(target, model=model)


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SMALL, logit_scale=0.0625),
        Cohere2Config(**SMALL, logit_scale=0.25),
        GraniteConfig(**SMALL, logits_scaling=8.0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_that_are_changed_after_the_output_head_are_refused(
    tiny_target: Target, config
) -> None:
    target = _with_model(tiny_target, config)
    with pytest.raises(InputError, match="changes its logits after the output head"):
        target.check_output_head()


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**SMALL, logit_scale=1.0), GraniteConfig(**SMALL, logits_scaling=1.0)],
    ids=lambda config: config.model_type,
)
def test_a_scale_of_one_is_fine(tiny_target: Target, config) -> None:
    _with_model(tiny_target, config).check_output_head()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_output_head_is_fine(tiny_target_folder: Path, dtype) -> None:
    load_target(TargetConfig(path=str(tiny_target_folder), dtype=dtype)).check_output_head()


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        (None, ConfigError, "target.path is not set"),
        ("/no/such/folder", InputError, "no such folder"),
        ("runs/some/deep/folder", InputError, "no such folder"),
        ("{tmp}", InputError, "no config.json in that folder"),
    ],
)
def test_folders(tmp_path: Path, path: str | None, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        target_folder(path and path.format(tmp=tmp_path))


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="neither a folder here nor to be had"):
        target_folder("no-such-owner/no-such-model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_target_folder: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load_target(TargetConfig(path=str(tiny_target_folder), device="cuda"))


def test_the_tokenizer_of_the_tiny_target_speaks_its_chat(tiny_target_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_target_folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_template_speaks_its_familys(
    tiny_target_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_target_folder, tmp_path / "bare"))
    for path in folder.glob("chat_template*"):
        path.unlink()
    question = [Message("user", "hi")]
    with pytest.raises(InputError, match="has no chat template"):
        encode_prompt(load_target(TargetConfig(path=str(folder))).tokenizer, question)
    target = load_target(TargetConfig(path=str(folder), template="vicuna"))
    assert "USER: hi ASSISTANT:" in target.tokenizer.decode(
        encode_prompt(target.tokenizer, question)
    )


def test_the_release_that_saved_a_model_is_no_part_of_its_fingerprint(
    tiny_target_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_target_folder, tmp_path / "copy"))
    about = (folder / "config.json").read_text()
    assert '"transformers_version"' in about
    before = target_fingerprint(tiny_target_folder)
    changed = re.sub(r'"transformers_version": ".*"', '"transformers_version": "9.99.1"', about)
    (folder / "config.json").write_text(changed)
    assert target_fingerprint(folder) == before
    (folder / "config.json").write_text(about.replace('"rms_norm_eps"', '"other_eps"'))
    assert target_fingerprint(folder) != before
