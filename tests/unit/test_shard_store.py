"""Feature shards whose tensors are in an object store.

`file://` is a store like any other to this code: it goes through fsspec, and through the cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.data import shard_store
from core.data.feature_manifest import Manifest
from core.data.feature_shards import (
    FeatureDataset,
    finished_record,
    sidecar,
    verify_shard,
    write_feature_shard,
)
from core.data.shard_store import ShardStore
from core.errors import ConfigError, InputError

LENGTHS = (5, 1, 9)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv(shard_store.CACHE_VARIABLE, str(tmp_path / "cache"))
    return Manifest(
        target="target",
        feature_layers=(2,),
        final_norm=True,
        dtype="float32",
        hidden_size=8,
        vocab_size=100,
        max_length=64,
        tokenizer_hash="",
        template_hash="",
        shards={"train": ("shard-00000",)},
        store=f"file://{tmp_path}/store",
    )


def write(folder: Path, manifest: Manifest) -> Path:
    shard = folder / "train" / "shard-00000.safetensors"
    total = sum(LENGTHS)
    write_feature_shard(
        shard,
        features_TLH=torch.arange(total * 8.0).view(total, 1, 8),
        input_ids_T=torch.arange(total),
        loss_mask_T=torch.ones(total),
        offsets=torch.tensor([0, *LENGTHS]).cumsum(0),
        padded_tokens=total,
        manifest=manifest,
    )
    manifest.write(folder)
    return shard


def stored(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "store").glob("*/train/shard-00000.safetensors")
    return found


def test_the_store_has_the_bytes_and_the_folder_the_record(
    manifest: Manifest, tmp_path: Path
) -> None:
    shard = write(tmp_path / "run", manifest)
    plain = write(tmp_path / "plain", replace(manifest, store=None))
    assert stored(tmp_path).read_bytes() == plain.read_bytes()
    assert sidecar(shard).read_bytes() == sidecar(plain).read_bytes()
    assert not shard.exists()


def test_what_the_store_has_is_read_through_the_cache(manifest: Manifest, tmp_path: Path) -> None:
    write(tmp_path / "run", manifest)
    dataset = FeatureDataset(tmp_path / "run", "train")
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert torch.equal(dataset[2].features, torch.arange(120.0).view(15, 1, 8)[6:])
    stored(tmp_path).write_bytes(b"")
    # Fetched once, never again.
    cached = manifest.files.local_file(dataset._shards[0], dataset._records[0].checksum)
    assert cached.is_relative_to(tmp_path / "cache")
    assert len(list(cached.parent.iterdir())) == 1


def test_a_damaged_object_is_named_and_not_kept(manifest: Manifest, tmp_path: Path) -> None:
    shard = write(tmp_path / "run", manifest)
    content = bytearray(stored(tmp_path).read_bytes())
    content[-1] ^= 1
    stored(tmp_path).write_bytes(content)
    assert finished_record(shard, manifest) is not None
    with pytest.raises(InputError, match="damaged"):
        verify_shard(shard, manifest)
    with pytest.raises(InputError, match=r"train/shard-00000\.safetensors is damaged; run"):
        FeatureDataset(tmp_path / "run", "train")
    assert not list((tmp_path / "cache" / "features").iterdir())


def test_a_lost_object_is_unfinished(manifest: Manifest, tmp_path: Path) -> None:
    shard = write(tmp_path / "run", manifest)
    stored(tmp_path).unlink()
    assert finished_record(shard, manifest) is None


def test_runs_of_different_settings_share_a_store(manifest: Manifest, tmp_path: Path) -> None:
    other = replace(manifest, target="another")
    shard, others = write(tmp_path / "run", manifest), write(tmp_path / "other", other)
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 2
    assert verify_shard(shard, manifest).checksum == verify_shard(others, other).checksum


@pytest.mark.parametrize(
    "address",
    ["no-such-kind://bucket", "file:///proc/no-such-folder", "ftp://127.0.0.1:1/folder"],
    ids=["kind", "refused", "unreachable"],
)
def test_a_store_that_cannot_be_used_is_refused_at_once(address: str) -> None:
    with pytest.raises(InputError, match=f"features.store={address}"):
        ShardStore(address, "identity").check()


@pytest.mark.parametrize(
    "address", ["", "s3:/bucket", "relative/folder", "memory://x", "file://relative"]
)
def test_what_is_no_address_of_a_store_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=f"features.store={address}: expected the address"):
        ShardStore(address, "identity").check()


def test_a_store_that_is_gone_is_no_missing_shard(manifest: Manifest, tmp_path: Path) -> None:
    shard = write(tmp_path / "run", manifest)
    gone = replace(manifest, store="ftp://127.0.0.1:1/folder")
    with pytest.raises(InputError, match="cannot be"):
        finished_record(shard, gone)


def test_a_store_that_fails_on_the_way_leaves_no_record(manifest: Manifest, tmp_path: Path) -> None:
    refusing = replace(manifest, store="file:///proc/no-such-folder")
    with pytest.raises(InputError, match="goes on from what is finished"):
        write(tmp_path / "run", refusing)
    assert not list((tmp_path / "run").rglob("*.json"))
