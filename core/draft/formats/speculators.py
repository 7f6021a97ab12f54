"""The layout of vLLM's speculators library, for EAGLE-3.

The layer is `layers.0`, its config is nested, and the verifier, the target, is named.
Source: speculators `config.py`, `models/eagle3/{config,core,model_definitions}.py`;
vLLM 0.32 `transformers_utils/configs/speculators/{base,algos}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from core.draft.base import DraftHead
from core.draft.formats.common import ExportedHead, ExportTarget, HeadFormat, ReadHead
from core.draft.formats.files import HeadFolder
from core.draft.formats.public import (
    LAYER_IDS,
    build,
    check_supported,
    engine_names,
    geometry_of,
    layers_of,
    llama_config,
    without_whole_vocabulary,
)
from core.draft.formats.vllm import CHAIN, command
from core.errors import InputError

NESTED = "transformer_layer_config"
# Of the library's own copies of the target, which a checkpoint may hold.
VERIFIERS_OWN = ("verifier_lm_head.weight", "verifier_norm.weight")
# vLLM takes true where a config does not say, the library false; its own files always say.
NORM = "norm_before_residual"


class SpeculatorsFormat(HeadFormat):
    """What the speculators library trains and vLLM serves by the folder's name alone."""

    name: ClassVar[str] = "speculators"
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {"eagle3": ("qkv_bias",)}

    def recognizes(self, folder: HeadFolder) -> bool:
        """See base class."""
        return not folder.is_aeries and "speculators_model_type" in folder.config

    def read(self, folder: HeadFolder) -> ReadHead:
        """See base class."""
        outer = folder.config
        if (kind := outer["speculators_model_type"]) != "eagle3":
            raise InputError(
                f"draft.path={folder.path}: a speculators head of type {kind}; Aerie reads eagle3"
            )
        nested = outer.get(NESTED)
        if not isinstance(nested, dict):
            raise InputError(f"draft.path={folder.path}: config.json has no {NESTED}")
        if NORM not in outer:
            raise InputError(
                f"draft.path={folder.path}: config.json does not say {NORM}, which the library "
                "takes for false and vLLM for true; add what the head was trained with"
            )
        if (model := nested.get("model_type", "llama")) != "llama":
            raise InputError(
                f"draft.path={folder.path}: its layer is of type {model}, Aerie's heads are of "
                "llama layers"
            )
        config = {**nested, **{k: v for k, v in outer.items() if k not in (NESTED, "model_type")}}
        check_supported(folder, config)
        tensors = {n: t for n, t in folder.tensors.items() if n not in VERIFIERS_OWN}
        ids = outer.get(LAYER_IDS)
        layers = tuple(ids) if ids else None
        head = build(folder, config, tensors, geometry_of(folder, config), layers)
        return ReadHead(head, {"target": _verifier(outer)}, self.name)

    def export(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        """See base class."""
        layer = llama_config(head, target, "LlamaForCausalLM")
        for key in ("architectures", "torch_dtype"):
            layer.pop(key)
        layer |= {"attention_bias": False, "mlp_bias": False}
        dtype = str(next(head.parameters()).dtype).removeprefix("torch.")
        layers = layers_of(head, target)
        proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
        config: dict[str, Any] = {
            "architectures": ["Eagle3DraftModel"],
            # No `model_type`: vLLM tells the layout by its absence.
            "speculators_model_type": "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [proposal],
                "default_proposal_method": "greedy",
                "verifier": {
                    "name_or_path": target.path,
                    "architectures": list(target.architectures),
                },
            },
            NESTED: layer,
            "draft_vocab_size": head.vocabulary.size,
            NORM: bool(getattr(head.config, "norm_before_residual", False)),
            "torch_dtype": dtype,
            "tie_word_embeddings": False,
            **({} if layers is None else {LAYER_IDS: list(layers)}),
        }
        return ExportedHead(
            config=config,
            tensors=engine_names(without_whole_vocabulary(head)),
            differences=(CHAIN,),
            run_with=command("eagle3", target),
        )


def _verifier(config: dict[str, Any]) -> str | None:
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    name: str | None = verifier.get("name_or_path")
    return name
