"""The decoder under load: requests that come, go and are given up at any time."""

from __future__ import annotations

import ctypes
import json
import random
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import DecodeConfig, TargetConfig
from core.decode.acceptance import Floats
from core.decode.batch_policy import BatchPolicy
from core.decode.costs import BatchCosts, CostModel
from core.decode.drafting import HeadDrafter
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings
from core.decode.tree import PLAIN, TreePlan
from core.draft.base import DraftHead
from core.errors import BusyError, InputError
from core.models.target import Target, load_target
from tests.heads import OracleHead, random_head
from tests.oracle import OracleDrafter

Text = tuple[int, ...]
LONGEST = 24


def _prompts(count: int, seed: int) -> list[Text]:
    """Prompts of 1 to 40 tokens; every third begins as another one does."""
    draw = random.Random(seed)
    prompts: list[Text] = []
    for number in range(count):
        prompt = tuple(draw.randrange(3, 259) for _ in range(draw.choice((1, 5, 12, 40))))
        if prompts and number % 3 == 0:
            prompt = (*draw.choice(prompts)[1:30], *prompt[:9])
        prompts.append((1, *prompt))
    return prompts


def _solo(target: Target, prompts: Sequence[Text], count: int) -> dict[Text, Text]:
    """What the target says to each prompt alone, `count` tokens, end tokens passed over."""
    answers = {}
    for prompt in prompts:
        text = list(prompt)
        for _ in range(count):
            final_BTH = target.features(torch.tensor([text]))
            text.append(int(target.logits(final_BTH[0, -1:])[0].argmax()))
        answers[prompt] = tuple(text[len(prompt) :])
    return answers


@pytest.fixture(scope="module")
def answers(tiny_target: Target) -> dict[Text, Text]:
    return _solo(tiny_target, _prompts(24, 1), LONGEST)


def _cut(answer: Text, count: int, stops: frozenset[int]) -> Text:
    """An answer up to its limit or its first stop token, which is given too."""
    answer = answer[:count]
    ends = [place for place, token in enumerate(answer) if token in stops]
    return answer[: ends[0] + 1] if ends else answer


def _run(decoder: SpeculativeDecoder, requests: Sequence[Request]) -> list[Text]:
    """The answers to requests that all come at once."""
    ids = [decoder.submit(request) for request in requests]
    found: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while decoder.busy:
        for event in decoder.step():
            found[event.request_id] += event.round.tokens
    return [tuple(found[request_id]) for request_id in ids]


class Crowd:
    """Requests at random, and what has come of them."""

    def __init__(self, decoder: SpeculativeDecoder, answers: dict[Text, Text], seed: int) -> None:
        self.decoder, self.answers, self.draw = decoder, answers, random.Random(seed)
        self.eos = decoder.target.eos_token_ids
        self.wanted: dict[int, Text] = {}
        self.found: dict[int, list[int]] = {}
        self.given_up: set[int] = set()
        self.sizes: set[int] = set()
        self.ended = self.rounds = self.committed = self.refused = 0

    def arrive(self) -> None:
        prompt = self.draw.choice(list(self.answers))
        count = self.draw.randint(1, LONGEST)
        stops = frozenset(self.draw.sample(range(3, 259), 8))
        plan = self.draw.choice((None, None, PLAIN, TreePlan(12, 5, 4), TreePlan(3, 1, 2)))
        try:
            number = self.decoder.submit(
                Request(prompt, count, stop_token_ids=stops, seed=0, plan=plan)
            )
        except BusyError:
            self.refused += 1
            return
        self.wanted[number] = _cut(self.answers[prompt], count, stops | self.eos)
        self.found[number] = []

    def give_up(self) -> None:
        if self.wanted:
            number = self.draw.choice(list(self.wanted))
            self.decoder.cancel(number)
            self.given_up.add(number)
            del self.wanted[number]

    def round(self) -> None:
        for event in self.decoder.step():
            number, done = event.request_id, event.round
            assert number not in self.given_up, "nothing is told of what was given up"
            self.found[number] += done.tokens
            assert len(done.drafted) == len(done.tokens) > 0
            self.sizes.add(done.tree_size)
            if done.tree_size > 1:
                self.rounds += 1
                self.committed += len(done.tokens)
            wanted = self.wanted[number]
            assert tuple(self.found[number]) == wanted[: len(self.found[number])]
            assert (event.ending is not None) == (len(self.found[number]) == len(wanted))
            if event.ending is not None:
                del self.wanted[number], self.found[number]
                self.ended += 1

    def check_rows(self) -> None:
        """Every row is free, of a sequence at work, or kept, and of one alone."""
        scheduler = self.decoder.scheduler
        held = [one.stretch for one in scheduler.running] + [one.stretch for one in scheduler.kept]
        rows = [row for one in held if one is not None for row in range(one.first, one.end)]
        assert len(rows) == len(set(rows)) == scheduler.space.num_rows - scheduler.space.num_free
        assert len(scheduler.running) <= self.decoder.config.batch_size
        assert len(scheduler.waiting) <= self.decoder.config.max_waiting


