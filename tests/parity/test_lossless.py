"""Speculation changes nothing: not the tokens at temperature 0, not the distribution above it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from core.config import DRAFT_CONFIGS, DecodeConfig, TargetConfig
from core.decode.engine import Round, SpeculativeDecoder
from core.decode.sampling import SamplingSettings, draw, target_probs
from core.decode.tree import PLAIN, DraftTree, TreePlan
from core.decode.verify import Verification, verify_sampling
from core.draft.base import DraftHead, DraftOutput
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target, load_target
from core.models.tiny import byte_tokenizer, tiny_config
from tests.heads import OracleHead, random_head

NEW_TOKENS = 12
# The oracle is told the first token of a prompt, so all begin alike, as chats do.
PROMPTS = ([1, 40, 41, 99, 7], [1, 250], [1, *range(30, 90, 3)])
# (depth, top_k): a chain, no expansion at all, narrow and deep, as published.
SHAPES = ((4, 1), (0, 60), (6, 4), (5, 10))


def _hf_greedy(target: Target, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    ids_1T = torch.tensor([list(prompt)])
    output = target.model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(target.eos_token_ids),
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


def _tokens(rounds: Sequence[Round]) -> tuple[int, ...]:
    return tuple(token for done in rounds for token in done.tokens)


def _decoder(target: Target, head: DraftHead | None) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, head, DecodeConfig(max_context=256))


@pytest.fixture(scope="module")
def expected(tiny_target: Target) -> dict[tuple[int, ...], tuple[int, ...]]:
    """HF's own greedy answers."""
    return {tuple(p): _hf_greedy(tiny_target, p, NEW_TOKENS) for p in PROMPTS}


@pytest.fixture(scope="module")
def deep_expected(deep_target: Target) -> dict[tuple[int, ...], tuple[int, ...]]:
    """HF's own greedy answers of the deep target."""
    return {tuple(p): _hf_greedy(deep_target, p, NEW_TOKENS) for p in PROMPTS}


@pytest.fixture(scope="module")
def oracle(tiny_target: Target, tiny_target_folder: Path) -> OracleHead:
    head = OracleHead.of(tiny_target, tiny_target_folder, skill=0.7)
    head.start(PROMPTS[0][0])
    return head


def _sizes(depth: int, top_k: int) -> list[int]:
    most = 1 + top_k + depth * top_k**2
    return [size for size in range(1, 61) if size <= most]


def test_plain_decoding_is_hf_generate(tiny_target: Target, expected) -> None:
    decoder = _decoder(tiny_target, None)
    for prompt in PROMPTS:
        rounds = list(decoder.generate(prompt, max_new_tokens=NEW_TOKENS))
        assert _tokens(rounds) == expected[tuple(prompt)]
        assert all(done.tree_size == 1 for done in rounds[1:])


@pytest.mark.parametrize(("depth", "top_k"), SHAPES)
def test_greedy_output_is_hf_generate_at_every_tree_size(
    tiny_target: Target, oracle: OracleHead, expected, depth: int, top_k: int
) -> None:
    decoder = _decoder(tiny_target, oracle)
    accepted = rounds_run = 0
    for size in _sizes(depth, top_k):
        # All prompts at some sizes, one of them in turn at the others.
        chosen = PROMPTS if size in (2, 16, 60) else (PROMPTS[size % len(PROMPTS)],)
        for prompt in chosen:
            rounds = list(
                decoder.generate(
                    prompt, max_new_tokens=NEW_TOKENS, plan=TreePlan(size, depth, top_k)
                )
            )
            assert _tokens(rounds) == expected[tuple(prompt)], f"size {size}, prompt {prompt}"
            assert all(done.tree_size == size for done in rounds[1:])
            accepted += sum(len(done.ranks) for done in rounds)
            rounds_run += len(rounds) - 1
    assert accepted > 0.4 * rounds_run, "too few accepted paths to show anything"


