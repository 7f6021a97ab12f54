"""Verification: which of the drafted tokens the target keeps.

Shapes: N tree nodes, V target vocabulary, P nodes of the accepted path.
"""

from __future__ import annotations

from collections.abc import Callable
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
    if target_logits_NV.device.type == "cpu":
        # Of the rows on the path alone. numpy finds the first maximum ten times as fast as torch.
        return _follow(tree, lambda node: int(target_logits_NV[node].float().numpy().argmax()))
    best_N = target_logits_NV.argmax(-1).tolist()
    return _follow(tree, lambda node: best_N[node])


def verify_sampling(
    tree: DraftTree,
    target_logits_NV: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
) -> Verification:
    """Follow the target's own draws through the draft tree.

    At each node the target's token is drawn as in plain decoding, and the child that holds it is
    the next node. Child x is reached with target_probs[x], as often as by SpecInfer's trials
    (Miao et al. 2023, algorithm 2, with the one-hot proposals that a deterministic tree makes),
    which accept x with target_probs[x] or take it out of the distribution and go on. But here
    the tree has no influence on the tokens that come out.

    Args:
        tree: N nodes; may depend on anything but the generator.
        target_logits_NV: [N, V]; row i scores the token after node i, bias and penalties done.
        settings: temperature above 0, and what of the distribution is kept.
        generator: source of randomness, on the CPU; one number a committed token.
    Raises:
        ShapeError: the number of rows is not N.
    Guarantee: given equal logits, the tokens of target-only sampling with this generator, so each
        committed token has the distribution `target_probs` given its prefix.
    """
    _check_rows(tree, target_logits_NV)
    return _follow(
        tree, lambda node: draw(target_probs(target_logits_NV[node].cpu(), settings), generator)
    )


def _follow(tree: DraftTree, choose: Callable[[int], int]) -> Verification:
    """Choose the token after the root, go to the child that holds it, and so on."""
    tokens = tree.token_ids_N.tolist()
    path = [0]
    while True:
        wanted = choose(path[-1])
        match = next((c for c in tree.children[path[-1]] if tokens[c] == wanted), None)
        if match is None:
            return Verification(tuple(path), wanted)
        path.append(match)


def _check_rows(tree: DraftTree, target_logits_NV: Tensor) -> Tensor:
    if target_logits_NV.shape[0] != tree.size:
        raise ShapeError(f"{target_logits_NV.shape[0]} rows of logits for {tree.size} tree nodes")
    return target_logits_NV
