"""The EAGLE-1 head against EAGLE's definition, written out plainly.

The reference here knows sequences of their own length alone: no batch, no padding, no cache, and
loops instead of masks.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.draft.eagle1 import Eagle1Config
from core.draft.base import DraftBatch, DraftNodes, TargetGeometry, build_head
from core.draft.eagle1 import Eagle1Head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target
from core.models.weights import load_embedding, load_output_head

FEATURE_WEIGHT, TOKEN_WEIGHT = 1.0, 0.1
# float32 sums of about a hundred terms in another order.
assert_near = functools.partial(torch.testing.assert_close, rtol=2e-4, atol=2e-5)
# (lengths, columns): one, equal, ragged, with more padding than needed, and the shortest.
SHAPES = (([9], 9), ([6, 6], 6), ([11, 3, 7], 11), ([4, 9], 13), ([2, 1, 5], 5))


@pytest.fixture(scope="module")
def tensors(tiny_target_folder: Path) -> tuple[Tensor, Tensor]:
    return load_embedding(tiny_target_folder), load_output_head(tiny_target_folder)


def _head(target: Target, tensors: tuple[Tensor, Tensor], *, bias: bool, draft_size: int):
    geometry = TargetGeometry.of(target.model.config)
    size = geometry.vocab_size
    counts_V = torch.rand(size, generator=torch.Generator().manual_seed(4))
    vocabulary = DraftVocabulary.from_counts(counts_V, draft_size)
    head = build_head(Eagle1Config(bias=bias), geometry, vocabulary, seed=7)
    assert isinstance(head, Eagle1Head)
    head.attach_target(*tensors)
    return head


def _batch(target: Target, lengths: list[int], columns: int, *, noise: bool) -> DraftBatch:
    draw = torch.Generator().manual_seed(len(lengths) * 100 + columns)
    size, hidden = len(lengths), target.hidden_size
    ids_BT = torch.randint(3, 259, (size, columns), generator=draw)
    lengths_B = torch.tensor(lengths)
    is_token = torch.arange(columns)[None] < lengths_B[:, None]
    # Padding holds garbage: nothing of it may count.
    features_BTLH = torch.randn(size, columns, 1, hidden, generator=draw)
    mask_BT = (torch.rand(size, columns, generator=draw) < 0.7) & is_token
    mask_BT[:, lengths[0] - 1] |= is_token[:, lengths[0] - 1]
    noise_BTLH = None
    if noise:
        noise_BTLH = 0.1 * torch.randn(features_BTLH.shape, generator=draw)
    return DraftBatch(ids_BT, features_BTLH, mask_BT, lengths_B, noise_BTLH)


# --- The reference ----------------------------------------------------------


def _rope(x_TE: Tensor, theta: float) -> Tensor:
    """Rotary positions 0..T-1 of one attention head, pair by pair as complex numbers."""
    half = x_TE.shape[1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x_TE.shape[1]) for i in range(half)])
    angle = torch.arange(len(x_TE))[:, None] * frequency[None]
    turned = torch.complex(x_TE[:, :half], x_TE[:, half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((turned.real, turned.imag), dim=1)


def _reference_states(head: Eagle1Head, features_TH: Tensor, next_ids_T: Tensor) -> Tensor:
    """What one sequence's pairs (feature_i, token_i+1) predict for feature_i+1."""
    w = dict(head.named_parameters())
    g = head.geometry
    assert head.embedding_VH is not None
    fused = torch.cat((head.embedding_VH[next_ids_T], features_TH), dim=1) @ w["fc.weight"].T
    if "fc.bias" in w:
        fused = fused + w["fc.bias"]
    attn = "layers.0.self_attn."
    query, key, value = (fused @ w[f"{attn}{n}_proj.weight"].T for n in "qkv")
    per_group = g.num_attention_heads // g.num_key_value_heads
    outputs = []
    for number in range(g.num_attention_heads):
        own = slice(number * g.head_dim, (number + 1) * g.head_dim)
        shared = number // per_group
        group = slice(shared * g.head_dim, (shared + 1) * g.head_dim)
        q, k = _rope(query[:, own], g.rope_theta), _rope(key[:, group], g.rope_theta)
        rows = []
        for place in range(len(q)):
            scores = q[place] @ k[: place + 1].T / math.sqrt(g.head_dim)
            rows.append(scores.softmax(-1) @ value[: place + 1, group])
        outputs.append(torch.stack(rows))
    x = fused + torch.cat(outputs, dim=1) @ w[f"{attn}o_proj.weight"].T
    scale = (x.pow(2).mean(-1, keepdim=True) + g.rms_norm_eps).rsqrt()
    normed = x * scale * w["layers.0.post_attention_layernorm.weight"]
    gate, up = (
        normed @ w["layers.0.mlp.gate_proj.weight"].T,
        normed @ w["layers.0.mlp.up_proj.weight"].T,
    )
    return x + (gate * gate.sigmoid() * up) @ w["layers.0.mlp.down_proj.weight"].T