class FickleCosts(CostModel):
    """What a node costs changes from one round to the next, from nothing to 0.4 of a plain step."""

    draw = random.Random(0)

    def verify_up_to(self, base: int, extra: int, sequences: int) -> Floats:
        slope = self.draw.uniform(0.0, 0.4)
        return np.array([1 + slope * node for node in range(extra + 1)])


def _fickle_policy() -> BatchPolicy:
    """Trees of up to eight nodes, of which it takes any number."""
    costs = FickleCosts(BatchCosts({1: 1.0}, 0.0, {1: 0.1}, {1: 0.05}))
    return BatchPolicy(costs, TreePlan(8, 4, 3))


def _crowded(
    target: Target,
    answers: dict[Text, Text],
    num_rounds: int,
    seed: int,
    policy: BatchPolicy | None = None,
) -> Crowd:
    config = DecodeConfig(
        total_tokens=8,
        depth=4,
        top_k=3,
        max_context=128,
        cache_tokens=300,
        batch_size=5,
        max_waiting=6,
        prefill_chunk=16,
    )
    drafter = OracleDrafter(answers, target.vocab_size, skill=0.7)
    decoder = SpeculativeDecoder(target, None, config, drafter=drafter)
    decoder.policy = policy
    crowd = Crowd(decoder, answers, seed)
    for _ in range(num_rounds):
        while crowd.draw.random() < 0.5:
            crowd.arrive()
        if crowd.draw.random() < 0.05:
            crowd.give_up()
        crowd.round()
        crowd.check_rows()
    while crowd.decoder.busy:
        crowd.round()
        crowd.check_rows()
    assert not crowd.wanted, "every request was answered"
    assert crowd.committed >= 2 * crowd.rounds, "too few accepted paths to show anything"
    return crowd


@pytest.mark.parametrize("policy", [None, _fickle_policy])
def test_a_crowd_is_answered_as_each_one_alone(tiny_target: Target, answers, policy) -> None:
    crowd = _crowded(tiny_target, answers, 150, 3, policy and policy())
    assert policy is None or len(crowd.sizes) >= 6, "too few tree sizes to show anything"
    assert crowd.ended > 40 and crowd.given_up and crowd.refused


@pytest.mark.soak
@pytest.mark.parametrize("policy", [None, _fickle_policy])
def test_a_crowd_for_20_000_rounds(tiny_target: Target, policy) -> None:
    answers = _solo(tiny_target, _prompts(60, 2), LONGEST)
    crowd = _crowded(tiny_target, answers, 20_000, 4, policy and policy())
    assert crowd.ended > 5_000 and len(crowd.given_up) > 500


@pytest.mark.parametrize("kind", ["eagle1", "eagle3", "oracle", "plain"])
def test_a_mixed_batch_is_decoded_as_each_one_alone(
    deep_target: Target, deep_target_folder: Path, kind: str
) -> None:
    """Trees of several sizes side by side, in fewer rows than all need at once."""
    head: DraftHead | None = None
    if kind == "oracle":
        head = OracleHead.of(deep_target, deep_target_folder, skill=0.7)
        head.start(1)
    elif kind != "plain":
        head = random_head(deep_target, deep_target_folder, kind=kind)
    plans = [PLAIN] if head is None else [TreePlan(9, 3, 4), PLAIN, TreePlan(4, 0, 5)]
    prompts = _prompts(6, 5)
    wanted = _solo(deep_target, prompts, 10)
    config = DecodeConfig(max_context=128, cache_tokens=250, batch_size=4, prefill_chunk=24)
    decoder = SpeculativeDecoder(deep_target, head, config)
    requests = [Request(p, 10, plan=plans[i % len(plans)]) for i, p in enumerate(prompts)]
    eos = deep_target.eos_token_ids
    assert _run(decoder, requests) == [_cut(wanted[p], 10, eos) for p in prompts]


def test_a_seed_says_the_same_in_any_company(tiny_target: Target, answers) -> None:
    settings = SamplingSettings(temperature=1.0, top_p=0.9)
    requests = [Request(p, 12, settings, seed=n) for n, p in enumerate(list(answers)[:6])]
    decoder = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128))
    together = _run(decoder, requests)
    assert together == [text for one in requests for text in _run(decoder, [one])]
    assert len(set(together)) > 1