@pytest.mark.parametrize("vocab_size", [259, 64])
@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_greedy_output_is_hf_generate_with_a_random_head(
    deep_target: Target, deep_target_folder: Path, deep_expected, kind: str, vocab_size: int
) -> None:
    """Every draft is wrong, and with a small draft vocabulary most tokens cannot be drafted."""
    size = deep_target.vocab_size
    vocabulary = DraftVocabulary(torch.arange(0, size, -(-size // vocab_size)), size)
    head = random_head(deep_target, deep_target_folder, vocabulary=vocabulary, kind=kind)
    decoder = _decoder(deep_target, head)
    for plan in (TreePlan(2, 0, 1), TreePlan(9, 6, 4), TreePlan(60, 5, 10)):
        for prompt in PROMPTS:
            rounds = list(decoder.generate(prompt, max_new_tokens=NEW_TOKENS, plan=plan))
            assert _tokens(rounds) == deep_expected[tuple(prompt)]


@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_a_head_reads_the_true_features_of_its_layers(
    deep_target: Target, deep_target_folder: Path, kind: str
) -> None:
    """What the engine hands a head are HF's hidden states of the committed text, in order."""
    head = random_head(deep_target, deep_target_folder, kind=kind)
    read: list[tuple[Tensor, Tensor]] = []
    extend_all = head.extend_all

    def noted(cache, places, counts, features_NLH: Tensor, next_ids_N: Tensor) -> DraftOutput:
        read.append((features_NLH, next_ids_N))
        return extend_all(cache, places, counts, features_NLH, next_ids_N)

    head.extend_all = noted  # type: ignore[method-assign]
    decoder = _decoder(deep_target, head)
    prompt = PROMPTS[2]
    rounds = list(decoder.generate(prompt, max_new_tokens=NEW_TOKENS, plan=TreePlan(16, 3, 4)))
    text = [*prompt, *_tokens(rounds)]
    features = torch.cat([features_TLH for features_TLH, _ in read])
    assert torch.cat([ids for _, ids in read]).tolist() == text[1 : len(features) + 1]
    states = deep_target.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    layers = {"eagle1": (7,), "eagle3": (2, 3, 4, 7)}[kind]
    wanted = torch.stack([states[layer][0, : len(features)] for layer in layers], dim=1)
    torch.testing.assert_close(features, wanted, rtol=0, atol=4e-5)


def test_plain_decoding_computes_no_inner_features(
    deep_target: Target, deep_target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline of every speedup does not pay for the head."""
    decoder = _decoder(deep_target, random_head(deep_target, deep_target_folder, kind="eagle3"))
    asked: list[object] = []
    taken = Target.ragged_features

    def noted(self: Target, *args, **kwargs) -> Tensor:
        features_TLH = taken(self, *args, **kwargs)
        asked.append(features_TLH.shape[1])
        return features_TLH

    monkeypatch.setattr(Target, "ragged_features", noted)
    list(decoder.generate(PROMPTS[0], max_new_tokens=4, plan=PLAIN))
    assert set(asked) == {1}
    list(decoder.generate(PROMPTS[0], max_new_tokens=4, plan=TreePlan(8, 1, 4)))
    assert set(asked) == {1, 4}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_limit_of_new_tokens_is_exact(
    tiny_target: Target, oracle: OracleHead, expected, count: int
) -> None:
    decoder = _decoder(tiny_target, oracle)
    rounds = list(decoder.generate(PROMPTS[0], max_new_tokens=count, plan=TreePlan(40, 5, 10)))
    assert _tokens(rounds) == expected[tuple(PROMPTS[0])][:count]
    for done in rounds:
        assert len(done.tokens) == len(done.drafted) > 0


def test_nothing_follows_a_stop_token(tiny_target: Target, oracle: OracleHead, expected) -> None:
    """Each token of the answer is a stop token once; it comes last, whoever drafted it."""
    decoder = _decoder(tiny_target, oracle)
    answer = expected[tuple(PROMPTS[0])]
    drafted_last = 0
    for stop in dict.fromkeys(answer):
        rounds = list(
            decoder.generate(
                PROMPTS[0],
                max_new_tokens=NEW_TOKENS,
                stop_token_ids=frozenset({stop}),
                plan=TreePlan(40, 5, 10),
            )
        )
        assert _tokens(rounds) == answer[: answer.index(stop) + 1]
        drafted_last += rounds[-1].drafted[-1]
    assert drafted_last, "no stop token was a drafted one"


def test_the_targets_end_token_stops(tiny_target: Target, oracle: OracleHead, expected) -> None:
    answer = expected[tuple(PROMPTS[0])]
    stopping = replace(tiny_target, eos_token_ids=frozenset({answer[5]}))
    decoder = _decoder(stopping, oracle)
    rounds = list(decoder.generate(PROMPTS[0], max_new_tokens=NEW_TOKENS, plan=TreePlan(8, 3, 4)))
    assert _tokens(rounds) == answer[: answer.index(answer[5]) + 1]
    assert _tokens(rounds) == _hf_greedy(stopping, PROMPTS[0], NEW_TOKENS)


def test_a_full_context_is_decoded_to_its_end(
    tiny_target: Target, tiny_target_folder: Path
) -> None:
    """The draft expands more rows than the tree keeps nodes; there must be room for them."""
    prompt = [1, *range(20, 60)]
    wanted = _hf_greedy(tiny_target, prompt, 20)
    config = DecodeConfig(max_context=len(prompt) + 20 + 6, total_tokens=6, depth=5, top_k=10)
    head = random_head(tiny_target, tiny_target_folder)
    decoder = SpeculativeDecoder(tiny_target, head, config)
    assert _tokens(list(decoder.generate(prompt, max_new_tokens=20))) == wanted


# --- Sampling ---------------------------------------------------------------

SETTINGS = (
    SamplingSettings(1.0),
    SamplingSettings(0.7),
    SamplingSettings(1.0, top_p=0.9),
)
# Of 512 or fewer outcomes; a fixed seed makes the tests repeatable, so this bounds how odd the
# seed may be, not how often they fail.
SIGNIFICANCE = 1e-3
DRAWS = 4_000
ENGINE_DRAWS = 400
# Candidates of a tree of three levels with siblings, by the text before them. What they are must
# not matter; among them are likely tokens and, under top-p, impossible ones.
CHILDREN = {(): (3, 5, 0), (3,): (1, 3), (5,): (6,), (3, 1): (2, 7), (3, 3): (0,), (5, 6): (4, 1)}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Path]:
    """A target of eight tokens, none of which ends a generation."""
    folder = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(3)
    config = tiny_config(8)
    config.num_hidden_layers = 1
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    target = load_target(TargetConfig(path=str(folder), dtype="float32"), num_threads=1)
    return replace(target, eos_token_ids=frozenset()), folder


SMALL_PROMPT = (1, 4, 2, 6)


@pytest.fixture(scope="module")
def next_logits(small_target: tuple[Target, Path]) -> Callable[[tuple[int, ...]], Tensor]:
    """Text generated so far → logits [V] of the next token, by plain forwards."""
    target, _ = small_target
    table: dict[tuple[int, ...], Tensor] = {}
    for length in range(4):
        texts = list(itertools.product(range(8), repeat=length))
        ids_BT = torch.tensor([[*SMALL_PROMPT, *text] for text in texts])
        logits_BV = target.logits(target.features(ids_BT)[:, -1])
        table.update(zip(texts, logits_BV.clone(), strict=True))
    return table.__getitem__


def _joint(next_logits, settings: SamplingSettings) -> Tensor:
    """Exact distribution [8, 8, 8] of the first three tokens."""
    joint = torch.zeros(8, 8, 8, dtype=torch.float64)
    for a, b in itertools.product(range(8), repeat=2):
        first = target_probs(next_logits(()), settings)[a]
        second = target_probs(next_logits((a,)), settings)[b]
        joint[a, b] = first * second * target_probs(next_logits((a, b)), settings)
    return joint


def _p_value(samples: Sequence[tuple[int, ...]], joint: Tensor) -> float:
    """Of the chi-square test; outcomes expected less than five times are taken together."""
    observed = torch.zeros_like(joint)
    for sample in samples:
        observed[sample] += 1
    if bool((observed[joint == 0] > 0).any()):
        return 0.0
    expected = (joint / joint.sum() * len(samples)).flatten()
    observed = observed.flatten()
    rare = expected < 5
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    found = torch.cat((observed[~rare], observed[rare].sum()[None]))
    wanted, found = wanted[wanted > 0], found[wanted > 0]
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def _fixed_tree() -> tuple[DraftTree, list[tuple[int, ...]]]:
    """The tree of CHILDREN, and the text of each of its nodes."""
    texts: list[tuple[int, ...]] = [()]
    parents = [-1]
    for place, text in enumerate(texts):
        for token in CHILDREN.get(text, ()):
            texts.append((*text, token))
            parents.append(place)
    tokens = torch.tensor([SMALL_PROMPT[-1], *(text[-1] for text in texts[1:])])
    return DraftTree(tokens, tuple(parents), tuple(range(len(texts)))), texts


Verify = Callable[[DraftTree, Tensor, SamplingSettings, torch.Generator], Verification]


def _through_verification(
    verify: Verify, next_logits, settings: SamplingSettings, draws: int
) -> list[tuple[int, ...]]:
    """First three tokens, sampled by verifying the fixed tree and going on plainly."""
    tree, texts = _fixed_tree()
    logits_NV = torch.stack([next_logits(text) for text in texts])
    generator = torch.Generator().manual_seed(11)
    probs = {
        text: target_probs(next_logits(text), settings)
        for length in range(3)
        for text in itertools.product(range(8), repeat=length)
    }
    samples = []
    for _ in range(draws):
        verification = verify(tree, logits_NV, settings, generator)
        text = (*texts[verification.path[-1]], verification.bonus_id)
        while len(text) < 3:
            text = (*text, draw(probs[text], generator))
        samples.append(text[:3])
    return samples


@pytest.mark.parametrize("settings", SETTINGS)
def test_verification_keeps_the_joint_distribution(next_logits, settings) -> None:
    samples = _through_verification(verify_sampling, next_logits, settings, DRAWS)
    assert _p_value(samples, _joint(next_logits, settings)) > SIGNIFICANCE


def _without_renormalizing(
    tree: DraftTree, target_logits_NV: Tensor, settings: SamplingSettings, generator
) -> Verification:
    """Planted error: a child's chance is not raised by the rejections before it."""
    path = [0]
    while True:
        left_V = target_probs(target_logits_NV[path[-1]], settings)
        for child in tree.children[path[-1]]:
            token = int(tree.token_ids_N[child])
            if float(torch.rand((), generator=generator)) < float(left_V[token]):
                path.append(child)
                break
            left_V[token] = 0
        else:
            return Verification(tuple(path), draw(left_V, generator))


def _in_order_of_the_draw(
    tree: DraftTree, target_logits_NV: Tensor, settings: SamplingSettings, generator
) -> Verification:
    """Planted error: one draw decides for all children, so the likeliest is tried on its own."""
    path = [0]
    while True:
        left_V = target_probs(target_logits_NV[path[-1]], settings)
        chance = float(torch.rand((), generator=generator))
        ordered = sorted(
            tree.children[path[-1]],
            key=lambda child: abs(float(left_V[tree.token_ids_N[child]]) - chance),
        )
        for child in ordered:
            token = int(tree.token_ids_N[child])
            if chance * float(left_V.sum()) < float(left_V[token]):
                path.append(child)
                break
            left_V[token] = 0
        else:
            return Verification(tuple(path), draw(left_V, generator))


def _bonus_of_another_row(
    tree: DraftTree, target_logits_NV: Tensor, settings: SamplingSettings, generator
) -> Verification:
    """Planted error: the bonus token is sampled from the row before the last accepted node's."""
    right = verify_sampling(tree, target_logits_NV, settings, generator)
    row = right.path[max(0, len(right.path) - 2)]
    return Verification(right.path, draw(target_probs(target_logits_NV[row], settings), generator))


@pytest.mark.parametrize(
    "wrong", [_without_renormalizing, _in_order_of_the_draw, _bonus_of_another_row]
)
def test_the_test_notices_planted_errors(next_logits, wrong: Verify) -> None:
    samples = _through_verification(wrong, next_logits, SETTINGS[0], DRAWS)
    assert _p_value(samples, _joint(next_logits, SETTINGS[0])) < 1e-9


@pytest.mark.parametrize("settings", [SETTINGS[0], SamplingSettings(0.7, top_p=0.9)])
def test_the_engine_keeps_the_joint_distribution(
    small_target: tuple[Target, Path], next_logits, settings: SamplingSettings
) -> None:
    target, folder = small_target
    oracle = OracleHead.of(target, folder, skill=0.7)
    oracle.start(SMALL_PROMPT[0])
    decoder = SpeculativeDecoder(target, oracle, DecodeConfig(max_context=64))
    samples = []
    for seed in range(ENGINE_DRAWS):
        rounds = decoder.generate(
            SMALL_PROMPT,
            max_new_tokens=3,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
            plan=TreePlan(8, 1, 3),
        )
        samples.append(_tokens(list(rounds)))
    assert _p_value(samples, _joint(next_logits, settings)) > SIGNIFICANCE