def _reference_loss(
    head: Eagle1Head, batch: DraftBatch, output_head_VH: Tensor
) -> tuple[Tensor, int]:
    """Sum over supervised positions of 1.0 · smooth L1 + 0.1 · cross-entropy, and their number."""
    loss, count = torch.zeros(()), 0
    rows_WH = output_head_VH[head.vocabulary.d2t_W]
    for row, length in enumerate(batch.lengths_B.tolist()):
        features_TH = batch.features_BTLH[row, :length, 0]
        inputs_TH = features_TH
        if batch.noise_BTLH is not None:
            inputs_TH = features_TH + batch.noise_BTLH[row, :length, 0]
        if length < 2:
            continue
        predicted = _reference_states(head, inputs_TH[:-1], batch.input_ids_BT[row, 1:length])
        for place in range(length - 1):
            if not batch.loss_mask_BT[row, place]:
                continue
            wanted = features_TH[place + 1]
            feature_loss = F.smooth_l1_loss(predicted[place], wanted)
            probs = (rows_WH @ wanted).softmax(-1)
            token_loss = -(probs * (rows_WH @ predicted[place]).log_softmax(-1)).sum()
            loss = loss + FEATURE_WEIGHT * feature_loss + TOKEN_WEIGHT * token_loss
            count += 1
    return loss, count


def _reference_chain_loss(
    head: Eagle1Head, batch: DraftBatch, output_head_VH: Tensor, steps: int, decay: float
) -> Tensor:
    """The same along chains: step k reads what the chain predicted behind the true features."""
    loss = torch.zeros(())
    rows_WH = output_head_VH[head.vocabulary.d2t_W]
    for row, length in enumerate(batch.lengths_B.tolist()):
        ids_T, features_TH = batch.input_ids_BT[row], batch.features_BTLH[row, :length, 0]
        for i in range(length - 1):
            read_TH = features_TH[: i + 1]
            for k in range(min(steps, length - 1 - i)):
                state = _reference_states(head, read_TH, ids_T[1 : i + k + 2])[-1]
                read_TH = torch.cat((read_TH, state[None]))
                if not batch.loss_mask_BT[row, i + k]:
                    continue
                wanted = features_TH[i + k + 1]
                probs = (rows_WH @ wanted).softmax(-1)
                token_loss = -(probs * (rows_WH @ state).log_softmax(-1)).sum()
                feature_loss = F.smooth_l1_loss(state, wanted)
                loss = loss + decay**k * (FEATURE_WEIGHT * feature_loss + TOKEN_WEIGHT * token_loss)
    return loss


# --- Training ---------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "columns"), SHAPES)
@pytest.mark.parametrize(("bias", "draft_size", "noise"), [(False, 0, False), (True, 64, True)])
def test_loss_and_gradients_are_the_definitions(
    tiny_target: Target, tensors, lengths, columns, bias, draft_size, noise
) -> None:
    head = _head(tiny_target, tensors, bias=bias, draft_size=draft_size)
    batch = _batch(tiny_target, lengths, columns, noise=noise)
    found = head.losses(batch)
    wanted, count = _reference_loss(head, batch, tensors[1])
    assert int(found.num_tokens) == count > 0
    assert_near(found.loss, wanted)
    names, parameters = zip(*head.named_parameters(), strict=True)
    mine = torch.autograd.grad(found.loss, parameters)
    theirs = torch.autograd.grad(wanted, parameters)
    for name, a, b in zip(names, mine, theirs, strict=True):
        assert bool((b != 0).any()), name
        assert_near(a, b, msg=f"{name}: off by up to {(a - b).abs().max().item():.1e}")


