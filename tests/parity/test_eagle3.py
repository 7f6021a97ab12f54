"""The EAGLE-3 head against EAGLE-3's definition, written out plainly.

The reference here knows one sequence of its own length at a time: no batch, no padding, no cache,
and a loop over positions and steps, each with an explicit list of what it attends to.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.config.draft.eagle3 import Eagle3Config
from core.draft.base import DraftBatch, DraftNodes, TargetGeometry, build_head
from core.draft.eagle3 import Eagle3Head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target
from core.models.weights import load_embedding, load_output_head

STEPS, DECAY = 7, 0.8
THETA = 10000.0
# float32 sums of about a hundred terms in another order, seven steps upon each other.
assert_near = functools.partial(torch.testing.assert_close, rtol=5e-4, atol=5e-5)
# (lengths, columns): one, equal, ragged, with more padding than needed, and the shortest.
SHAPES = (([12], 12), ([9, 9], 9), ([14, 4, 10], 14), ([5, 11], 15), ([3, 1, 6], 6))

Tensors = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def tensors(tiny_target_folder: Path) -> Tensors:
    return load_embedding(tiny_target_folder), load_output_head(tiny_target_folder)


def _head(
    target: Target, tensors: Tensors, *, draft_size: int = 160, config: Eagle3Config | None = None
) -> Eagle3Head:
    geometry = replace(TargetGeometry.of(target.model.config), rope_theta=5e5)
    counts_V = torch.rand(geometry.vocab_size, generator=torch.Generator().manual_seed(4))
    vocabulary = DraftVocabulary.from_counts(counts_V, draft_size)
    head = build_head(config or Eagle3Config(), geometry, vocabulary, seed=7)
    assert isinstance(head, Eagle3Head)
    draw = torch.Generator().manual_seed(8)
    for name, parameter in head.named_parameters():
        # Norms that differ from one another, or swapping two would go unnoticed.
        if "norm" in name:
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=draw))
        if name.endswith(".bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    head.attach_target(*tensors)
    return head


def _batch(target: Target, lengths: list[int], columns: int) -> DraftBatch:
    draw = torch.Generator().manual_seed(len(lengths) * 100 + columns)
    size, hidden = len(lengths), target.hidden_size
    ids_BT = torch.randint(3, 259, (size, columns), generator=draw)
    lengths_B = torch.tensor(lengths)
    is_token = torch.arange(columns)[None] < lengths_B[:, None]
    # Padding holds garbage: nothing of it may count.
    features_BTLH = torch.randn(size, columns, 4, hidden, generator=draw)
    mask_BT = (torch.rand(size, columns, generator=draw) < 0.6) & is_token
    mask_BT[:, lengths[0] - 1] |= is_token[:, lengths[0] - 1]
    return DraftBatch(ids_BT, features_BTLH, mask_BT, lengths_B)


# --- The reference ----------------------------------------------------------


class Reference:
    """One sequence's chains: `state(i, k)` after step k of the chain from position i."""

    def __init__(self, head: Eagle3Head, features_TLH: Tensor, ids_T: Tensor) -> None:
        self.w = dict(head.named_parameters())
        self.g, self.eps = head.geometry, head.geometry.rms_norm_eps
        self.norm_before_residual = head.norm_before_residual
        assert head.embedding_VH is not None
        self.embedded = head.embedding_VH[ids_T]
        self.fused = features_TLH[:, :3].flatten(1) @ self.w["fc.weight"].T
        self.read: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.states: dict[tuple[int, int], Tensor] = {}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + self.eps).sqrt() * self.w[f"{name}.weight"]

    def rotated(self, x_AE: Tensor, position: int) -> Tensor:
        half = x_AE.shape[1] // 2
        angles = torch.tensor([position * THETA ** (-2 * i / (2 * half)) for i in range(half)])
        turned = torch.complex(x_AE[:, :half], x_AE[:, half:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((turned.real, turned.imag), dim=1)

    def project(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.w[f"midlayer.self_attn.{name}_proj.weight"].T
        bias = self.w.get(f"midlayer.self_attn.{name}_proj.bias")
        return (out if bias is None else out + bias).view(-1, self.g.head_dim)

    def at(self, i: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value of step k of the chain from i, and the residual."""
        if (i, k) not in self.read:
            g = self.fused[i] if k == 0 else self.state(i, k - 1)
            normed = self.norm(g, "midlayer.hidden_norm")
            # Position i reads token i+1; step k has gone k further.
            embedded = self.norm(self.embedded[i + 1 + k], "midlayer.input_layernorm")
            x = torch.cat((embedded, normed))
            query, key, value = (self.project(x, name) for name in "qkv")
            residual = normed if self.norm_before_residual else g
            place = i + k
            self.read[i, k] = (
                self.rotated(query, place), self.rotated(key, place), value, residual,
            )  # fmt: skip
        return self.read[i, k]

    def state(self, i: int, k: int) -> Tensor:
        """What the layer gives: fed back as it is."""
        if (i, k) not in self.states:
            query, _, _, residual = self.at(i, k)
            seen = [(j, 0) for j in range(i + 1)] + [(i, step) for step in range(1, k + 1)]
            per_group = self.g.num_attention_heads // self.g.num_key_value_heads
            heads = []
            for number in range(self.g.num_attention_heads):
                group = number // per_group
                scores = torch.stack([query[number] @ self.at(*s)[1][group] for s in seen])
                values = torch.stack([self.at(*s)[2][group] for s in seen])
                heads.append((scores / math.sqrt(self.g.head_dim)).softmax(0) @ values)
            x = residual + torch.cat(heads) @ self.w["midlayer.self_attn.o_proj.weight"].T
            normed = self.norm(x, "midlayer.post_attention_layernorm")
            gate, up = (normed @ self.w[f"midlayer.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            gated = gate * gate.sigmoid() * up
            self.states[i, k] = x + gated @ self.w["midlayer.mlp.down_proj.weight"].T
        return self.states[i, k]

    def logits(self, i: int, k: int) -> Tensor:
        return self.w["lm_head.weight"] @ self.norm(self.state(i, k), "norm")


def _reference_loss(
    head: Eagle3Head, batch: DraftBatch, output_head_VH: Tensor, steps: int = STEPS
) -> tuple[Tensor, int]:
    """Sum over chains and steps of 0.8^k · cross-entropy, and the number of supervised tokens."""
    loss, count = torch.zeros(()), 0
    d2t = head.vocabulary.d2t_W
    for row, length in enumerate(batch.lengths_B.tolist()):
        features_TLH = batch.features_BTLH[row, :length]
        reference = Reference(head, features_TLH, batch.input_ids_BT[row, :length])
        mask_T = batch.loss_mask_BT[row]
        count += sum(bool(mask_T[i]) for i in range(length - 1))
        for i in range(length - 1):
            for k in range(steps):
                if i + 1 + k >= length or not mask_T[i + k]:
                    continue
                target_V = output_head_VH @ features_TLH[i + 1 + k, 3]
                if int(target_V.argmax()) not in d2t.tolist():
                    continue
                entropy = -(target_V[d2t].softmax(0) * reference.logits(i, k).log_softmax(0)).sum()
                loss = loss + DECAY**k * entropy
    return loss, count


# --- Training ---------------------------------------------------------------


def _assert_same_gradients(head: Eagle3Head, mine: Tensor, theirs: Tensor) -> None:
    names, parameters = zip(*head.named_parameters(), strict=True)
    found = torch.autograd.grad(mine, parameters)
    wanted = torch.autograd.grad(theirs, parameters)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert bool((b != 0).any()), name
        assert_near(a, b, msg=f"{name}: off by up to {(a - b).abs().max().item():.1e}")


@pytest.mark.parametrize(("lengths", "columns"), SHAPES)
@pytest.mark.parametrize("draft_size", [0, 160])
def test_loss_and_gradients_are_the_definitions(
    tiny_target: Target, tensors: Tensors, lengths, columns, draft_size
) -> None:
    head = _head(tiny_target, tensors, draft_size=draft_size)
    batch = _batch(tiny_target, lengths, columns)
    found = head.losses(batch)
    wanted, count = _reference_loss(head, batch, tensors[1])
    assert int(found.num_tokens) == count > 0
    assert_near(found.loss, wanted)
    _assert_same_gradients(head, found.loss, wanted)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_ttt_steps": 1}, 1),
        ({"num_ttt_steps": 3, "qkv_bias": True}, 3),
        ({"norm_before_residual": True}, STEPS),
    ],
)
def test_the_settings_do_what_they_say(tiny_target: Target, tensors, changes, steps) -> None:
    head = _head(tiny_target, tensors, config=Eagle3Config(**changes))
    batch = _batch(tiny_target, [9, 6], 9)
    found = head.losses(batch).loss
    wanted, _ = _reference_loss(head, batch, tensors[1], steps)
    assert_near(found, wanted)
    _assert_same_gradients(head, found, wanted)


def test_recomputing_activations_changes_nothing(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors)
    batch = _batch(tiny_target, [14, 4, 10], 14)
    kept = torch.autograd.grad(head.losses(batch).loss, list(head.parameters()))
    head.recomputes = True
    again = torch.autograd.grad(head.losses(batch).loss, list(head.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_the_rotary_base_is_the_heads_own(tiny_target: Target, tensors) -> None:
    assert _head(tiny_target, tensors).geometry.rope_theta == THETA
    own = _head(tiny_target, tensors, config=Eagle3Config(rope_theta=None))
    assert own.geometry.rope_theta == 5e5


def test_padding_and_its_mask_change_nothing(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors)
    batch = _batch(tiny_target, [5, 11], 15)
    before = head.losses(batch)
    batch.features_BTLH[0, 5:] = 1e3
    batch.features_BTLH[1, 11:] = -1e3
    batch.input_ids_BT[0, 5:] = 0
    batch.loss_mask_BT[0, 5:] = True
    after = head.losses(batch)
    assert torch.equal(after.loss, before.loss)
    assert int(after.num_tokens) == int(before.num_tokens)


def test_hits_count_the_targets_choice(tiny_target: Target, tensors) -> None:
    """Of the first step, against the argmax over the whole vocabulary, in training too."""
    head = _head(tiny_target, tensors)
    batch = _batch(tiny_target, [14, 4, 10], 14)
    hits = dict.fromkeys((1, 2, 3, 10), 0)
    outside = 0
    d2t = head.vocabulary.d2t_W
    with torch.no_grad():
        for row, length in enumerate(batch.lengths_B.tolist()):
            features_TLH = batch.features_BTLH[row, :length]
            reference = Reference(head, features_TLH, batch.input_ids_BT[row, :length])
            for i in range(length - 1):
                if batch.loss_mask_BT[row, i]:
                    chosen = int((tensors[1] @ features_TLH[i + 1, 3]).argmax())
                    outside += int(chosen not in d2t.tolist())
                    ranked = d2t[reference.logits(i, 0).argsort(descending=True)].tolist()
                    for n in hits:
                        hits[n] += chosen in ranked[:n]
    for mode in (head.train(), head.eval()):
        sums = mode.losses(batch).sums
        assert {n: int(sums[f"top{n}"]) for n in hits} == hits
    assert outside, "no choice outside the draft vocabulary shows the difference"


def test_nothing_supervised_is_a_loss_of_zero_with_gradients(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors)
    batch = _batch(tiny_target, [9, 9], 9)
    batch.loss_mask_BT[:] = False
    found = head.losses(batch)
    found.loss.backward()
    assert found.loss.item() == 0 and int(found.num_tokens) == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


# --- Decoding ---------------------------------------------------------------

# Levels of a tree: (parent's place in the level above, token) of each node.
LEVELS = (
    ((0, 50), (0, 61), (0, 72)),
    ((0, 80), (2, 81), (2, 82)),
    ((1, 90), (1, 91), (0, 92)),
)


@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_cached_drafting_is_an_uncached_chain_along_each_path(
    tiny_target: Target, tensors: Tensors, packed: bool
) -> None:
    """True features go through `fc`, the head's own states do not."""
    reference, head = _head(tiny_target, tensors), _head(tiny_target, tensors)
    head.prepare_for_inference(packed=packed)
    draw = torch.Generator().manual_seed(0)
    features_TLH = torch.randn(9, 4, tiny_target.hidden_size, generator=draw)
    next_ids_T = torch.randint(3, 259, (9,), generator=draw)

    def uncached(committed: int, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ids = torch.cat((torch.tensor([0]), next_ids_T[:committed], torch.tensor(path).long()))
        chain = Reference(reference, features_TLH[:committed], ids)
        return chain.state(committed - 1, len(path)), chain.logits(committed - 1, len(path))

    cache = head.new_cache(40)
    # A prompt, then two rounds that commit three tokens and one; a tree grows after each.
    for begin, end in ((0, 5), (5, 8), (8, 9)):
        output = head.extend(cache, features_TLH[begin:end], next_ids_T[begin:end])
        assert cache.committed == end
        paths: list[tuple[int, ...]] = [()]
        hidden_KH, sees = output.hidden_KH, torch.zeros(1, 0, dtype=torch.bool)
        assert output.logits_KW.shape == (1, 160)
        for mine, wanted in zip(
            (hidden_KH[0], output.logits_KW[0]), uncached(end, ()), strict=True
        ):
            assert_near(mine, wanted)
        for depth, level in enumerate(LEVELS, start=1):
            parents = [parent for parent, _ in level]
            tokens = torch.tensor([token for _, token in level])
            sees = torch.cat((sees[parents], torch.eye(len(level), dtype=torch.bool)), dim=1)
            paths = [(*paths[parent], token) for parent, token in level]
            output = head.step(cache, DraftNodes(hidden_KH[parents], tokens, depth, sees))
            hidden_KH = output.hidden_KH
            for row, path in enumerate(paths):
                state_H, logits_W = uncached(end, path)
                assert_near(output.hidden_KH[row], state_H)
                assert_near(output.logits_KW[row], logits_W)
        assert cache.committed == end, "a tree is not committed"
