"""What the engines' folders have in common: a Llama config, and EAGLE's names for the weights.

Shapes: V target vocabulary, W draft vocabulary, H hidden.
Sources: EAGLE `eagle/model/{cnets1,cnets,ea_model}.py`; SGLang `srt/models/llama_eagle*.py`;
vLLM `model_executor/models/llama_eagle*.py`; SpecForge `modeling/draft/llama3_eagle.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.config import DRAFT_CONFIGS
from core.draft.base import DraftHead, TargetGeometry, build_head, implementation
from core.draft.formats.common import ExportTarget
from core.draft.formats.files import HeadFolder
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError

EMBEDDING = "embed_tokens.weight"
# Some files call EAGLE-3's layer `layers.0`, after the module that engines load it into.
LAYER, MIDLAYER = "layers.0.", "midlayer."
# One name, and a convention of each engine.
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
EAGLE3_ONLY = "layers.0.hidden_norm.weight"
# Settings of each algorithm's heads that EAGLE's code and SGLang, which came from it, run.
EAGLES_OWN: Mapping[str, tuple[str, ...]] = {
    "eagle1": (),
    "eagle3": ("qkv_bias", "norm_before_residual"),
}
# What a config may ask for that Aerie's heads do not do. A head run without it would draft
# nonsense, and show it by nothing but a low acceptance.
NOT_DONE = {
    "fc_norm": "norms of the features before fc",
    "use_aux_norm": "norms of the features before fc",
    "norm_before_fc": "a norm of the features before fc",
    "norm_output": "a state that is fed back after the final norm (EAGLE-3.1)",
    "add_para_norm": "norms of embedding and feature (HASS)",
    "attention_bias": "biases in the attention's output",
    "mlp_bias": "biases in the feed-forward layers",
    "parallel_drafting": "several tokens drafted in one pass",
    "quantization_config": "quantized weights",
}


def check_supported(folder: HeadFolder, config: Mapping[str, Any]) -> None:
    """Refuse a head that is more than one plain Llama layer.

    Raises:
        InputError: naming the setting and what it would need.
    """
    values = {**config, **(config.get("eagle_config") or {})}
    asked = [f"{key} ({what})" for key, what in NOT_DONE.items() if values.get(key)]
    if (layers := values.get("num_hidden_layers", 1)) != 1:
        asked.append(f"num_hidden_layers={layers}")
    if (activation := values.get("hidden_act", "silu")) != "silu":
        asked.append(f"hidden_act={activation}")
    if values.get("use_aux_hidden_state") is False:
        asked.append("use_aux_hidden_state=false (EAGLE-3 on the final feature alone)")
    if values.get("target_hidden_size") not in (None, values.get("hidden_size")):
        asked.append(f"target_hidden_size={values['target_hidden_size']} (not the head's own)")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if (kind := rope.get("rope_type") or rope.get("type") or "default") != "default":
        asked.append(f"rotary positions of type {kind}")
    if asked:
        raise InputError(
            f"draft.path={folder.path}: its config asks for {', '.join(asked)}, which Aerie's "
            "heads do not have; serve it in the engine that it was made for, or train one "
            "with train_draft"
        )


def geometry_of(folder: HeadFolder, config: Mapping[str, Any]) -> TargetGeometry:
    """The sizes that a flat config gives; what it leaves out is what engines take then.

    Raises:
        InputError: a size is missing.
    """
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    missing = [name for name in needed if not isinstance(config.get(name), int)]
    if missing:
        raise InputError(f"{folder.path / 'config.json'}: no {', '.join(missing)} there")
    heads: int = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return TargetGeometry(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )


def vocabulary_of(folder: HeadFolder, tensors: Mapping[str, Tensor], size: int) -> DraftVocabulary:
    """The draft vocabulary that `d2t` (offsets) and `t2d` (marks) or a token map say.

    Args:
        folder: for a token map and for messages.
        tensors: of the head.
        size: V.
    Raises:
        InputError: they contradict one another, or name tokens that the target does not have.
    """
    d2t_W, ids_W = tensors.get("d2t"), folder.token_map_W
    if d2t_W is not None:
        ids_W = d2t_W.long() + torch.arange(len(d2t_W))
    if ids_W is None:
        return DraftVocabulary.whole(size)
    marked = tensors.get("t2d")
    if marked is not None:
        _check_marks(folder, ids_W, marked, d2t_W)
    out = int(((ids_W < 0) | (ids_W >= size)).sum())
    if out or len(ids_W.unique()) < len(ids_W):
        raise InputError(
            f"draft.path={folder.path}: of its {len(ids_W)} draft tokens {out} are outside the "
            f"vocabulary of {size}, {len(ids_W) - len(ids_W.unique())} are there twice; d2t must "
            "hold target id - draft id"
        )
    return DraftVocabulary(ids_W, size)


def _check_marks(folder: HeadFolder, ids_W: Tensor, marked: Tensor, d2t_W: Tensor | None) -> None:
    wanted = marked.nonzero()[:, 0]
    if torch.equal(ids_W.sort().values, wanted):
        return
    if d2t_W is not None and torch.equal(d2t_W.long().sort().values, wanted):
        raise InputError(
            f"draft.path={folder.path}: d2t holds target ids; the formats want offsets, "
            "target id - draft id: subtract arange(len(d2t)) from it"
        )
    raise InputError(
        f"draft.path={folder.path}: d2t names {len(ids_W)} target tokens, t2d marks "
        f"{len(wanted)}, and they are not the same ones; the vocabulary's two tables come from "
        "different trainings: take both from the head's own checkpoint"
    )


def build(
    folder: HeadFolder,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    geometry: TargetGeometry,
    layers: tuple[int, ...] | None = None,
) -> DraftHead:
    """The head that these weights are of, with them loaded.

    Args:
        folder: for messages.
        config: flat, as the algorithms ask it for what the weights alone do not say.
        tensors: by the names of the engines; `layers.0` for EAGLE-3 too.
        geometry: of the head's layer.
        layers: that the config says the head reads the entering states of; None for the usual.
    Raises:
        InputError: of no algorithm that Aerie has, or not the weights of one.
    """
    tensors = canonical(tensors)
    embedding_VH = tensors.pop(EMBEDDING, None)
    shape = (geometry.vocab_size, geometry.hidden_size)
    if embedding_VH is not None and embedding_VH.shape != shape:
        raise InputError(
            f"draft.path={folder.path}: {EMBEDDING} is {list(embedding_VH.shape)}, config.json "
            f"says {list(shape)}; they are of different heads"
        )
    vocabulary = vocabulary_of(folder, tensors, geometry.vocab_size)
    for config_class in DRAFT_CONFIGS.values():
        settings = implementation(config_class).settings_of(tensors, config)
        if settings is not None:
            break
    else:
        raise InputError(
            f"draft.path={folder.path}: weights of no algorithm that Aerie has "
            f"({', '.join(DRAFT_CONFIGS)}): {', '.join(sorted(tensors)[:8])}, …"
        )
    size = 0 if vocabulary.is_whole else vocabulary.size
    draft = config_class.model_validate({"vocab_size": size, **settings})
    head = build_head(draft, geometry, vocabulary)
    head.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
    head.load_eagle_tensors(tensors)
    head.own_embedding_VH, head.aux_layers = embedding_VH, layers
    return head


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by Aerie's names, which are the reference's: EAGLE-3's layer is `midlayer`."""
    if EAGLE3_ONLY not in tensors:
        return dict(tensors)
    return {
        MIDLAYER + name.removeprefix(LAYER) if name.startswith(LAYER) else name: tensor
        for name, tensor in tensors.items()
    }


