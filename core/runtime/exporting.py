"""The stage export_draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from core.config import Config
from core.draft.export import OWN, export_head, export_own
from core.draft.folder import check_folder, check_target
from core.draft.formats import WRITABLE, ExportTarget, read_head
from core.errors import ConfigError
from core.models.target import target_fingerprint, target_folder
from core.paths import resolve_path
from core.progress import say
from core.provenance import RunFolder

STAGE = "export_draft"
HEAD_FOLDER = "head"


def export_inputs(config: Config) -> dict[str, Path]:
    """The head and its target.

    Raises:
        UserError: one of them is not set or not there, or the format does not exist.
    """
    if config.export.format not in (*WRITABLE, OWN):
        raise ConfigError(
            f"export.format={config.export.format}: choose one of {', '.join((*WRITABLE, OWN))}"
        )
    if not config.draft.path:
        raise ConfigError("draft.path is not set; give a draft head's folder (<output>/head)")
    head = resolve_path(config.draft.path, field="draft.path")
    check_folder(head)
    return {"target.path": target_folder(config.target.path), "draft.path": head}


def export_draft(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Write `<output>/head` in the layout asked for."""
    inputs = export_inputs(config)
    found = read_head(inputs["draft.path"])
    about = AutoConfig.from_pretrained(inputs["target.path"])
    fingerprint = target_fingerprint(inputs["target.path"])
    target = ExportTarget.of(str(config.target.path), about, fingerprint)
    check_target(inputs["draft.path"], found, target.fingerprint, about)
    assert config.export.format is not None
    say(STAGE, f"{found.head.config.kind} head ({found.format}) → {config.export.format}")
    place, dtype = folder.path / HEAD_FOLDER, config.export.dtype
    if config.export.format == OWN:
        report = export_own(place, found, target, dtype)
    else:
        report = export_head(place, found.head, target, config.export.format, dtype)
    for sentence in report["differences"]:
        say(STAGE, f"note: {sentence}")
    say(STAGE, f"run it: {report['run_with']}")
    return {"source_format": found.format, **report}
