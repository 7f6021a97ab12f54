"""Speculative sampling keeps the target's distribution, held against exact enumeration.

The target has eight tokens, so that the joint distribution of the first three generated ones has
512 outcomes. Texts are numbered as in a heap: text s followed by token t is text 8s + 1 + t, and
text 0 is the prompt alone.

Shapes: D draws, N tree nodes, V = 8, X = 73 texts of up to two tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from core.config import DecodeConfig, TargetConfig
from core.decode.batch_policy import BatchPolicy
from core.decode.costs import BatchCosts, CostModel
from core.decode.engine import SpeculativeDecoder
from core.decode.penalties import Penalties
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings, pick, target_probs
from core.decode.tree import DraftTree, TreePlan
from core.decode.verify import verify_sampling
from core.models.target import Target, load_target
from core.models.tiny import byte_tokenizer, tiny_config
from tests.heads import OracleHead

SIZE = 8
PROMPT = (1, 4, 2, 6)
SETTINGS = {
    "temperature 1": SamplingSettings(1.0),
    "temperature 0.7": SamplingSettings(0.7),
    "top-p 0.9": SamplingSettings(1.0, top_p=0.9),
    "top-k 3": SamplingSettings(1.0, top_k=3),
    "penalties": SamplingSettings(
        1.0,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.6,
        logit_bias={3: 1.0, 5: -0.5},
    ),
    "all at once": SamplingSettings(
        0.8, 0.95, 6, 0.05, 1.2, -0.3, 0.5, {3: 1.5, 7: -math.inf}, logprobs=2
    ),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
# Seeds are fixed, so this bounds how odd they may be, not how often the tests fail.
SIGNIFICANCE = 1e-4
DRAWS = 2_000_000
CHUNK = 250_000
ENGINE_DRAWS = 20_000
# Candidates of a tree of three levels with siblings, by the text before them. What they are must
# not matter; among them are likely tokens and, under top-p, impossible ones.
CHILDREN = {(): (3, 5, 0), (3,): (1, 3), (5,): (6,), (3, 1): (2, 7), (3, 3): (0,), (5, 6): (4, 1)}
TEXTS = [text for length in range(3) for text in itertools.product(range(SIZE), repeat=length)]


def _number(text: Iterable[int]) -> int:
    number = 0
    for token in text:
        number = SIZE * number + 1 + token
    return number


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Path]:
    """A target of eight tokens, none of which ends a generation."""
    folder = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(3)
    config = tiny_config(SIZE)
    config.num_hidden_layers = 1
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    loaded = load_target(TargetConfig(path=str(folder), dtype="float32"), num_threads=1)
    return replace(loaded, eos_token_ids=frozenset()), folder


@pytest.fixture(scope="module")
def logits_of(target: tuple[Target, Path]) -> dict[tuple[int, ...], Tensor]:
    """Text generated so far → logits [V] of the next token, by plain forwards."""
    found: dict[tuple[int, ...], Tensor] = {}
    for length in range(4):
        texts = list(itertools.product(range(SIZE), repeat=length))
        ids_BT = torch.tensor([[*PROMPT, *text] for text in texts])
        logits_BV = target[0].logits(target[0].features(ids_BT)[:, -1])
        found.update(zip(texts, logits_BV.clone(), strict=True))
    return found


def _by_definition(
    logits: Sequence[float], text: Sequence[int], settings: SamplingSettings
) -> list[float]:
    """What the settings ask for after a text, in plain Python."""
    values = list(logits)
    for token, bias in settings.logit_bias.items():
        values[token] += bias
    for token in range(len(values)):
        count = list(text).count(token)
        if count or token in PROMPT:
            penalty = settings.repetition_penalty
            values[token] *= 1 / penalty if values[token] > 0 else penalty
        values[token] -= settings.frequency_penalty * count + settings.presence_penalty * (
            count > 0
        )
    weights = [math.exp(value / settings.temperature) for value in values]
    order = sorted(range(len(values)), key=lambda token: -weights[token])
    kept = order[: settings.top_k or None]
    whole, reached, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if reached < settings.top_p * whole or settings.top_p == 1:
            nucleus.append(token)
        reached += weights[token]
    likely = {t for t in nucleus if weights[t] >= settings.min_p * weights[order[0]]}
    total = sum(weights[token] for token in likely)
    return [weight / total if token in likely else 0.0 for token, weight in enumerate(weights)]


def _joint(logits_of, settings: SamplingSettings) -> Tensor:
    """Exact distribution [512] of the first three tokens."""
    probs = {text: _by_definition(logits_of[text].tolist(), text, settings) for text in TEXTS}
    return torch.tensor(
        [
            probs[()][a] * probs[a,][b] * probs[a, b][c]
            for a, b, c in itertools.product(range(SIZE), repeat=3)
        ],
        dtype=torch.float64,
    )


def _p_value(observed: Tensor, joint: Tensor) -> float:
    """Of the chi-square test; outcomes expected less than five times are taken together."""
    if bool((observed[joint == 0] > 0).any()):
        return 0.0
    expected = joint / joint.sum() * observed.sum()
    rare = expected < 5
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    found = torch.cat((observed[~rare].double(), observed[rare].sum()[None].double()))
    wanted, found = wanted[wanted > 0], found[wanted > 0]
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


# --- Many draws of the verifier at once ------------------------------------------


class _Tree:
    """The tree of CHILDREN, the texts of its nodes, and what Aerie makes of its logits."""

    def __init__(self, logits_of, settings: SamplingSettings) -> None:
        texts: list[tuple[int, ...]] = [()]
        parents = [-1]
        for place, text in enumerate(texts):
            for token in CHILDREN.get(text, ()):
                texts.append((*text, token))
                parents.append(place)
        tokens = torch.tensor([PROMPT[-1], *(text[-1] for text in texts[1:])])
        self.tree = DraftTree(tokens, tuple(parents), tuple(range(len(texts))))
        logits_NV = torch.stack([logits_of[text] for text in texts])
        self.settings = settings
        self.logits_NV = Penalties(settings, PROMPT).apply(self.tree, logits_NV)
        self.probs_NV = target_probs(self.logits_NV, settings)
        self.texts_N = torch.tensor([_number(text) for text in texts])
        self.child_NV = torch.full((self.tree.size, SIZE), -1)
        for node in range(1, self.tree.size):
            self.child_NV[parents[node], tokens[node]] = node

    def follow(self, count: int, generator: torch.Generator) -> Tensor:
        """`verify_sampling`, for many draws at once: the texts [D] that they commit."""
        at_D = torch.zeros(count, dtype=torch.int64)
        texts_D = torch.zeros(count, dtype=torch.int64)
        open_D = torch.arange(count)
        while len(open_D):
            nodes_D = at_D[open_D]
            chosen_D = pick(self.probs_NV[nodes_D], _randoms(len(open_D), generator))
            texts_D[open_D] = SIZE * self.texts_N[nodes_D] + 1 + chosen_D
            at_D[open_D] = self.child_NV[nodes_D, chosen_D]
            open_D = open_D[at_D[open_D] >= 0]
        return texts_D


def _randoms(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


# Commits texts [D] by verifying the tree.
Verify = Callable[[_Tree, int, torch.Generator], Tensor]


def _trials(
    tree: _Tree,
    count: int,
    generator: torch.Generator,
    *,
    renormalizes: bool = True,
    ordered_by_draw: bool = False,
    own_row: bool = True,
) -> Tensor:
    """SpecInfer's algorithm 2: children are tried in turn; each fault is an error planted in it."""
    texts_D = torch.zeros(count, dtype=torch.int64)
    at_D = torch.zeros(count, dtype=torch.int64)
    for node, children in enumerate(tree.tree.children):
        here_D = (at_D == node).nonzero()[:, 0]
        left_DV = tree.probs_NV[node].double().repeat(len(here_D), 1)
        tokens = tree.tree.token_ids_N[list(children)]
        one_draw_D = _randoms(len(here_D), generator)
        order_DC = torch.arange(len(children)).expand(len(here_D), -1)
        if ordered_by_draw:
            order_DC = (left_DV[:, tokens] - one_draw_D[:, None]).abs().argsort(-1)
        ended_D = torch.ones(len(here_D), dtype=torch.bool)
        for turn in range(len(children)):
            tried_D = order_DC[:, turn]
            token_D1 = tokens[tried_D][:, None]
            chance_D = left_DV.gather(1, token_D1)[:, 0]
            if renormalizes:
                chance_D = chance_D / left_DV.sum(-1).clamp(min=1e-300)
            draw_D = one_draw_D if ordered_by_draw else _randoms(len(here_D), generator)
            accepted_D = ended_D & (draw_D < chance_D)
            at_D[here_D[accepted_D]] = torch.tensor(children)[tried_D[accepted_D]]
            ended_D &= ~accepted_D
            left_DV[ended_D] = left_DV[ended_D].scatter(1, token_D1[ended_D], 0)
        if not own_row:
            left_DV[:] = tree.probs_NV[max(0, tree.tree.parents[node])].double()
        bonus_D = pick(left_DV[ended_D], _randoms(int(ended_D.sum()), generator))
        texts_D[here_D[ended_D]] = SIZE * tree.texts_N[node] + 1 + bonus_D
        at_D[here_D[ended_D]] = -1
    return texts_D


