"""The run folder: what made a result, and whether it is finished.

`<output>/run.yaml` holds the resolved config, versions, git SHA and fingerprints of the inputs;
`<output>/report.json` is written last, so that its presence means "finished". Both carry the
run's *identity*, a hash of everything that can change the result: a stage that is run again with
the same identity is skipped, one with another identity is refused unless `overwrite=true`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from core import __version__
from core.config import Config
from core.errors import ConfigError
from core.paths import write_atomically
from core.progress import say

# Handed to a submitted job, whose copy of the working directory has no `.git`.
GIT_REVISION_VARIABLE = "AERIE_GIT_REVISION"
LOCK = ".lock"
# A run that was killed on a cluster may take so long to be gone.
LOCK_SECONDS = 30.0
PACKAGES = ("ray", "torch", "transformers", "deepspeed", "pyarrow", "safetensors", "numpy")
SAMPLED_ABOVE_BYTES = 256 * 2**20
SAMPLE_BLOCKS, SAMPLE_BYTES = 64, 2**16


class RunFolder:
    """One job's output folder."""

    def __init__(
        self, job: str, config: Config, sections: Iterable[str], inputs: Mapping[str, Path]
    ) -> None:
        """Compute the identity; nothing is written before `start`.

        Args:
            job: the job's name; part of the identity.
            config: resolved; `config.output` must be set.
            sections: the sections that the job reads.
            inputs: config field → existing file or folder; they count by content.
        """
        if config.output is None:
            raise ConfigError("output is not set; pass output=<folder>")
        self.path = Path(config.output).expanduser()
        self.job, self.config = job, config
        self.inputs = {name: fingerprint(path) for name, path in inputs.items()}
        self.settings = config.identity(sections)
        self.identity = hash_json({"job": job, "config": self.settings, "inputs": self.inputs})

    @property
    def finished(self) -> bool:
        """Whether this very run has finished before."""
        report = self.path / "report.json"
        return report.exists() and json.loads(report.read_text()).get("run") == self.identity

    @contextmanager
    def held(self, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Keep other runs out of the folder; the lock is gone with its holder, however it ends.

        Raises:
            ConfigError: another run is still at work in the folder after `wait_seconds`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        with (self.path / LOCK).open("w") as file:
            waited = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise ConfigError(
                            f"output={self.path}: another run is writing there; wait until it "
                            "has ended, stop it, or choose another output"
                        ) from error
                if not waited:
                    say(self.job, f"waiting for another run to leave {self.path}")
                    waited = True
                time.sleep(0.2)
            yield

    def start(self, *, of_parts: bool = False) -> None:
        """Write `run.yaml`, or go on with what an interrupted run of this identity left.

        Args:
            of_parts: the folder holds other run folders, each of which looks after itself, so
                that another run of this job is neither refused nor removed.
        Raises:
            ConfigError: the folder holds another run and `overwrite` is false, or files that
                are no run at all, which nothing lifts: they would be replaced.
        """
        record = self.path / "run.yaml"
        if record.exists():
            before = yaml.safe_load(record.read_text())
            if before.get("identity") == self.identity:
                return
            if not (of_parts and before.get("job") == self.job):
                self._give_way(before)
        elif not of_parts:
            self._refuse_foreign_files()
        content = {
            "job": self.job,
            "identity": self.identity,
            "inputs": self.inputs,
            "settings": self.settings,
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
            "git": git_revision(),
        }
        write_atomically(record, yaml.safe_dump(content, sort_keys=False).encode())

    def _refuse_foreign_files(self) -> None:
        if not self.path.is_dir():
            return
        files = (path for path in self.path.rglob("*") if path.is_file())
        foreign = sorted(str(p.relative_to(self.path)) for p in files if not _hidden(p, self.path))
        if foreign:
            raise ConfigError(
                f"output={self.path} holds files that are no run of Aerie ({foreign[0]}, …); "
                "choose an empty or a new folder"
            )

    def _give_way(self, before: Mapping[str, Any]) -> None:
        if not self.config.overwrite:
            raise ConfigError(
                f"output={self.path} holds another {before.get('job')} run "
                f"({self._differences(before)}); choose another output or pass overwrite=true"
            )
        # The record stays until the new one replaces it: killed in between, what is left here
        # is still known to be another run's.
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in ("run.yaml", LOCK):
                path.unlink()

    def abandon_if_empty(self) -> None:
        """Remove `run.yaml` where it is all that the folder holds."""
        if {path.name for path in self.path.iterdir()} <= {"run.yaml", LOCK}:
            (self.path / "run.yaml").unlink(missing_ok=True)

    def finish(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Write `report.json`, which marks the run as finished, and return it."""
        content = {"job": self.job, "run": self.identity, **report}
        write_atomically(self.path / "report.json", json.dumps(content, indent=2).encode())
        return content

    def report(self) -> dict[str, Any]:
        """The report of the finished run."""
        content: dict[str, Any] = json.loads((self.path / "report.json").read_text())
        return content

    def _differences(self, before: Mapping[str, Any]) -> str:
        if before.get("job") != self.job:
            return f"this is {self.job}"
        found = []
        old_settings = before.get("settings", {})
        for section, values in self.settings.items():
            old = old_settings.get(section, {})
            for key, value in values.items():
                if old.get(key) != value:
                    found.append(f"{section}.{key}: {old.get(key)} → {value}")
        old_inputs = before.get("inputs", {})
        found += [f"the content of {k}" for k, v in self.inputs.items() if old_inputs.get(k) != v]
        return "differs in " + ", ".join(found) if found else "made by another version"


def fingerprint(path: Path) -> str:
    """A hash that stands for the content of a file or folder.

    A folder that a job wrote counts by that run's identity, which covers what went into it.
    Files above 256 MiB count by size and 64 samples of 64 KiB spread evenly: model weights of
    tens of GB would take minutes otherwise.
    """
    if path.is_file():
        return _hash_file(path)
    record = path / "run.yaml"
    if record.exists():
        return str(yaml.safe_load(record.read_text())["identity"])
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
    return hash_json({str(p.relative_to(path)): _hash_file(p) for p in files})


def fingerprint_of(content: bytes) -> str:
    """What `fingerprint` gives for a small file of this content."""
    return hashlib.sha256(str(len(content)).encode() + content).hexdigest()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _hash_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLED_ABOVE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for index in range(SAMPLE_BLOCKS):
                file.seek((size - SAMPLE_BYTES) * index // (SAMPLE_BLOCKS - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Aerie, Python and the packages that decide a result."""
    found = {"aerie": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def git_revision() -> str | None:
    """The commit of the working directory, `+changes` if it is not clean; None outside git.

    In a submitted job, the commit that it was submitted from, where `submit` handed it on.
    """
    if handed_on := os.environ.get(GIT_REVISION_VARIABLE):
        return handed_on
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")
