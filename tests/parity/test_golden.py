"""Losses, gradients and drafts against numbers that the reference's own code computed.

`golden/README.md` says how they came about and what is compared how. Shapes as in the heads.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.config import DRAFT_CONFIGS
from core.decode.drafting import draft_trees
from core.decode.tree import TreePlan
from core.draft.base import (
    DraftBatch,
    DraftHead,
    DraftNodes,
    DraftPlace,
    TargetGeometry,
    build_head,
)
from core.draft.vocabulary import DraftVocabulary

FOLDER = Path(__file__).parent / "golden"
GEOMETRY = TargetGeometry(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
)
SETTINGS: dict[str, dict[str, Any]] = {"eagle1": {"bias": True}, "eagle3": {}}
KINDS = sorted(SETTINGS)
# float32 sums of up to a few hundred terms in another order, over up to seven steps.
assert_near = functools.partial(torch.testing.assert_close, rtol=2e-4, atol=2e-5)


@functools.cache
def _golden(kind: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{kind}.safetensors")


def _head(kind: str) -> DraftHead:
    golden = _golden(kind)
    vocabulary = DraftVocabulary.whole(96)
    if kind == "eagle3":
        vocabulary = DraftVocabulary(golden["d2t"] + torch.arange(len(golden["d2t"])), 96)
    head = build_head(DRAFT_CONFIGS[kind].model_validate(SETTINGS[kind]), GEOMETRY, vocabulary)
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in golden.items()
        if name.startswith("weights.")
    }
    if kind == "eagle3":
        weights |= {"d2t": golden["d2t"], "t2d": golden["t2d"]}
    head.load_eagle_tensors(weights)
    head.attach_target(golden["embedding"], golden["output_head"])
    return head


def _batch(kind: str, rows: slice) -> DraftBatch:
    golden = _golden(kind)
    lengths_B = golden["lengths"][rows]
    longest = int(lengths_B.max())
    return DraftBatch(
        golden["input_ids"][rows, :longest],
        golden["features"][rows, :longest],
        golden["loss_mask"][rows, :longest],
        lengths_B,
    )


def _scale(kind: str, case: str, tokens: Tensor) -> float:
    """What the reference divided its sum by, instead of by supervised tokens."""
    golden = _golden(kind)
    if kind == "eagle1":
        return float(golden[f"{case}.supervised"]) + 1e-5
    return float(golden[f"{case}.positions"])


@pytest.mark.parametrize(("case", "rows"), [("single", slice(0, 1)), ("padded", slice(0, 3))])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient(kind: str, case: str, rows: slice) -> None:
    golden, head = _golden(kind), _head(kind)
    result = head.losses(_batch(kind, rows))
    # EAGLE-3's supervised places include those whose argmax is outside of the draft vocabulary.
    assert int(result.num_tokens) == int(golden[f"{case}.supervised"])
    loss = result.loss / _scale(kind, case, result.num_tokens)
    assert_near(loss, golden[f"{case}.loss"])
    loss.backward()
    for name, parameter in head.named_parameters():
        wanted = golden[f"{case}.grad.{name}"]
        assert parameter.grad is not None and bool((wanted != 0).any()), name
        assert_near(parameter.grad, wanted, msg=f"{name}: another gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_apart_are_the_references_padded_batch(kind: str) -> None:
    """Nothing of one sequence reaches another, packed into one row as they are."""
    golden, head = _golden(kind), _head(kind)
    for row in range(3):
        result = head.losses(_batch(kind, slice(row, row + 1)))
        (result.loss / _scale(kind, "padded", result.num_tokens)).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, golden[f"padded.grad.{name}"])


def test_the_parts_of_eagle1s_loss() -> None:
    golden = _golden("eagle1")
    result = _head("eagle1").losses(_batch("eagle1", slice(0, 3)))
    for part in ("feature_loss", "token_loss"):
        assert_near(result.sums[part] / result.num_tokens, golden[f"padded.{part}"])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_eagle3s_loss_step_by_step(steps: int) -> None:
    golden = _golden("eagle3")
    head = _head("eagle3")
    head.step_weights = [0.0] * (steps - 1) + [1.0]  # type: ignore[assignment]
    found = head.losses(_batch("eagle3", slice(0, 3))).loss / golden["padded.positions"]
    assert_near(found, golden["padded.losses"][steps - 1])


@torch.inference_mode()
def test_eagle3_drafts_along_a_chain() -> None:
    """States and logits of its inference code, which has a cache of its own."""
    golden, head = _golden("eagle3"), _head("eagle3")
    ids_T, features_TLH = golden["input_ids"][0], golden["features"][0]
    head.prepare_for_inference(packed=False)
    cache = head.new_cache(16)
    outputs = [head.extend(cache, features_TLH[:8], ids_T[1:9])]
    for step in range(1, 4):
        sees = torch.ones(1, step, dtype=torch.bool)
        nodes = DraftNodes(outputs[-1].hidden_KH, ids_T[8 + step : 9 + step], step, sees)
        outputs.append(head.step(cache, nodes))
    assert_near(torch.cat([o.hidden_KH for o in outputs]), golden["draft.hidden"])
    assert_near(torch.cat([o.logits_KW for o in outputs]), golden["draft.logits"])


@torch.inference_mode()
def test_eagle3_drafts_the_references_tree() -> None:
    golden, head = _golden("eagle3"), _head("eagle3")
    ids_T, features_TLH = golden["input_ids"][0], golden["features"][0]
    head.prepare_for_inference(packed=False)
    cache = head.new_cache(64)
    root = head.extend(cache, features_TLH[:8], ids_T[1:9])
    places = [DraftPlace(0, cache.committed)]
    (tree,) = draft_trees(head, cache, places, root, [int(ids_T[8])], [TreePlan(20, 3, 4)])
    assert tree.token_ids_N.tolist() == golden["tree.tokens"].tolist()
    assert torch.equal(tree.sees_NN, golden["tree.sees"])
    assert torch.equal(tree.depths_N, golden["tree.depths"])
