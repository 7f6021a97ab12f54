"""vLLM's plain layout.

The names are EAGLE's. What differs: the class names; EAGLE-1's `fc` has no bias; a layer id
means the layer that the state enters; tensors that a class does not expect are errors.
Source: vLLM 0.32 `model_executor/models/{llama_eagle,llama_eagle3}.py`,
`v1/worker/gpu_model_runner.py`, `transformers_utils/configs/eagle.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from core.draft.base import DraftHead
from core.draft.formats.common import ExportedHead, ExportTarget, HeadFormat, ReadHead
from core.draft.formats.files import HeadFolder
from core.draft.formats.public import (
    LAYER_IDS,
    build,
    check_supported,
    drafts_from_all,
    geometry_of,
    layers_of,
    llama_config,
    own_tensors,
    token_map,
    without_whole_vocabulary,
)

# vLLM's names of the algorithms, `method` in its speculative configuration.
METHODS = {"eagle1": "eagle", "eagle3": "eagle3"}
CHAIN = (
    "vLLM drafts a chain, no tree: expect the acceptance that evaluate_draft measures with "
    "decode.top_k=1"
)


class VllmFormat(HeadFormat):
    """What vLLM serves with `method` eagle or eagle3."""

    name: ClassVar[str] = "vllm"
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "eagle1": ("bias",),
        "eagle3": ("qkv_bias",),
    }

    def recognizes(self, folder: HeadFolder) -> bool:
        """See base class: classes `Eagle…ForCausalLM` and `Eagle3…ForCausalLM`."""
        return (
            not folder.is_aeries
            and "speculators_model_type" not in folder.config
            and any(
                name.startswith("Eagle") and name.endswith("ForCausalLM")
                for name in folder.architectures
            )
        )

    def read(self, folder: HeadFolder) -> ReadHead:
        """See base class."""
        config = dict(folder.config)
        check_supported(folder, config)
        ids = config.get(LAYER_IDS) or (config.get("eagle_config") or {}).get(LAYER_IDS)
        layers = tuple(ids) if ids else None
        head = build(folder, config, folder.tensors, geometry_of(folder, config), layers)
        return ReadHead(head, {}, self.name)

    def export(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        """See base class."""
        if head.config.kind == "eagle1":
            return self._export_eagle1(head, target)
        config: dict[str, Any] = {
            **llama_config(head, target, "Eagle3LlamaForCausalLM"),
            "draft_vocab_size": head.vocabulary.size,
            "norm_before_residual": bool(getattr(head.config, "norm_before_residual", False)),
        }
        if (layers := layers_of(head, target)) is not None:
            config[LAYER_IDS] = list(layers)
        return ExportedHead(
            config=config,
            tensors=without_whole_vocabulary(head),
            differences=(CHAIN,),
            run_with=command("eagle3", target),
        )

    def _export_eagle1(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        config = llama_config(head, target, "EagleLlamaForCausalLM")
        if getattr(head.config, "qkv_bias", False):
            config["qkv_bias"] = True
        differences = [CHAIN]
        if not head.vocabulary.is_whole:
            differences.append(drafts_from_all("vLLM", head))
        return ExportedHead(
            config=config,
            tensors=own_tensors(head),
            token_map_W=token_map(head),
            differences=tuple(differences),
            run_with=command("eagle", target),
        )


def command(method: str, target: ExportTarget) -> str:
    """vLLM's server with this head; the method is said, for vLLM guesses it from the path."""
    speculative = {"method": method, "model": "<head>", "num_speculative_tokens": 3}
    return f"vllm serve {target.path} --speculative-config '{json.dumps(speculative)}'"
