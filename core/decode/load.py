"""From a config to a decoder that is ready to generate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.config import Config
from core.decode.calibration import Calibration, calibrate
from core.decode.engine import SpeculativeDecoder
from core.draft.base import DraftHead, build_head
from core.draft.folder import load_head
from core.models.target import Target, load_target, target_folder
from core.models.weights import load_embedding, load_output_head
from core.paths import resolve_path


@dataclass(frozen=True)
class LoadedDecoder:
    """A decoder and, where the tree size was measured, the measurement."""

    decoder: SpeculativeDecoder
    calibration: Calibration | None


def load_decoder(config: Config, num_threads: int | None = None) -> LoadedDecoder:
    """Load target and draft head, and choose the tree.

    Args:
        config: sections target, draft (path alone; None decodes plainly), decode.
        num_threads: torch threads of this process on CPU.
    Raises:
        UserError: see `load_target` and `load_head`; a head of another target is refused.
    """
    target = load_target(config.target, num_threads)
    head = load_head_for(target, config)
    decoder = SpeculativeDecoder(target, head, config.decode)
    calibration = None
    if head is not None and config.decode.total_tokens == "auto":
        calibration = calibrate(decoder)
        decoder.plan = calibration.plan
    return LoadedDecoder(decoder, calibration)


def load_head_for(target: Target, config: Config) -> DraftHead | None:
    """The head that `draft.path` names, ready to draft for a target that is loaded already.

    Raises:
        UserError: see `load_head`.
    """
    if config.draft.path is None:
        return None
    folder = resolve_path(config.draft.path, field="draft.path")
    head = load_head(
        folder,
        target_fingerprint=target.fingerprint,
        base_fingerprint=target.base_fingerprint,
        target_config=target.model.config,
    )
    prepare_head(head, config, target)
    return head


def untrained_head(config: Config, target: Target, like: DraftHead) -> DraftHead:
    """A head of random weights with the algorithm and vocabulary of a trained one."""
    head = build_head(like.config, like.geometry, like.vocabulary)
    head.aux_layers = like.aux_layers
    prepare_head(head, config, target)
    return head


def prepare_head(head: DraftHead, config: Config, target: Target) -> None:
    """Bring a head to the target's device and dtype, and attach the target's tensors."""
    folder = target_folder(config.target.path)
    head.to(device=target.device, dtype=target.dtype)
    embedding_VH, own_VH = load_embedding(folder), head.own_embedding_VH
    # Most checkpoints that hold an embedding hold a copy of the target's.
    if own_VH is not None and not torch.equal(own_VH.to(embedding_VH.dtype), embedding_VH):
        embedding_VH = own_VH
    head.own_embedding_VH = None
    head.attach_target(embedding_VH, load_output_head(folder))
    head.prepare_for_inference(packed=config.target.pack_linear and target.device.type == "cpu")
