"""A draft head's folder: written in Aerie's format, read in any that `core.draft.formats` knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from core.draft.base import DraftHead, TargetGeometry
from core.draft.formats import HeadFolder, ReadHead, read_head, recognize
from core.draft.formats.aerie import read_record as read_aerie_record
from core.draft.formats.aerie import write
from core.draft.formats.files import AERIE
from core.errors import InputError, MismatchError
from core.paths import folder_written_aside
from core.progress import say


def save_head(folder: Path, head: DraftHead, record: dict[str, Any]) -> None:
    """Write a head; the folder appears whole or not at all.

    Args:
        folder: replaced if it exists.
        head: weights are saved in their dtype.
        record: kept in `aerie.json` (`target_fingerprint`, training run, measurements).
    """
    with folder_written_aside(folder) as aside:
        write(aside, head, record)


def load_head(
    folder: Path,
    *,
    target_fingerprint: str | None = None,
    base_fingerprint: str | None = None,
    target_config: PretrainedConfig | None = None,
) -> DraftHead:
    """Read a head in any format; the target's tensors are still to be attached.

    Args:
        folder: that train_draft wrote, or one of others' making.
        target_fingerprint: of the target that it shall draft for.
        base_fingerprint: of the model below that target's adapters. A head of it may draft too:
            fewer of its guesses are right, and all are verified as ever.
        target_config: of the same; what heads that name no target are held against.
    Raises:
        InputError: no such folder, or a damaged one.
        MismatchError: trained for another target.
    """
    found = read_head(folder)
    known = found.record.get("target_fingerprint")
    of_base = base_fingerprint is not None and known == base_fingerprint
    check_target(folder, found, None if of_base else target_fingerprint, target_config)
    if of_base:
        say(
            "draft",
            f"{folder} was trained for the target without target.adapter: the text is the same, "
            "but fewer of its guesses will be right; train a head on the merged target for more",
        )
    return found.head


def check_target(
    folder: Path, found: ReadHead, fingerprint: str | None, config: PretrainedConfig | None
) -> None:
    """Refuse a head of another target, as far as it can be told.

    Raises:
        MismatchError: what the head says of its target is not what this target is.
    """
    trained_for = found.record.get("target_fingerprint")
    if fingerprint and trained_for and trained_for != fingerprint:
        raise MismatchError(
            f"draft.path={folder} was trained for target {trained_for[:12]}, but target.path is "
            f"{fingerprint[:12]}; train a head for this target, or name the head's target"
        )
    if config is None:
        return
    own, targets = found.head.geometry, TargetGeometry.of(config)
    differing = [
        f"{what} {getattr(own, name)} instead of {getattr(targets, name)}"
        for name, what in (("vocab_size", "a vocabulary of"), ("hidden_size", "a hidden size of"))
        if getattr(own, name) != getattr(targets, name)
    ]
    if differing:
        raise MismatchError(
            f"draft.path={folder} was made for a target with {' and '.join(differing)}, which "
            "target.path has; name the head's own target, or train a head for this one"
        )
    layers, num_layers = found.head.aux_layers or (), config.get_text_config().num_hidden_layers
    if not all(0 <= layer < num_layers for layer in layers):
        raise MismatchError(
            f"draft.path={folder} reads the states entering layers {', '.join(map(str, layers))}, "
            f"target.path has {num_layers} layers (0..{num_layers - 1}); it was made for another "
            "target, or for an engine that counts layers otherwise"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """`aerie.json` of a head that train_draft wrote.

    Raises:
        InputError: there is none, or of a version that this code does not know.
    """
    files = HeadFolder(folder)
    if not files.has(AERIE):
        raise InputError(
            f"draft.path={folder}: no aerie.json there; give the folder that train_draft wrote "
            "(<output>/head)"
        )
    return read_aerie_record(files)


def check_folder(folder: Path) -> None:
    """Raise InputError where no head that Aerie reads can be; no weights are read."""
    if recognize(folder).name == "aerie":
        read_record(folder)
