"""Training that goes on from a trained head instead of random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config.draft import DraftConfig
from core.draft.base import DraftHead, TargetGeometry, geometry_of
from core.draft.folder import load_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import MismatchError


def load_start(
    folder: Path,
    config: DraftConfig,
    target: TargetGeometry,
    fingerprint: str,
    aux_layers: tuple[int, ...],
) -> DraftHead:
    """The head to start from, held against the one that the config describes.

    What only concerns training (weights of the loss, steps of training-time test, noise) may
    differ, and so may the draft vocabulary (`start_vocabulary`).

    Args:
        folder: of a head, in any format.
        config: of the head to be trained.
        target: what it drafts for.
        fingerprint: of that target.
        aux_layers: whose entering states the features hold.
    Raises:
        InputError: no head there, or a damaged one.
        MismatchError: of another target, algorithm or shape, or on other features.
    """
    head = load_head(folder, target_fingerprint=fingerprint)
    named: dict[str, tuple[Any, Any]] = {"kind": (head.config.kind, config.kind)}
    if head.config.kind == config.kind:
        for name in config.architecture:
            named[name] = (getattr(head.config, name), getattr(config, name))
        wanted = asdict(geometry_of(config, target))
        named.update({name: (value, wanted[name]) for name, value in asdict(head.geometry).items()})
        if head.aux_layers:
            named["feature_layers"] = (head.aux_layers, aux_layers)
        named["embedding"] = ("its own" if head.own_embedding_VH is not None else "target's",
                              "target's")  # fmt: skip
    differing = [
        f"{name} is {its}, not {ours}" for name, (its, ours) in named.items() if its != ours
    ]
    if differing:
        raise MismatchError(
            f"draft.path={folder} is no head that this config goes on from: "
            f"{'; '.join(differing)}; set draft.* to what the head is, or leave draft.path "
            "out to start anew"
        )
    return head


def start_vocabulary(head: DraftHead, counts_V: Tensor, size: int) -> DraftVocabulary:
    """The draft vocabulary to go on with: the head's own.

    A head that guesses with the target's output head takes in further tokens, up to
    `draft.vocab_size`, for which it has no weights to learn anew.

    Args:
        head: from `load_start`.
        counts_V: int64 [V], how often the target's tokens are supervised.
        size: `draft.vocab_size`.
    """
    return head.vocabulary if head.fixed_vocabulary else head.vocabulary.grown(counts_V, size)