@pytest.fixture(scope="module")
def roomy_target(tiny_target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The tiny target with positions for 5,000 tokens: rotary ones need no weights."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(tiny_target_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 5000
    (folder / "config.json").write_text(json.dumps(config))
    return load_target(TargetConfig(path=str(folder), dtype="float32"), num_threads=1)


def test_a_long_prompt_holds_nobody_up(roomy_target: Target, answers, monkeypatch) -> None:
    """Of a prompt of 4,000 tokens no round reads more than a chunk, and all others go on."""
    draw = random.Random(0)
    long = tuple(draw.randrange(3, 259) for _ in range(4000))
    config = DecodeConfig(max_context=4100, cache_tokens=6000, prefill_chunk=256)
    decoder = SpeculativeDecoder(roomy_target, None, config)
    shorts = [prompt for prompt, answer in answers.items() if not {*answer} & {2}][:5]
    sizes = _pass_sizes(roomy_target, monkeypatch)
    short_ids = [decoder.submit(Request(short, LONGEST)) for short in shorts]
    found: dict[int, list[int]] = {number: [] for number in short_ids}
    for event in decoder.step():
        found[event.request_id] += event.round.tokens
    late = decoder.submit(Request(long, 4))
    found[late] = []
    buffers = [layer.keys.data_ptr() for layer in decoder._cache.layers]
    rounds = 0
    while decoder.busy:
        events = decoder.step()
        rounds += 1
        for event in events:
            found[event.request_id] += event.round.tokens
        if rounds < LONGEST:
            told = [event.request_id for event in events]
            assert told[:5] == short_ids, "a token each round"
            assert (late in told) == (16 <= rounds < 20), "16 chunks, then its first token"
    assert max(sizes) <= 256 + len(shorts), "no pass is longer than a chunk and the others' tokens"
    # What was reserved at the start is what there is, and the bound that was set.
    assert buffers == [layer.keys.data_ptr() for layer in decoder._cache.layers]
    assert all(layer.keys.shape[2] == 6000 for layer in decoder._cache.layers)
    assert [tuple(found[number]) for number in short_ids] == [answers[short] for short in shorts]
    assert tuple(found[late]) == _cut(
        _solo(roomy_target, [long], 4)[long], 4, roomy_target.eos_token_ids
    )


def test_what_can_never_fit_is_refused_by_number(tiny_target: Target) -> None:
    config = DecodeConfig(max_context=500, cache_tokens=100)
    decoder = SpeculativeDecoder(tiny_target, None, config)
    refusal = r"90 prompt tokens \+ 20 new tokens are 110, .* is 99; .*cache_tokens=100"
    with pytest.raises(InputError, match=refusal):
        decoder.submit(Request([5] * 90, 20))
    roomy = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=500))
    with pytest.raises(InputError, match=r"are 510, .* is 499; .*max_context=500"):
        roomy.submit(Request([5] * 490, 20))
    assert not decoder.busy
    assert len(_run(decoder, [Request([5] * 79, 20)])[0]) > 0, "it fits to the last row"


def test_a_full_queue_refuses_and_recovers(tiny_target: Target) -> None:
    config = DecodeConfig(max_context=100, batch_size=1, max_waiting=2)
    decoder = SpeculativeDecoder(tiny_target, None, config)
    numbers = [decoder.submit(Request([1, 60 + n], 3)) for n in range(2)]
    with pytest.raises(BusyError, match=r"2 requests wait already"):
        decoder.submit(Request([1, 70], 3))
    decoder.cancel(numbers[0])
    decoder.submit(Request([1, 71], 3))
    while decoder.busy:
        decoder.step()


def test_nothing_is_left_of_what_was_reset(tiny_target: Target, answers) -> None:
    decoder = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128, batch_size=2))
    prompts = list(answers)[:3]
    for prompt in prompts:
        decoder.submit(Request(prompt, LONGEST))
    decoder.step()
    decoder.reset()
    assert not decoder.busy and decoder.scheduler.space.num_free == 16384
    wanted = [_cut(answers[p], LONGEST, tiny_target.eos_token_ids) for p in prompts]
    assert _run(decoder, [Request(p, LONGEST) for p in prompts]) == wanted