@pytest.mark.parametrize(("lengths", "columns"), SHAPES)
def test_training_time_test_is_its_definition(
    tiny_target: Target, tensors, lengths, columns
) -> None:
    steps, decay = 3, 0.8
    head = _head(tiny_target, tensors, bias=True, draft_size=64)
    head.step_weights = [decay**step for step in range(steps)]
    batch = _batch(tiny_target, lengths, columns, noise=False)
    found = head.losses(batch)
    wanted = _reference_chain_loss(head, batch, tensors[1], steps, decay)
    assert int(found.num_tokens) == _reference_loss(head, batch, tensors[1])[1]
    assert_near(found.loss, wanted)
    names, parameters = zip(*head.named_parameters(), strict=True)
    mine = torch.autograd.grad(found.loss, parameters)
    theirs = torch.autograd.grad(wanted, parameters)
    for name, a, b in zip(names, mine, theirs, strict=True):
        assert_near(a, b, msg=f"{name}: off by up to {(a - b).abs().max().item():.1e}")


def test_sums_do_not_depend_on_how_sequences_are_batched(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors, bias=False, draft_size=64)
    whole = _batch(tiny_target, [11, 3, 7], 11, noise=True)
    together = head.losses(whole)
    assert whole.noise_BTLH is not None
    apart = [
        head.losses(
            DraftBatch(
                whole.input_ids_BT[row : row + 1, :length],
                whole.features_BTLH[row : row + 1, :length],
                whole.loss_mask_BT[row : row + 1, :length],
                whole.lengths_B[row : row + 1],
                whole.noise_BTLH[row : row + 1, :length],
            )
        )
        for row, length in enumerate(whole.lengths_B.tolist())
    ]
    assert_near(together.loss, sum(p.loss for p in apart))
    for name, value in together.sums.items():
        total = torch.stack([part.sums[name].float() for part in apart]).sum()
        assert_near(value.float(), total)


def test_padding_changes_nothing(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors, bias=False, draft_size=0)
    batch = _batch(tiny_target, [4, 9], 13, noise=False)
    before = head.losses(batch).loss
    batch.features_BTLH[0, 4:] = 1e3
    batch.features_BTLH[1, 9:] = -1e3
    batch.input_ids_BT[0, 4:] = 0
    assert torch.equal(head.losses(batch).loss, before)


def test_a_mask_over_padding_supervises_nothing(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors, bias=False, draft_size=0)
    batch = _batch(tiny_target, [4, 9], 13, noise=False)
    before = head.losses(batch)
    batch.loss_mask_BT[0, 4:] = True
    after = head.losses(batch)
    assert int(after.num_tokens) == int(before.num_tokens)
    assert torch.equal(after.loss, before.loss)


def test_noise_is_on_what_is_read_and_not_on_what_is_predicted(
    tiny_target: Target, tensors
) -> None:
    """A noise on the last position, which is predicted and never read, changes nothing."""
    head = _head(tiny_target, tensors, bias=False, draft_size=0)
    batch = _batch(tiny_target, [6, 6], 6, noise=False)
    plain = head.losses(batch).loss
    batch.noise_BTLH = torch.zeros_like(batch.features_BTLH)
    batch.noise_BTLH[:, -1] = 5.0
    assert torch.equal(head.losses(batch).loss, plain)
    batch.noise_BTLH[:, 0] = 5.0
    assert not torch.allclose(head.losses(batch).loss, plain)


def test_hits_count_the_targets_choice(tiny_target: Target, tensors) -> None:
    """In evaluation the target chooses from its whole vocabulary, not from the draft's."""
    head = _head(tiny_target, tensors, bias=False, draft_size=64).eval()
    batch = _batch(tiny_target, [11, 3, 7], 11, noise=False)
    hits = dict.fromkeys((1, 2, 3, 10), 0)
    outside = 0
    for row, length in enumerate(batch.lengths_B.tolist()):
        features_TH = batch.features_BTLH[row, :length, 0]
        with torch.no_grad():
            states = _reference_states(head, features_TH[:-1], batch.input_ids_BT[row, 1:length])
        for place in range(length - 1):
            if batch.loss_mask_BT[row, place]:
                chosen = int((tensors[1] @ features_TH[place + 1]).argmax())
                outside += int(chosen not in head.vocabulary.d2t_W.tolist())
                logits_W = tensors[1][head.vocabulary.d2t_W] @ states[place]
                ranked = head.vocabulary.d2t_W[logits_W.argsort(descending=True)].tolist()
                for n in hits:
                    hits[n] += chosen in ranked[:n]
    sums = head.losses(batch).sums
    assert {n: int(sums[f"top{n}"]) for n in hits} == hits
    assert outside, "no choice outside the draft vocabulary shows the difference"


