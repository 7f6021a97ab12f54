from __future__ import annotations

import resource
from pathlib import Path

import pytest

from core.errors import InputError, ResourceError
from core.paths import resolve_path, write_atomically


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
    """A limit on the size of files stands for the disk: the same error from the same call."""
    path = tmp_path / "run" / "shard"
    write_atomically(path, b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"shard: cannot be written \(.*MB are free in "):
            write_atomically(path, bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_other_failures_to_write_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
