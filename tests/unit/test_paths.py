from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import InputError
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
