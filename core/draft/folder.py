"""A draft head's folder: the public EAGLE layout plus what Aerie knows about it.

    config.json              geometry, in the form that EAGLE, vLLM and SGLang read
    model.safetensors        weights by their public names; no embedding, no output head
    aerie.json               algorithm and its config, target, training run
    draft_vocab.safetensors  d2t [W]: the target id of each draft id, where W < V

The vocabulary has a file of its own because engines refuse an EAGLE-1 checkpoint with tensors
that they do not know.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from core.config import DRAFT_CONFIGS
from core.draft.base import DraftHead, TargetGeometry, build_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError, MismatchError

FORMAT_VERSION = 1
VOCABULARY_FILE = "draft_vocab.safetensors"


def save_head(folder: Path, head: DraftHead, record: dict[str, Any]) -> None:
    """Write a head; the folder appears whole or not at all.

    Args:
        folder: replaced if it exists.
        head: weights are saved in their dtype.
        record: kept in `aerie.json` (`target_fingerprint`, training run, measurements).
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.eagle_tensors().items()}
    save_file(tensors, aside / "model.safetensors")
    if not head.vocabulary.is_whole:
        save_file({"d2t": head.vocabulary.d2t_W.contiguous()}, aside / VOCABULARY_FILE)
    config = head.config.model_dump(mode="json", exclude={"path"})
    about = {"format_version": FORMAT_VERSION, "draft": config, **record}
    dtype = str(next(head.parameters()).dtype).removeprefix("torch.")
    (aside / "config.json").write_text(json.dumps(_public_config(head, dtype), indent=2))
    (aside / "aerie.json").write_text(json.dumps(about, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load_head(folder: Path, *, target_fingerprint: str | None = None) -> DraftHead:
    """Read a head that `save_head` wrote; the target's tensors are still to be attached.

    Raises:
        InputError: not such a folder.
        MismatchError: trained for another target than `target_fingerprint`.
    """
    about = read_record(folder)
    trained_for = about.get("target_fingerprint")
    if target_fingerprint and trained_for and trained_for != target_fingerprint:
        raise MismatchError(
            f"draft.path={folder} was trained for target {trained_for[:12]}, but target.path is "
            f"{target_fingerprint[:12]}; train a head for this target, or name the head's target"
        )
    missing = [n for n in ("config.json", "model.safetensors") if not (folder / n).exists()]
    if missing:
        raise InputError(
            f"draft.path={folder}: no {' and no '.join(missing)} there; copy the whole folder that "
            "train_draft wrote"
        )
    public = json.loads((folder / "config.json").read_text())
    geometry = TargetGeometry(**{name: public[name] for name in TargetGeometry.__annotations__})
    config = DRAFT_CONFIGS[about["draft"]["kind"]].model_validate(about["draft"])
    vocabulary = DraftVocabulary.whole(geometry.vocab_size)
    if (folder / VOCABULARY_FILE).exists():
        d2t_W = load_file(folder / VOCABULARY_FILE)["d2t"]
        vocabulary = DraftVocabulary(d2t_W, geometry.vocab_size)
    head = build_head(config, geometry, vocabulary)
    tensors = load_file(folder / "model.safetensors")
    head.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
    head.load_eagle_tensors(tensors)
    head.aux_layers = tuple(about.get("feature_layers", ())[:-1]) or None
    return head


def read_record(folder: Path) -> dict[str, Any]:
    """`aerie.json` of a head's folder.

    Raises:
        InputError: there is none, or of a version that this code does not know.
    """
    path = folder / "aerie.json"
    if not path.exists():
        raise InputError(
            f"draft.path={folder}: no aerie.json there; give the folder that train_draft wrote "
            "(<output>/head)"
        )
    about: dict[str, Any] = json.loads(path.read_text())
    if about.get("format_version") != FORMAT_VERSION or about["draft"]["kind"] not in DRAFT_CONFIGS:
        raise InputError(
            f"{path}: format {about.get('format_version')}, kind {about['draft'].get('kind')}; "
            f"this version reads format {FORMAT_VERSION} of {', '.join(DRAFT_CONFIGS)}"
        )
    return about


def _public_config(head: DraftHead, dtype: str) -> dict[str, Any]:
    geometry = head.geometry
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "bias": getattr(head.config, "bias", False),
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        **{name: getattr(geometry, name) for name in TargetGeometry.__annotations__},
    }
