"""Where the tensor files of feature shards are: beside their sidecars, or in an object store.

Features are the bulk of a run, so `features.store` may name any file system that fsspec knows
(`s3://bucket/run`, `gs://…`, `hdfs://…`); sidecars and manifest, a few kilobytes a shard, stay in
the run's folder, and a sidecar is written when its file has arrived. In a store, files stand under
the manifest's identity, so that runs of other targets or settings never meet. Readers fetch a
file once for each node into a cache, where it is named by its checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from core.errors import ConfigError, InputError, UserError
from core.paths import file_written_aside, write_atomically

CACHE_VARIABLE = "AERIE_CACHE"
DEFAULT_CACHE = "~/.cache/aerie"
# They have no folders: what would be made is a bucket, for every mistyped name.
FOLDERLESS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"})
# Gone with their process, or not to be written to.
UNFIT = ("memory", "http", "https", "data")
LOCAL = ("file", "local")
IDENTITY_LENGTH = 16
BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class ShardStore:
    """The files of one manifest's shards.

    Attributes:
        address: fsspec's, or None for files beside their sidecars.
        identity: of the manifest.
    """

    address: str | None
    identity: str

    def check(self) -> None:
        """Make sure that the store can be reached and written to, before any work.

        Raises:
            ConfigError: no address of such a store.
            InputError: it refuses.
        """
        if self.address is None:
            return
        scheme, separator, path = self.address.partition("://")
        relative = scheme in LOCAL and not path.startswith("/")
        if not separator or scheme in UNFIT or relative:
            raise ConfigError(
                f"features.store={self.address}: expected the address of a store that keeps "
                "files, such as s3://bucket/run or file:///mounted/folder"
            )
        with self._telling("cannot be written to"):
            probe = f"{self._root}/.aerie-{uuid.uuid4().hex}"
            self._make_folder(self._root)
            self._files.pipe_file(probe, b"")
            self._files.rm_file(probe)

    def put(self, shard: Path, content: bytes) -> None:
        """Write a file. One that was cut off counts for nothing: its sidecar comes later.

        Raises:
            ResourceError: the disk is full.
            InputError: the store refused.
        """
        if self.address is None:
            write_atomically(shard, content)
            return
        key = self._key(shard)
        with self._telling(f"{key} cannot be written"):
            self._make_folder(key.rpartition("/")[0])
            self._files.pipe_file(key, content)

    def size(self, shard: Path) -> int | None:
        """Bytes of a file; None if there is none.

        Raises:
            InputError: the store cannot be asked.
        """
        try:
            if self.address is None:
                return shard.stat().st_size
            with self._telling("cannot be read"):
                return int(self._files.info(self._key(shard))["size"])
        except FileNotFoundError:
            return None

    def local_file(self, shard: Path, checksum: str) -> Path:
        """The file on this node, fetched if need be; what is fetched is compared.

        Raises:
            InputError: the store has no such file, one of another checksum, or cannot be read.
            ResourceError: the cache's disk is full.
        """
        if self.address is None:
            return shard
        cached = cache_folder() / "features" / f"{checksum}.safetensors"
        if cached.exists():
            return cached
        key = self._key(shard)
        digest = hashlib.sha256()
        try:
            with file_written_aside(cached) as file:
                for block in self._blocks(key):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != checksum:
                    raise InputError(f"{self.address}: {key} is damaged; {AGAIN}")
        except FileNotFoundError as error:
            raise InputError(f"{self.address}: there is no {key} any more; {AGAIN}") from error
        return cached

    def checksum(self, shard: Path) -> str:
        """SHA-256 of a file where it is; a cached copy says nothing about the store.

        Raises:
            InputError: the store cannot be read.
        """
        if self.address is None:
            with shard.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for block in self._blocks(self._key(shard)):
            digest.update(block)
        return digest.hexdigest()

    @property
    def _root(self) -> str:
        return str(self._opened[1]).rstrip("/")

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        opened: tuple[Any, str] = fsspec.core.url_to_fs(self.address)
        return opened

    def _key(self, shard: Path) -> str:
        with self._telling("cannot be opened"):
            root = self._root
        return f"{root}/{self.identity[:IDENTITY_LENGTH]}/{shard.parent.name}/{shard.name}"

    def _make_folder(self, path: str) -> None:
        names = self._files.protocol
        if not FOLDERLESS.intersection((names,) if isinstance(names, str) else names):
            self._files.makedirs(path, exist_ok=True)

    def _blocks(self, key: str) -> Iterator[bytes]:
        with self._telling(f"{key} cannot be read"), self._files.open(key, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Every store has errors of its own; a file that is not there stays FileNotFoundError."""
        try:
            yield
        except (UserError, GeneratorExit):
            raise
        except FileNotFoundError:
            if "written" in what:
                raise self._failed(what, "no such bucket or folder") from None
            raise
        except Exception as error:
            raise self._failed(what, f"{type(error).__name__}: {error}") from error

    def _failed(self, what: str, why: str) -> InputError:
        return InputError(
            f"features.store={self.address}: {what} ({why}); check the address, this machine's "
            "credentials, and that fsspec's package for it is installed on every node (s3fs for "
            "s3://, gcsfs for gs://); the same command goes on from what is finished"
        )


AGAIN = (
    "run extract_features as before, once with --verify, which marks what is damaged, and once "
    "without: it computes this shard alone again"
)


def cache_folder() -> Path:
    """Where this node keeps what it fetched: `AERIE_CACHE`, else `~/.cache/aerie`."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()
