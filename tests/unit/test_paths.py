from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import InputError, ResourceError
from core.paths import folder_written_aside, resolve_path, write_atomically


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for the disk: the same error from the same call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_path_that_exists(tmp_path: Path) -> None:
    assert resolve_path(str(tmp_path), field="data.path") == tmp_path


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "some.json").touch()
    assert resolve_path("~/some.json", field="data.path") == tmp_path / "some.json"


def test_a_file_inside_an_installed_package() -> None:
    path = resolve_path("pkg://yaml/__init__.py", field="data.path")
    assert path.is_file() and path.parent.name == "yaml"


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("no/such.json", "data.path=no/such.json: no such file or folder"),
        ("pkg://yaml/no_such_file", "no such file or folder"),
        ("pkg://no_such_package/x", "pip install --no-deps no-such-package"),
        ("pkg://no.such/x", "'no.such' is not installed"),
        ("pkg://", "is not installed"),
        ("pkg://os/x", "'os' is not installed"),
        ("s3://bucket/x", "object-store addresses are not supported"),
    ],
)
def test_what_is_not_there_is_said(location: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        resolve_path(location, field="data.path")
    assert str(caught.value).startswith(f"data.path={location}: ")


def test_writing_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run" / "shard"
    write_atomically(path, b"before")
    said = pytest.raises(ResourceError, match=r"shard: cannot be written \(.*MB are free in ")
    with full_disk(), said:
        write_atomically(path, bytes(8192))
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    for name in ("one", "two"):
        with folder_written_aside(folder) as aside:
            (aside / name).touch()
    assert [path.name for path in folder.iterdir()] == ["two"]
    # safetensors has an error of its own.
    said = pytest.raises(ResourceError, match=r"model: cannot be written \(.*MB are free in ")
    with full_disk(), said, folder_written_aside(folder) as aside:
        save_file({"weight": np.zeros(2048)}, aside / "weights.safetensors")
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, folder_written_aside(folder) as aside:
        (aside / "three").touch()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_a_model_as_the_umask_has_it(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with folder_written_aside(tmp_path / "model") as aside:
            (aside / "part").mkdir()
            save_file({"weight": np.zeros(2)}, aside / "part" / "model.safetensors")
            (aside / "config.json").touch()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode, mode]


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "model", Path.rename
    with folder_written_aside(folder) as aside:
        (aside / "old").touch()

    def busy(path: Path, target: Path) -> Path:
        if path.name == ".model.tmp":
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), folder_written_aside(folder) as aside:
        (aside / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "old"]


def test_what_a_killed_writer_left_is_no_part_of_the_next_folder(tmp_path: Path) -> None:
    left = tmp_path / ".model.tmp"
    left.mkdir()
    (left / "half").touch()
    with folder_written_aside(tmp_path / "model") as aside:
        (aside / "whole").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "whole"]


def test_other_failures_to_write_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
