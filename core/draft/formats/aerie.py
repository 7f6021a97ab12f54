"""Aerie's own folder: the public EAGLE layout plus what Aerie knows about the head.

    config.json              geometry, in the form that EAGLE, vLLM and SGLang read
    model.safetensors        weights by their public names; no embedding, no output head
    aerie.json               algorithm and its config, target, training run
    draft_vocab.safetensors  d2t [W]: the target id of each draft id, where W < V

The vocabulary has a file of its own because engines refuse an EAGLE-1 checkpoint with tensors
that they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file

from core.config import DRAFT_CONFIGS
from core.draft.base import DraftHead, TargetGeometry, build_head
from core.draft.formats.common import HeadFormat, ReadHead
from core.draft.formats.files import AERIE, CONFIG, SAFETENSORS, HeadFolder, read_tensors
from core.draft.formats.public import EMBEDDING
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError

FORMAT_VERSION = 1
VOCABULARY_FILE = "draft_vocab.safetensors"


class AerieFormat(HeadFormat):
    """What `train_draft` writes; every algorithm, without exception."""

    name: ClassVar[str] = "aerie"

    def recognizes(self, folder: HeadFolder) -> bool:
        """See base class."""
        return folder.is_aeries

    def read(self, folder: HeadFolder) -> ReadHead:
        """See base class."""
        about = read_record(folder)
        missing = [name for name in (CONFIG, SAFETENSORS) if not folder.has(name)]
        if missing:
            raise InputError(
                f"draft.path={folder.path}: no {' and no '.join(missing)} there; copy the whole "
                "folder that train_draft wrote"
            )
        fields = TargetGeometry.__dataclass_fields__
        geometry = TargetGeometry(
            **{name: folder.config[name] for name in fields if name in folder.config}
        )
        config = DRAFT_CONFIGS[about["draft"]["kind"]].model_validate(about["draft"])
        vocabulary = DraftVocabulary.whole(geometry.vocab_size)
        if folder.has(VOCABULARY_FILE):
            d2t_W = read_tensors(folder.path / VOCABULARY_FILE)["d2t"]
            vocabulary = DraftVocabulary(d2t_W, geometry.vocab_size)
        head = build_head(config, geometry, vocabulary)
        tensors = dict(folder.tensors)
        embedding_VH = tensors.pop(EMBEDDING, None)
        head.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
        head.load_eagle_tensors(tensors)
        head.own_embedding_VH = embedding_VH
        # The record names all that the features held, of which EAGLE-1 reads the last alone: the
        # final feature, which is no layer's.
        if config.num_aux_layers:
            head.aux_layers = tuple(about.get("feature_layers", ())[:-1]) or None
        return ReadHead(head, about, self.name)


def read_record(folder: HeadFolder) -> dict[str, Any]:
    """`aerie.json` of a head's folder.

    Raises:
        InputError: of a version that this code does not know.
    """
    about = folder.json(AERIE)
    draft = about.get("draft", {})
    if about.get("format_version") != FORMAT_VERSION or draft.get("kind") not in DRAFT_CONFIGS:
        raise InputError(
            f"{folder.path / AERIE}: format {about.get('format_version')}, kind "
            f"{draft.get('kind')}; this version reads format {FORMAT_VERSION} of "
            f"{', '.join(DRAFT_CONFIGS)}"
        )
    if (convention := about.get("layer_convention", "entering")) != "entering":
        raise InputError(
            f"{folder.path / AERIE}: layer_convention is {convention}; a layer's id must mean the "
            "state that enters it (entering): renumber feature_layers, or train the head again"
        )
    return about


def write(folder: Path, head: DraftHead, record: Mapping[str, Any]) -> None:
    """Write the files of a head into a folder that is there and empty."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.eagle_tensors().items()}
    if head.own_embedding_VH is not None:
        tensors[EMBEDDING] = head.own_embedding_VH.cpu().contiguous()
    save_file(tensors, folder / SAFETENSORS)
    if not head.vocabulary.is_whole:
        save_file({"d2t": head.vocabulary.d2t_W.contiguous()}, folder / VOCABULARY_FILE)
    config = head.config.model_dump(mode="json", exclude={"path"})
    about = {"format_version": FORMAT_VERSION, "draft": config, **record}
    dtype = str(next(head.parameters()).dtype).removeprefix("torch.")
    public = _public_config(head, dtype)
    if "d2t" in tensors:
        public["draft_vocab_size"] = head.vocabulary.size
    (folder / CONFIG).write_text(json.dumps(public, indent=2))
    (folder / AERIE).write_text(json.dumps(about, indent=2))


def _public_config(head: DraftHead, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "bias": getattr(head.config, "bias", False),
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        **asdict(head.geometry),
    }