def test_nothing_supervised_is_a_loss_of_zero_with_gradients(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors, bias=False, draft_size=0)
    batch = _batch(tiny_target, [6, 6], 6, noise=False)
    batch.loss_mask_BT[:] = False
    found = head.losses(batch)
    found.loss.backward()
    assert found.loss.item() == 0 and int(found.num_tokens) == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_the_targets_tensors_are_no_parameters(tiny_target: Target, tensors) -> None:
    head = _head(tiny_target, tensors, bias=True, draft_size=64)
    largest = max(p.numel() for p in head.parameters())
    assert largest < tensors[0].numel()
    assert not any("embed" in name or "output" in name for name in head.state_dict())
    assert head.state_dict().keys() == dict(head.named_parameters()).keys()


# --- Decoding ---------------------------------------------------------------

# Levels of a tree: (parent's place in the level above, token) of each node.
LEVELS = (
    ((0, 50), (0, 61), (0, 72)),
    ((0, 80), (2, 81), (2, 82)),
    ((1, 90), (1, 91), (0, 92)),
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("draft_size", [0, 64])
@torch.inference_mode()
def test_cached_drafting_is_an_uncached_pass_over_each_path(
    tiny_target: Target, tensors, draft_size: int, packed: bool
) -> None:
    reference = _head(tiny_target, tensors, bias=True, draft_size=draft_size)
    head = _head(tiny_target, tensors, bias=True, draft_size=draft_size)
    head.prepare_for_inference(packed=packed)
    draw = torch.Generator().manual_seed(0)
    features_TH = torch.randn(9, tiny_target.hidden_size, generator=draw)
    next_ids_T = torch.randint(3, 259, (9,), generator=draw)
    rows_WH = tensors[1][head.vocabulary.d2t_W]

    def uncached(committed: int, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The last state after a path, feeding predicted states back one by one."""
        known, ids = features_TH[:committed], next_ids_T[:committed]
        state = _reference_states(reference, known, ids)[-1]
        for token in path:
            known = torch.cat((known, state[None]))
            ids = torch.cat((ids, torch.tensor([token])))
            state = _reference_states(reference, known, ids)[-1]
        return state, rows_WH @ state

    cache = head.new_cache(40)
    # A prompt, then two rounds that commit three tokens and one; a tree grows after each.
    for begin, end in ((0, 5), (5, 8), (8, 9)):
        output = head.extend(cache, features_TH[begin:end, None], next_ids_T[begin:end])
        assert cache.committed == end
        paths: list[tuple[int, ...]] = [()]
        hidden_KH, sees = output.hidden_KH, torch.zeros(1, 0, dtype=torch.bool)
        _assert_same(output.hidden_KH[0], output.logits_KW[0], *uncached(end, ()))
        for depth, level in enumerate(LEVELS, start=1):
            parents = [parent for parent, _ in level]
            tokens = torch.tensor([token for _, token in level])
            sees = torch.cat((sees[parents], torch.eye(len(level), dtype=torch.bool)), dim=1)
            paths = [(*paths[parent], token) for parent, token in level]
            output = head.step(cache, DraftNodes(hidden_KH[parents], tokens, depth, sees))
            hidden_KH = output.hidden_KH
            for row, path in enumerate(paths):
                _assert_same(output.hidden_KH[row], output.logits_KW[row], *uncached(end, path))
        assert cache.committed == end, "a tree is not committed"


def _assert_same(hidden_H: Tensor, logits_W: Tensor, wanted_H: Tensor, wanted_W: Tensor) -> None:
    assert_near(hidden_H, wanted_H)
    assert_near(logits_W, wanted_W)
