"""Where the tensor files of feature shards are: beside their sidecars, or in an object store.

Features are the bulk of a run, so `features.store` may name any file system that fsspec knows
(`s3://bucket/run`, `gs://…`, `hdfs://…`); sidecars and manifest, a few kilobytes a shard, stay in
the run's folder, and a sidecar is written when its file has arrived. Readers fetch a file once
for each node into a cache, named by its checksum.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec

from core.errors import InputError, ResourceError
from core.paths import TEMPORARY, naming_a_full_disk, write_atomically

CACHE_VARIABLE = "AERIE_CACHE"
DEFAULT_CACHE = "~/.cache/aerie"
# They have no folders: what would be made is a bucket, for every mistyped name.
FOLDERLESS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"})


def check_store(address: str | None) -> None:
    """Make sure that a store can be reached and written to, before any work.

    Raises:
        InputError: no such kind of store, or one that refuses.
    """
    if address is None:
        return
    files, root = _open(address)
    probe = f"{root}/.aerie-{uuid.uuid4().hex}"
    try:
        _make_folder(files, root)
        files.pipe_file(probe, b"")
        files.rm_file(probe)
    except Exception as error:
        # Every kind of store has errors of its own.
        raise InputError(
            f"features.store={address} cannot be written to ({type(error).__name__}: {error}); "
            "check the address and this machine's credentials for it"
        ) from error


def put(shard: Path, content: bytes, store: str | None) -> None:
    """Write a tensor file; readers see it whole or not at all.

    Raises:
        ResourceError: no room, or the store refused.
    """
    if store is None:
        write_atomically(shard, content)
        return
    files, root = _open(store)
    try:
        _make_folder(files, f"{root}/{shard.parent.name}")
        # An object store shows an object when it has all of it; for others there is the sidecar.
        files.pipe_file(_key(shard, root), content)
    except Exception as error:
        raise ResourceError(
            f"features.store={store}: {shard.name} cannot be written ({type(error).__name__}: "
            f"{error}); run the same command again: it goes on from what is finished"
        ) from error


def size(shard: Path, store: str | None) -> int | None:
    """Bytes of a tensor file; None if there is none."""
    try:
        if store is None:
            return shard.stat().st_size
        files, root = _open(store)
        return int(files.info(_key(shard, root))["size"])
    except FileNotFoundError:
        return None


def local_file(shard: Path, store: str | None, checksum: str) -> Path:
    """The file on this node, fetched if need be; what is fetched is compared with its checksum.

    Raises:
        InputError: the store does not give it, or other bytes.
        ResourceError: the cache's disk is full.
    """
    if store is None:
        return shard
    cached = cache_folder() / "features" / f"{checksum}.safetensors"
    if cached.exists():
        return cached
    files, root = _open(store)
    with naming_a_full_disk(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_name(f".{cached.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            _download(files, _key(shard, root), aside)
            if _file_checksum(aside) != checksum:
                raise InputError(
                    f"{store}: {shard.parent.name}/{shard.name} is damaged; run extract_features "
                    "as before, once with --verify, which marks what is damaged, and once without"
                )
            aside.replace(cached)
        finally:
            aside.unlink(missing_ok=True)
    return cached


def cache_folder() -> Path:
    """Where this node keeps what it fetched: `AERIE_CACHE`, else `~/.cache/aerie`."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()


def stored_checksum(shard: Path, store: str | None) -> str:
    """SHA-256 of a tensor file where it is; a cached copy says nothing about the store."""
    if store is None:
        return _file_checksum(shard)
    files, root = _open(store)
    digest = hashlib.sha256()
    with files.open(_key(shard, root), "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _open(address: str) -> tuple[Any, str]:
    try:
        files, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"features.store={address}: {error}; give an address that fsspec knows, with its "
            "package installed on every node (s3fs for s3://, gcsfs for gs://)"
        ) from error
    return files, str(root).rstrip("/")


def _make_folder(files: Any, path: str) -> None:
    names = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    if not FOLDERLESS.intersection(names):
        files.makedirs(path, exist_ok=True)


def _key(shard: Path, root: str) -> str:
    return f"{root}/{shard.parent.name}/{shard.name}"


def _download(files: Any, key: str, aside: Path) -> None:
    try:
        files.get_file(key, str(aside))
    except FileNotFoundError as error:
        raise InputError(
            f"{key}: no such object, though its shard is marked as finished; run extract_features "
            "as before: it computes this shard alone again"
        ) from error


def _file_checksum(path: Path) -> str:
    """SHA-256 of a file (1.8 GB/s where the CPU has instructions for it)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
