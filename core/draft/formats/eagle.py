"""The official layout of EAGLE-1, -2 and -3, as the papers' code trains and reads it.

Tensors of EAGLE-1 (EAGLE-2 is its tree): `fc.weight[, fc.bias]`, `layers.0.*`, the target's
embedding in most; of EAGLE-3: `fc`, `midlayer.*`, `norm`, `lm_head`, `d2t`, `t2d`.
Source: EAGLE `eagle/model/{ea_model,cnets1,cnets,configs}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from core.draft.base import DraftHead
from core.draft.formats.common import ExportedHead, ExportTarget, HeadFormat, ReadHead
from core.draft.formats.files import HeadFolder
from core.draft.formats.public import (
    EAGLES_OWN,
    build,
    check_supported,
    drafts_from_all,
    geometry_of,
    layers_of,
    llama_config,
    own_tensors,
    token_map,
)
from core.errors import ConfigError


class EagleFormat(HeadFormat):
    """What the papers' code reads, and every checkpoint that its authors published."""

    name: ClassVar[str] = "eagle"
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = EAGLES_OWN

    def recognizes(self, folder: HeadFolder) -> bool:
        """See base class: a config of one layer that names no engine's class."""
        config = folder.config
        return (
            bool(config)
            and not folder.is_aeries
            and "speculators_model_type" not in config
            and config.get("num_hidden_layers", 1) == 1
            and not any("eagle" in name.lower() for name in folder.architectures)
        )

    def read(self, folder: HeadFolder) -> ReadHead:
        """See base class."""
        config = folder.config
        check_supported(folder, config)
        head = build(folder, config, folder.tensors, geometry_of(folder, config))
        return ReadHead(head, {}, self.name)

    def export(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        """See base class: `pytorch_model.bin`, which every version of the code reads.

        Raises:
            ConfigError: the code has no setting for what the head does.
        """
        geometry, settings = head.geometry, head.config
        if geometry.head_dim * geometry.num_attention_heads != geometry.hidden_size:
            raise ConfigError(
                f"export.format={self.name}: EAGLE's code wants heads of "
                f"{geometry.hidden_size} / {geometry.num_attention_heads} values, this head's have "
                f"{geometry.head_dim}; choose another format"
            )
        if layers_of(head, target) is not None:
            raise ConfigError(
                f"export.format={self.name}: EAGLE's code always reads the states entering layers "
                "2, L/2 and L-3, this head others; choose another format"
            )
        config = llama_config(head, target, "LlamaForCausalLM")
        config["bias"] = bool(getattr(settings, "bias", False))
        if getattr(settings, "qkv_bias", False):
            config["qkv_bias"] = True
        tensors = own_tensors(head)
        differences = []
        if "lm_head.weight" in tensors:
            config["draft_vocab_size"] = head.vocabulary.size
        elif not head.vocabulary.is_whole:
            differences.append(drafts_from_all("EAGLE's code", head))
        return ExportedHead(
            config=config,
            tensors=tensors,
            pickled=True,
            token_map_W=token_map(head),
            differences=tuple(differences),
            run_with=f"EaModel.from_pretrained(use_eagle3={settings.kind == 'eagle3'}, "
            f'base_model_path="{target.path}", ea_model_path="<head>")',
        )