def test_generators_share_the_decoder(tiny_target: Target, answers) -> None:
    decoder = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128))
    prompts = [p for p, answer in answers.items() if not {*answer} & {2}][:3]
    streams = [decoder.generate(p, max_new_tokens=8) for p in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(8):
        for text, stream in zip(found, streams, strict=True):
            text += next(stream).tokens
    assert [tuple(text) for text in found] == [answers[p][:8] for p in prompts]
    assert all(next(stream, None) is None for stream in streams) and not decoder.busy


# --- Rows that are taken over -----------------------------------------------


def _pass_sizes(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    ragged_features = Target.ragged_features

    def noted(self: Target, input_ids_N, *args, **kwargs):
        sizes.append(len(input_ids_N))
        return ragged_features(self, input_ids_N, *args, **kwargs)

    monkeypatch.setattr(Target, "ragged_features", noted)
    return sizes


@pytest.mark.parametrize("kind", [None, "eagle1", "eagle3", "oracle"])
def test_the_next_turn_takes_over_what_was_computed(
    deep_target: Target, deep_target_folder: Path, kind: str | None, monkeypatch
) -> None:
    head: DraftHead | None = None
    if kind == "oracle":
        head = OracleHead.of(deep_target, deep_target_folder, skill=0.8)
        head.start(1)
    elif kind is not None:
        head = random_head(deep_target, deep_target_folder, kind=kind)
    plan = PLAIN if head is None else TreePlan(6, 2, 3)
    question = (1, *range(40, 80))
    config = DecodeConfig(max_context=200, cache_tokens=150)
    decoder = SpeculativeDecoder(deep_target, head, config)
    (answer,) = _run(decoder, [Request(question, 12, plan=plan)])
    follow_up = (*question, *answer, *range(90, 100))
    sizes = _pass_sizes(deep_target, monkeypatch)
    (found,) = _run(decoder, [Request(follow_up, 8, plan=plan)])
    # What was said last is not in the cache yet, and the head needs a token or two again.
    assert sizes[0] <= 10 + 1 + (0 if head is None else plan.depth + 3)
    fresh = SpeculativeDecoder(deep_target, head, config)
    assert found == _run(fresh, [Request(follow_up, 8, plan=plan)])[0]
    assert decoder.scheduler.space.num_free < 150, "and is kept in its turn"


def test_rows_of_another_text_and_of_its_beginning_are_told_apart(
    tiny_target: Target, answers, monkeypatch
) -> None:
    decoder = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128))
    prompt = (1, *range(50, 80))
    first = _run(decoder, [Request(prompt, 6)])
    sizes = _pass_sizes(tiny_target, monkeypatch)
    # The same again: all but the last token of the prompt is there.
    assert _run(decoder, [Request(prompt, 6)]) == first and sizes[0] == 1
    other = (*prompt[:20], 200, 201)
    del sizes[:]
    assert _run(decoder, [Request(other, 6)])[0] == _cut(
        _solo(tiny_target, [other], 6)[other], 6, tiny_target.eos_token_ids
    )
    assert sizes[0] == 2
    off = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128, reuse_prefixes=False))
    _run(off, [Request(prompt, 6)])
    del sizes[:]
    _run(off, [Request(prompt, 6)])
    assert sizes[0] == len(prompt) and off.scheduler.space.num_free == 16384


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for resident memory")
def test_memory_of_the_caches_is_taken_when_asked(
    tiny_target: Target, tiny_target_folder: Path, answers: dict[Text, Text]
) -> None:
    """All of it, no more of it later, and with the same answers."""
    # Of sizes that malloc asks the system for, not from memory that others have given back.
    rows = 400_000
    head = random_head(tiny_target, tiny_target_folder)
    decoder = SpeculativeDecoder(tiny_target, head, DecodeConfig(cache_tokens=rows))
    requests = [Request(prompt, LONGEST) for prompt in answers]
    # Rows that are left of the first ones must not be begun with.
    _run(decoder, requests[:4])
    target_caches = [layer.joint for layer in decoder._cache._slots]
    assert all(_resident_share(cache) < 0.5 for cache in target_caches)
    decoder.occupy_memory()
    assert isinstance(decoder.drafter, HeadDrafter)
    caches = [*target_caches, decoder.drafter.cache.joint]
    wanted = sum(cache.nbytes for cache in caches)
    assert min(cache.nbytes for cache in caches) > 2**25
    assert all(_resident_share(cache) > 0.95 for cache in caches)
    taken = _resident_bytes()
    found = _run(decoder, requests)
    assert found == [_cut(one, LONGEST, decoder.target.eos_token_ids) for one in answers.values()]
    assert _resident_bytes() - taken < 0.3 * wanted
    decoder.submit(requests[0])
    with pytest.raises(BusyError, match="in use"):
        decoder.occupy_memory()


def _resident_share(tensor: torch.Tensor) -> float:
    """Of the pages behind a tensor; the process as a whole also gives memory back meanwhile."""
    page = resource.getpagesize()
    first = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.nbytes - first
    found = (ctypes.c_ubyte * -(-length // page))()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), found)
    assert not failed, ctypes.get_errno()
    return sum(state & 1 for state in found) / len(found)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
