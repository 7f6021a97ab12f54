"""From a config to a decoder that is ready to generate."""

from __future__ import annotations

from dataclasses import dataclass

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
    head = None
    if config.draft.path is not None:
        folder = resolve_path(config.draft.path, field="draft.path")
        head = load_head(folder, target_fingerprint=target.fingerprint)
        prepare_head(head, config, target)
    decoder = SpeculativeDecoder(target, head, config.decode)
    calibration = None
    if head is not None and config.decode.total_tokens == "auto":
        calibration = calibrate(decoder)
        decoder.plan = calibration.plan
    return LoadedDecoder(decoder, calibration)


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
    head.attach_target(load_embedding(folder), load_output_head(folder))
    head.prepare_for_inference(packed=config.target.pack_linear and target.device.type == "cpu")
