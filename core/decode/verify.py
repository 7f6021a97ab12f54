"""Verification: which of the drafted tokens the target keeps.

Shapes: N tree nodes, V target vocabulary, P nodes of the accepted path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.decode.sampling import SamplingSettings, draw, target_probs
from core.decode.tree import DraftTree
from core.errors import ShapeError


@dataclass(frozen=True)
class Verification:
    """The outcome of one target pass.

    Attributes:
        path: accepted nodes, root first; P of them.
        bonus_id: the target's own token after the last accepted node.
    """

    path: tuple[int, ...]
    bonus_id: int

    @property
    def accepted_length(self) -> int:
        """Tokens committed by this pass, the bonus token included: P."""
        return len(self.path)

    @property
    def num_accepted_draft_tokens(self) -> int:
        """Drafted tokens that were kept, without the bonus token: P - 1."""
        return len(self.path) - 1


def verify_greedy(tree: DraftTree, target_logits_NV: Tensor) -> Verification:
    """Follow the target's argmax through the draft tree.

    Args:
        tree: N nodes; node 0 is the last committed token.
        target_logits_NV: [N, V]; row i scores the token after node i.
    Raises:
        ShapeError: the number of rows is not N.
    Guarantee: the tokens of target-only greedy decoding, given equal logits.
    Source: EAGLE-2 (Li et al. 2024), section 4.2.
    """
    _check_rows(tree, target_logits_NV)
    best_N = target_logits_NV.argmax(-1).tolist()
    tokens = tree.token_ids_N.tolist()
    path = [0]
    while True:
        wanted = best_N[path[-1]]
        match = next((c for c in tree.children[path[-1]] if tokens[c] == wanted), None)
        if match is None:
            return Verification(tuple(path), wanted)
        path.append(match)


def verify_sampling(
    tree: DraftTree,
    target_logits_NV: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
) -> Verification:
    """Accept or reject children in turn so that the output has the target's distribution.

    The children of a node are a deterministic choice with a deterministic order, so each
    proposal is one-hot: accept token x with target_probs[x], else take x out of the
    distribution, renormalize, and try the next; if all fail, sample from what is left.

    Args:
        tree: N nodes; must depend on the committed text alone.
        target_logits_NV: [N, V]; row i scores the token after node i.
        settings: temperature above 0, top-p.
        generator: source of randomness, on the CPU.
    Raises:
        ShapeError: the number of rows is not N.
    Guarantee: each committed token has the distribution `target_probs` given its prefix.
    Source: SpecInfer (Miao et al. 2023), algorithm 2, with one-hot proposals.
    """
    _check_rows(tree, target_logits_NV)
    tokens = tree.token_ids_N.tolist()
    path = [0]
    while True:
        left_V = target_probs(target_logits_NV[path[-1]].cpu(), settings)
        accepted = None
        for child in tree.children[path[-1]]:
            chance, total = float(left_V[tokens[child]]), float(left_V.sum())
            # `>=`: where this token holds all that is left, rounding must not lose it.
            if chance >= total or float(torch.rand((), generator=generator)) * total < chance:
                accepted = child
                break
            left_V[tokens[child]] = 0
        if accepted is None:
            return Verification(tuple(path), draw(left_V, generator))
        path.append(accepted)


def _check_rows(tree: DraftTree, target_logits_NV: Tensor) -> None:
    if target_logits_NV.shape[0] != tree.size:
        raise ShapeError(f"{target_logits_NV.shape[0]} rows of logits for {tree.size} tree nodes")
