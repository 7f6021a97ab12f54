from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.data.feature_manifest import Manifest, read_manifest
from core.data.feature_shards import (
    FeatureDataset,
    TopLogits,
    discard_shard,
    finished_record,
    remove_leftovers,
    sidecar,
    verify_shard,
    write_feature_shard,
)
from core.data.groupwise import dequantize, quantize
from core.errors import InputError, MismatchError, ShapeError

MANIFEST = Manifest(
    target="target-a",
    feature_layers=(2,),
    final_norm=True,
    dtype="bfloat16",
    hidden_size=8,
    vocab_size=100,
    max_length=64,
    tokenizer_hash="tokenizer",
    template_hash="template",
    shards={"train": ("shard-00000", "shard-00001"), "held_out": ()},
)
LENGTHS = {"shard-00000": [5, 1, 9], "shard-00001": [7, 3]}


def _write(folder: Path, stem: str, seed: int = 0) -> Path:
    lengths = LENGTHS[stem]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed + int(stem[-1]))
    shard = folder / "train" / f"{stem}.safetensors"
    write_feature_shard(
        shard,
        features_TLH=torch.randn(total, 1, 8, generator=generator).bfloat16(),
        input_ids_T=torch.randint(0, 100, (total,), generator=generator),
        loss_mask_T=torch.randint(0, 2, (total,), generator=generator),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        padded_tokens=total + 4,
        manifest=MANIFEST,
    )
    return shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for stem in LENGTHS:
        _write(tmp_path, stem)
    MANIFEST.write(tmp_path)
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    dataset = FeatureDataset(folder, "train", target="target-a")
    assert dataset.lengths.tolist() == [5, 1, 9, 7, 3]
    assert dataset.num_tokens == 25
    assert len(dataset) == 5
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(10, 1, 8, generator=generator).bfloat16()
    input_ids = torch.randint(0, 100, (10,), generator=generator)
    loss_mask = torch.randint(0, 2, (10,), generator=generator)
    last = dataset[4]
    assert torch.equal(last.features, features[7:])
    assert torch.equal(last.input_ids, input_ids[7:])
    assert torch.equal(last.loss_mask, loss_mask[7:].bool())
    assert (last.input_ids.dtype, last.loss_mask.dtype) == (torch.int64, torch.bool)
    assert [len(dataset[i].input_ids) for i in range(5)] == [5, 1, 9, 7, 3]
    with pytest.raises(IndexError):
        dataset[5]


def test_reading_an_example_leaves_the_mapped_file_alone(folder: Path) -> None:
    dataset = FeatureDataset(folder, "train")
    before = dataset[0].features.clone()
    dataset[0].features.zero_()
    assert torch.equal(dataset[0].features, before)
    assert dataset[0].features.untyped_storage().nbytes() == 5 * 8 * 2


def test_a_pickled_dataset_opens_its_files_anew(folder: Path) -> None:
    dataset = FeatureDataset(folder, "train")
    first = dataset[3].features
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3].features, first)


def test_token_counts_are_of_supervised_tokens_alone(folder: Path) -> None:
    dataset = FeatureDataset(folder, "train")
    expected = torch.zeros(100, dtype=torch.int64)
    for i in range(len(dataset)):
        for token, supervised in zip(dataset[i].input_ids, dataset[i].loss_mask, strict=True):
            expected[token] += int(supervised)
    assert torch.equal(dataset.token_counts(100), expected)
    assert 0 < expected.sum() < dataset.num_tokens


def test_equal_tensors_make_equal_bytes(folder: Path, tmp_path: Path) -> None:
    again = _write(tmp_path / "again", "shard-00000")
    other = _write(tmp_path / "other", "shard-00000", seed=7)
    first = folder / "train" / "shard-00000.safetensors"
    assert again.read_bytes() == first.read_bytes()
    assert sidecar(again).read_bytes() == sidecar(first).read_bytes()
    assert other.read_bytes() != first.read_bytes()


