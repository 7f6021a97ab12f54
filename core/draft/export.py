"""Writing a draft head as another engine's files, and reading them back to be sure."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from core.draft.base import DraftHead
from core.draft.folder import load_head, save_head
from core.draft.formats import ExportedHead, ExportTarget, ReadHead, read_head, writer
from core.draft.formats.aerie import AerieFormat
from core.draft.formats.files import CONFIG, PICKLED, SAFETENSORS, TOKEN_MAP
from core.errors import ConfigError, StageError
from core.models.target import target_fingerprint
from core.paths import folder_written_aside

# Aerie's own format, which no engine reads and `export_draft` writes all the same.
OWN = AerieFormat.name
OWN_RUN = "python -m serve.run target.path=<its target> draft.path=<head>"


def export_head(
    folder: Path, head: DraftHead, target: ExportTarget, format_name: str, dtype: str
) -> dict[str, Any]:
    """Write a head in the layout of an engine; the folder appears whole or not at all.

    Args:
        folder: replaced if it exists.
        head: as it was read; its weights are changed to the dtype.
        target: that it drafts for.
        format_name: of a format that can be written.
        dtype: of the weights; `same` keeps the head's.
    Returns:
        What was written, and what the engine does otherwise than Aerie, for the report.
    Raises:
        ConfigError: no such format, or it cannot hold this head.
        StageError: what was written does not read back as the same head.
    """
    form = writer(format_name, head.config)
    if dtype != "same":
        _convert(head, getattr(torch, dtype))
    exported = form.export(head, target)
    with folder_written_aside(folder) as aside:
        _write(aside, exported)
        _check_same(head, read_head(aside).head, format_name)
    return _report(
        folder,
        format_name,
        head,
        tensors=len(exported.tensors),
        run_with=exported.run_with,
        differences=exported.differences,
    )


def export_saved_head(
    folder: Path,
    saved: Path,
    target: Path,
    target_config: PretrainedConfig,
    format_name: str,
    dtype: str,
) -> dict[str, Any]:
    """`export_head` of a folder, for an engine that is to be started with it.

    Args:
        folder: replaced if it exists.
        saved: the head, in any format.
        target: HF folder of the target that it drafts for.
        target_config: of the same.
        format_name: of a format that can be written.
        dtype: of the weights.
    Raises:
        UserError: see `load_head` and `export_head`.
    """
    fingerprint = target_fingerprint(target)
    head = load_head(saved, target_fingerprint=fingerprint, target_config=target_config)
    to = ExportTarget.of(str(target), target_config, fingerprint)
    report = export_head(folder, head, to, format_name, dtype)
    # It is SGLang's to read, and for users to name.
    (folder / TOKEN_MAP).unlink(missing_ok=True)
    return report


def export_own(folder: Path, found: ReadHead, target: ExportTarget, dtype: str) -> dict[str, Any]:
    """Write a head as `train_draft` does, in another dtype or out of another engine's layout.

    Args:
        folder: replaced if it exists.
        found: the head; what is recorded of it is kept.
        target: that it drafts for.
        dtype: of the weights; `same` keeps the head's.
    Returns:
        What was written, for the report.
    """
    head = found.head
    if dtype != "same":
        _convert(head, getattr(torch, dtype))
    layers = list(head.feature_layers(target.num_layers))
    record = {"target_fingerprint": target.fingerprint, "feature_layers": layers, **found.record}
    save_head(folder, head, record)
    _check_same(head, read_head(folder).head, OWN)
    return _report(folder, OWN, head, tensors=len(head.eagle_tensors()), run_with=OWN_RUN)


def _report(
    folder: Path,
    format_name: str,
    head: DraftHead,
    *,
    tensors: int,
    run_with: str,
    differences: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "format": format_name,
        "kind": head.config.kind,
        "head": str(folder),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "tensors": tensors,
        "dtype": str(next(head.parameters()).dtype).removeprefix("torch."),
        "draft_vocab_size": head.vocabulary.size,
        "target_vocab_size": head.vocabulary.target_size,
        "differences": list(differences),
        "run_with": run_with.replace("<head>", str(folder)),
    }


def _convert(head: DraftHead, dtype: torch.dtype) -> None:
    head.to(dtype)
    for name, tensor in head.named_parameters():
        if not tensor.isfinite().all():
            raise ConfigError(
                f"export.dtype={str(dtype).removeprefix('torch.')}: {name} has values beyond its "
                "range; choose bfloat16 or float32"
            )


def _write(folder: Path, exported: ExportedHead) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in exported.tensors.items()}
    if exported.pickled:
        _save(tensors, folder / PICKLED)
    else:
        # Engines built on transformers want to be told which framework wrote it.
        save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})
    if exported.token_map_W is not None:
        _save(exported.token_map_W, folder / TOKEN_MAP)
    (folder / CONFIG).write_text(json.dumps(dict(exported.config), indent=2) + "\n")


def _save(content: Any, path: Path) -> None:
    # By way of memory: of a full disk, torch.save into a file makes an error of another kind.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def _check_same(head: DraftHead, again: DraftHead, format_name: str) -> None:
    before, after = head.eagle_tensors(), again.eagle_tensors()
    # A bias of zeros is as good as none.
    differing = [
        name
        for name, tensor in before.items()
        if not torch.equal(tensor.cpu(), after.get(name, torch.zeros_like(tensor, device="cpu")))
    ]
    if not torch.equal(head.vocabulary.d2t_W.cpu(), again.vocabulary.d2t_W):
        differing.append("draft vocabulary")
    if differing:
        raise StageError(
            f"the head that was written for {format_name} reads back with another "
            f"{', '.join(differing)}; this is a mistake of Aerie's, please report it"
        )