PLANTED: dict[str, Verify] = {
    "no renormalization": partial(_trials, renormalizes=False),
    "order of the draw": partial(_trials, ordered_by_draw=True),
    "bonus of another row": partial(_trials, own_row=False),
}


def _first_three(verify: Verify, logits_of, settings: SamplingSettings) -> Tensor:
    """How often each of the 512 outcomes comes, the tree verified and the rest drawn plainly."""
    tree = _Tree(logits_of, settings)
    probs_XV = torch.tensor(
        [_by_definition(logits_of[text].tolist(), text, settings) for text in TEXTS]
    )
    generator = torch.Generator().manual_seed(11)
    observed = torch.zeros(SIZE**3, dtype=torch.int64)
    for _ in range(DRAWS // CHUNK):
        texts_D = verify(tree, CHUNK, generator)
        while bool((short_D := texts_D < len(TEXTS)).any()):
            short = texts_D[short_D]
            drawn = pick(probs_XV[short], _randoms(len(short), generator))
            texts_D[short_D] = SIZE * short + 1 + drawn
        # Four tokens where a whole path was accepted.
        texts_D = torch.where(texts_D < len(TEXTS) + SIZE**3, texts_D, (texts_D - 1) // SIZE)
        observed += (texts_D - len(TEXTS)).bincount(minlength=SIZE**3)
    return observed


@each_setting
def test_many_draws_at_once_decide_as_the_verifier_does(logits_of, settings) -> None:
    """What lets the test below speak for `verify_sampling`."""
    tree = _Tree(logits_of, settings)
    longest = 0
    for seed in range(300):
        found = verify_sampling(
            tree.tree, tree.logits_NV, settings, torch.Generator().manual_seed(seed)
        )
        text = SIZE * int(tree.texts_N[found.path[-1]]) + 1 + found.bonus_id
        assert tree.follow(1, torch.Generator().manual_seed(seed)).tolist() == [text]
        longest = max(longest, found.accepted_length)
    assert longest >= 3, "no draw went far into the tree"


@each_setting
def test_verification_keeps_the_joint_distribution(logits_of, settings) -> None:
    observed = _first_three(_Tree.follow, logits_of, settings)
    assert _p_value(observed, _joint(logits_of, settings)) > SIGNIFICANCE


def test_trials_in_turn_keep_it_too(logits_of) -> None:
    """The algorithm that errors are planted in is right without them."""
    settings = SETTINGS["all at once"]
    observed = _first_three(_trials, logits_of, settings)
    assert _p_value(observed, _joint(logits_of, settings)) > SIGNIFICANCE


@pytest.mark.parametrize("wrong", PLANTED.values(), ids=PLANTED)
def test_planted_errors_are_noticed(logits_of, wrong: Verify) -> None:
    settings = SETTINGS["temperature 1"]
    observed = _first_three(wrong, logits_of, settings)
    assert _p_value(observed, _joint(logits_of, settings)) < 1e-9


# --- Through the decoder -----------------------------------------------------------

# From settings and seeds to the first three tokens of each seed's answer to PROMPT.
Engine = Callable[[SamplingSettings, Sequence[int]], list[tuple[int, ...]]]


def _one_at_a_time(
    target: Target, folder: Path, settings: SamplingSettings, seeds: Sequence[int]
) -> list[tuple[int, ...]]:
    """A tree with siblings, of an oracle's drafts and of copied tokens."""
    oracle = OracleHead.of(target, folder, skill=0.7)
    oracle.start(PROMPT[0])
    decoder = SpeculativeDecoder(target, oracle, DecodeConfig(max_context=64, ngram_match=1))
    answers = []
    for seed in seeds:
        rounds = decoder.generate(
            PROMPT, max_new_tokens=3, sampling=settings, seed=seed, plan=TreePlan(8, 1, 3)
        )
        answers.append(tuple(token for done in rounds for token in done.tokens))
    return answers


def _eight_at_a_time(
    target: Target, folder: Path, settings: SamplingSettings, seeds: Sequence[int]
) -> list[tuple[int, ...]]:
    """Side by side: fixed trees, and trees that are chosen each round, which come and go."""
    oracle = OracleHead.of(target, folder, skill=0.7)
    oracle.start(PROMPT[0])
    config = DecodeConfig(
        max_context=64, cache_tokens=320, batch_size=8, max_waiting=len(seeds), ngram_match=1
    )
    decoder = SpeculativeDecoder(target, oracle, config)
    costs = BatchCosts({1: 1.0, 8: 1.2, 32: 4.0}, 0.1, {1: 0.1}, {1: 0.05})
    now, draw = [0.0], random.Random(0)

    def clock() -> float:
        now[0] += draw.choice((0.1, 1.0, 5.0))
        return now[0]

    decoder.policy = BatchPolicy(CostModel(costs), TreePlan(8, 1, 3), clock=clock)
    plans = (None, TreePlan(8, 1, 3), None, TreePlan(3, 0, 2))
    numbers = [
        decoder.submit(Request(PROMPT, 3, settings, seed, plan=plans[seed % len(plans)]))
        for seed in seeds
    ]
    answers: dict[int, tuple[int, ...]] = dict.fromkeys(numbers, ())
    sizes = set()
    while decoder.busy:
        for event in decoder.step():
            answers[event.request_id] += event.round.tokens
            sizes.add(event.round.tree_size)
    assert len(sizes) >= 5, "too few kinds of trees to show anything"
    return list(answers.values())


@pytest.fixture(scope="module", params=[_one_at_a_time, _eight_at_a_time])
def engine(request: pytest.FixtureRequest, target: tuple[Target, Path]) -> Engine:
    return partial(request.param, *target)


@each_setting
def test_a_seed_gives_the_text_of_plain_sampling(logits_of, engine: Engine, settings) -> None:
    """The trees that are verified have no influence at all."""
    seeds = range(100)
    answers = engine(settings, seeds)
    for seed, answer in zip(seeds, answers, strict=True):
        generator = torch.Generator().manual_seed(seed)
        text: tuple[int, ...] = ()
        while len(text) < 3:
            probs_1V = torch.tensor([_by_definition(logits_of[text].tolist(), text, settings)])
            text = (*text, int(pick(probs_1V, _randoms(1, generator))))
        assert answer == text
    assert len(set(answers)) > 10, "too few different texts to show anything"


@pytest.mark.soak
@pytest.mark.slow
@each_setting
def test_the_engine_keeps_the_joint_distribution(logits_of, engine: Engine, settings) -> None:
    observed = torch.zeros(SIZE**3, dtype=torch.int64)
    for answer in engine(settings, range(ENGINE_DRAWS)):
        observed[_number(answer) - len(TEXTS)] += 1
    assert _p_value(observed, _joint(logits_of, settings)) > SIGNIFICANCE