def test_others_may_read_a_shard_as_the_umask_says(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    mode = (folder / "train" / "shard-00000.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~umask


def test_a_shard_cut_off_is_named_and_counts_as_unfinished(folder: Path) -> None:
    shard = folder / "train" / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert finished_record(shard, MANIFEST) is None
    with pytest.raises(InputError, match=r"shard-00001\.safetensors.*run extract_features"):
        FeatureDataset(folder, "train")


def test_a_flipped_bit_is_found_by_its_checksum(folder: Path) -> None:
    shard = folder / "train" / "shard-00000.safetensors"
    assert verify_shard(shard, MANIFEST).tokens == 15
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert finished_record(shard, MANIFEST) is not None, "the size is as it was"
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is missing, damaged"):
        verify_shard(shard, MANIFEST)


@pytest.mark.parametrize("content", [None, "", "{}", '{"manifest": "another"}'])
def test_a_shard_without_a_whole_sidecar_is_unfinished(folder: Path, content: str | None) -> None:
    shard = folder / "train" / "shard-00000.safetensors"
    discard_shard(shard)
    if content is not None:
        sidecar(shard).write_text(content)
    assert finished_record(shard, MANIFEST) is None
    with pytest.raises(InputError, match="unfinished"):
        FeatureDataset(folder, "train")


def test_a_shard_of_another_manifest_is_unfinished(folder: Path) -> None:
    shard = folder / "train" / "shard-00000.safetensors"
    assert finished_record(shard, replace(MANIFEST, target="target-b")) is None
    more = replace(MANIFEST, shards={"train": ("shard-00000",)})
    assert finished_record(shard, more) is not None, "the list of shards may grow"


def test_features_of_another_target_are_refused(folder: Path) -> None:
    with pytest.raises(MismatchError, match=r"target target-a.*target is target-b"):
        FeatureDataset(folder, "train", target="target-b")


def test_a_folder_that_holds_no_features_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        FeatureDataset(tmp_path / "elsewhere", "train")
    with pytest.raises(InputError, match="no held_out shards; its splits are train"):
        FeatureDataset(folder, "held_out")


def test_the_manifest_is_read_as_it_was_written(folder: Path) -> None:
    assert read_manifest(folder) == MANIFEST
    path = folder / "manifest.json"
    newer = path.read_text().replace('"format_version": 2', '"format_version": 3')
    path.write_text(newer)
    with pytest.raises(InputError, match="format version 3"):
        read_manifest(folder)


def test_tensors_that_disagree_are_refused(tmp_path: Path) -> None:
    def write(tokens: int, dtype: torch.dtype) -> None:
        write_feature_shard(
            tmp_path / "train" / "shard-00000.safetensors",
            features_TLH=torch.zeros(tokens, 1, 8, dtype=dtype),
            input_ids_T=torch.zeros(4),
            loss_mask_T=torch.zeros(4),
            offsets=torch.tensor([0, 4]),
            padded_tokens=4,
            manifest=MANIFEST,
        )

    write(4, torch.bfloat16)
    for tokens, dtype in ((5, torch.bfloat16), (4, torch.float32)):
        with pytest.raises(ShapeError):
            write(tokens, dtype)


def _write_int8(folder: Path, features_TLH: torch.Tensor, top: TopLogits | None) -> Manifest:
    tokens = len(features_TLH)
    manifest = replace(
        MANIFEST,
        feature_layers=(0, 1, 2),
        dtype="int8",
        hidden_size=100,
        top_logits=0 if top is None else top.ids_TK.shape[1],
        shards={"train": ("shard-00000",)},
    )
    write_feature_shard(
        folder / "train" / "shard-00000.safetensors",
        features_TLH=features_TLH,
        input_ids_T=torch.arange(tokens),
        loss_mask_T=torch.ones(tokens),
        offsets=torch.tensor([0, 1000, tokens]),
        padded_tokens=tokens,
        manifest=manifest,
        top=top,
    )
    manifest.write(folder)
    return manifest


def test_int8_is_read_as_the_values_it_stands_for(tmp_path: Path) -> None:
    """More tokens than are quantized at a time; a last group of 36."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1500, 3, 100, generator=generator).bfloat16()
    top = TopLogits(
        torch.randint(0, 100, (1500, 4), generator=generator, dtype=torch.int32),
        -torch.rand(1500, 4, generator=generator).half(),
    )
    manifest = _write_int8(tmp_path, features, top)
    found = FeatureDataset(tmp_path, "train")[1]
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features, dequantize(*quantize(features[1000:])))
    # Half a step, of which the largest of 64 normal values has 127.
    torch.testing.assert_close(found.features, features[1000:].float(), rtol=0, atol=0.02)
    assert found.top is not None
    assert torch.equal(found.top.ids_TK, top.ids_TK[1000:])
    assert torch.equal(found.top.log_probs_TK, top.log_probs_TK[1000:])
    assert manifest.bytes_per_token == 3 * (100 + 2 * 2) + 5 + 4 * 6
    size = (tmp_path / "train" / "shard-00000.safetensors").stat().st_size
    assert manifest.bytes_per_token * 1500 < size < manifest.bytes_per_token * 1500 + 1000


def test_likeliest_tokens_must_be_as_the_manifest_says(tmp_path: Path) -> None:
    features = torch.zeros(1500, 3, 100)
    with pytest.raises(ShapeError, match=r"top logits \(1500, 0\), expected \(1500, 2\)"):
        write_feature_shard(
            tmp_path / "train" / "shard-00000.safetensors",
            features_TLH=features,
            input_ids_T=torch.zeros(1500),
            loss_mask_T=torch.zeros(1500),
            offsets=torch.tensor([0, 1500]),
            padded_tokens=1500,
            manifest=replace(
                MANIFEST, feature_layers=(0, 1, 2), dtype="int8", hidden_size=100, top_logits=2
            ),
        )


def test_leftovers_of_killed_writers_are_removed(folder: Path) -> None:
    old, new = (folder / "train" / f".shard-00000.safetensors.{n}.tmp" for n in "ab")
    for path, time in ((old, 100), (new, 300)):
        path.write_bytes(b"part")
        os.utime(path, (time, time))
    remove_leftovers(folder, older_than=200)
    assert (old.exists(), new.exists()) == (False, True)
    assert len(FeatureDataset(folder, "train")) == 5