def engine_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: EAGLE-3's layer is `layers.0`."""
    return {
        LAYER + name.removeprefix(MIDLAYER) if name.startswith(MIDLAYER) else name: tensor
        for name, tensor in tensors.items()
    }


def layers_of(head: DraftHead, target: ExportTarget) -> tuple[int, ...] | None:
    """The layers whose entering states an EAGLE-3 head reads; None where engines take them anyway.

    Unless told otherwise all take 2, L/2 and L-3, and mean the states that *enter* these.
    """
    usual = (2, target.num_layers // 2, target.num_layers - 3)
    return None if head.aux_layers in (None, usual) else head.aux_layers


def llama_config(head: DraftHead, target: ExportTarget, architecture: str) -> dict[str, Any]:
    """`config.json` of one Llama layer; positions up to the target's, whatever the head's were."""
    own = head.geometry
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": str(next(head.parameters()).dtype).removeprefix("torch."),
        "vocab_size": own.vocab_size,
        "hidden_size": own.hidden_size,
        "intermediate_size": own.intermediate_size,
        "num_attention_heads": own.num_attention_heads,
        "num_key_value_heads": own.num_key_value_heads,
        "head_dim": own.head_dim,
        "rms_norm_eps": own.rms_norm_eps,
        "rope_theta": own.rope_theta,
        # Engines cut a draft head off there: 2048 collapses acceptance on longer prompts.
        "max_position_embeddings": target.geometry.max_position_embeddings,
    }


def own_tensors(head: DraftHead) -> dict[str, Tensor]:
    """The head's weights by their public names, with its embedding where it has one."""
    tensors = dict(head.eagle_tensors())
    if head.own_embedding_VH is not None:
        tensors[EMBEDDING] = head.own_embedding_VH.to(next(head.parameters()).dtype)
    return tensors


def without_whole_vocabulary(head: DraftHead) -> dict[str, Tensor]:
    """Without the vocabulary's tables where they say nothing: vLLM has no place for them then."""
    tables = ("d2t", "t2d") if head.vocabulary.is_whole else ()
    return {name: tensor for name, tensor in own_tensors(head).items() if name not in tables}


def token_map(head: DraftHead) -> Tensor | None:
    """The target ids [W] of a draft vocabulary that the weights do not hold."""
    if head.vocabulary.is_whole or "d2t" in head.eagle_tensors():
        return None
    return head.vocabulary.d2t_W


def drafts_from_all(engine: str, head: DraftHead) -> str:
    """What an engine does otherwise that has no place for an EAGLE-1 head's draft vocabulary."""
    vocabulary = head.vocabulary
    return (
        f"{engine} drafts EAGLE-1 from all {vocabulary.target_size} tokens of the target, not from "
        f"the {vocabulary.size} of the head's draft vocabulary: slower drafts, and some of tokens "
        "that it never learnt to guess"
    )
