"""SGLang's layout, which SpecForge trains and exports.

The names are EAGLE's. What differs: the class names; EAGLE-1's `fc` always has a bias, while
`"bias": true` in the config would give biases to the attention; layer ids count the layer whose
*output* is read, one less than the layer that it enters. (vLLM loads `LlamaForCausalLMEagle3` too
and takes its ids for layers that are entered; a class of this name is read as SGLang means it.)
Source: SGLang 0.5.23 `srt/models/{llama_eagle,llama_eagle3,qwen2_eagle,llama}.py`,
`srt/speculative/eagle_worker_v2.py`; SpecForge 0.2.0 `export/to_sglang.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from core.draft.base import DraftHead
from core.draft.formats.common import ExportedHead, ExportTarget, HeadFormat, ReadHead
from core.draft.formats.files import TOKEN_MAP, HeadFolder
from core.draft.formats.public import (
    EAGLES_OWN,
    LAYER_IDS,
    build,
    check_supported,
    drafts_from_all,
    geometry_of,
    layers_of,
    llama_config,
    own_tensors,
    token_map,
)


class SglangFormat(HeadFormat):
    """What SGLang serves and SpecForge trains."""

    name: ClassVar[str] = "sglang"
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = EAGLES_OWN

    def recognizes(self, folder: HeadFolder) -> bool:
        """See base class: classes `…ForCausalLMEagle` and `…ForCausalLMEagle3`."""
        return (
            not folder.is_aeries
            and "speculators_model_type" not in folder.config
            and any(name.endswith(("Eagle", "Eagle3")) for name in folder.architectures)
        )

    def read(self, folder: HeadFolder) -> ReadHead:
        """See base class."""
        config = dict(folder.config)
        check_supported(folder, config)
        ids = (config.get("eagle_config") or {}).get(LAYER_IDS)
        layers = tuple(index + 1 for index in ids) if ids else None
        tensors = dict(folder.tensors)
        if "fc.bias" in tensors and not tensors["fc.bias"].any():
            # Always there, and zeros where the head was trained without.
            del tensors["fc.bias"]
        head = build(folder, config, tensors, geometry_of(folder, config), layers)
        return ReadHead(head, {}, self.name)

    def export(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        """See base class."""
        if head.config.kind == "eagle1":
            return self._export_eagle1(head, target)
        config = llama_config(head, target, "LlamaForCausalLMEagle3")
        # Always a number: null makes SGLang take the target's output head for the draft's own.
        config["draft_vocab_size"] = head.vocabulary.size
        if (layers := layers_of(head, target)) is not None:
            config["eagle_config"] = {
                LAYER_IDS: [layer - 1 for layer in layers],
                "use_aux_hidden_state": True,
            }
        differences: tuple[str, ...] = ()
        if head.own_embedding_VH is not None:
            differences = (
                "SGLang attaches the target's embedding in place of the head's own: acceptance "
                "falls as far as the two differ",
            )
        return ExportedHead(
            config=config,
            tensors=own_tensors(head),
            differences=differences,
            run_with=_command("EAGLE3", target),
        )

    def _export_eagle1(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        qkv_bias = bool(getattr(head.config, "qkv_bias", False))
        family = "Qwen2ForCausalLMEagle" if qkv_bias else "LlamaForCausalLMEagle"
        config: dict[str, Any] = llama_config(head, target, family)
        if qkv_bias:
            config["model_type"] = "qwen2"
        # Of the attention, in SGLang; and `draft_vocab_size` stays away, it is read as EAGLE-3's.
        config["bias"] = False
        tensors = own_tensors(head)
        if "fc.bias" not in tensors:
            # SGLang's fc has one in any case, and would leave it as its memory happened to be.
            tensors["fc.bias"] = torch.zeros_like(tensors["fc.weight"][:, 0])
        ids_W = token_map(head)
        command, differences = _command("EAGLE", target), []
        if ids_W is not None:
            command += f" --speculative-token-map <head>/{TOKEN_MAP}"
            differences.append(drafts_from_all("Without --speculative-token-map SGLang", head))
        return ExportedHead(
            config=config,
            tensors=tensors,
            token_map_W=ids_W,
            differences=tuple(differences),
            run_with=command,
        )


def _command(algorithm: str, target: ExportTarget) -> str:
    return (
        f"python -m sglang.launch_server --model-path {target.path} "
        f"--speculative-algorithm {algorithm} --speculative-draft-model-path <head>"
    )
