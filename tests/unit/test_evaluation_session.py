"""Loading, calibrating and evaluating a decoder: a tiny target, heads of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import DRAFT_CONFIGS, Config
from core.data.conversations import Message
from core.data.prompts import Prompt
from core.data.template import encode_prompt
from core.decode.calibration import LARGEST_TREE, calibrate
from core.decode.load import load_decoder
from core.decode.tree import PLAIN, TreePlan
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import ConfigError, InputError
from core.evaluate.session import EvaluationSession, select_prompts
from core.evaluate.speculation import BASELINE, HF_GENERATE, HF_LOOKUP
from core.evaluate.summary import summarize
from core.evaluate.ways import CHOSEN, COPIES_ALONE, WITHOUT_COPIES, fixed_plans
from core.models.packed import PackedLinear
from core.models.target import Target


@pytest.fixture(scope="module", params=DRAFT_CONFIGS)
def config(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    deep_target: Target,
    deep_target_folder: Path,
) -> Config:
    """Of a head of each algorithm; as in serving, its folder alone says which it is."""
    geometry = TargetGeometry.of(deep_target.model.config)
    whole = DraftVocabulary.whole(geometry.vocab_size)
    head = build_head(DRAFT_CONFIGS[request.param].model_validate({}), geometry, whole, 5)
    folder = tmp_path_factory.mktemp("draft") / "head"
    record = {
        "target_fingerprint": deep_target.fingerprint,
        "feature_layers": list(head.feature_layers(deep_target.num_layers)),
    }
    save_head(folder, head, record)
    return Config().replace(
        target={"path": str(deep_target_folder), "dtype": "float32"},
        draft={"path": str(folder)},
        decode={"total_tokens": 6, "depth": 2, "top_k": 4, "max_context": 256},
        eval={
            "max_new_tokens": 10,
            "fixed_total_tokens": [12],
            "untrained_prompts": 1,
            "hf_generate_prompts": 1,
        },
    )


def _prompt(name: str, task: str, text: str = "hello") -> Prompt:
    return Prompt(name, task, (Message("user", text),))


def test_every_way_answers_and_none_differs(config: Config) -> None:
    session = EvaluationSession(config, 1)
    assert session.chosen == TreePlan(6, 2, 4) and session.calibration is None
    prompts = [_prompt("a", "x"), _prompt("b", "x", "who are you?")]
    session.check_prompts(prompts)
    results = [r for turn, prompt in enumerate(prompts) for r in session.answer(prompt, turn)]
    everything = [BASELINE, CHOSEN, "tree_12", "untrained_12", HF_GENERATE]
    assert list(results[0].answers) == everything
    assert list(results[1].answers) == everything[:3], "the first prompts alone"
    assert all(not result.differences for result in results)
    assert len({result.answers[BASELINE][0].token_ids for result in results}) == 2
    report = summarize(results)["overall"]
    assert report["lossless_identical"] == report["lossless_total"] == 5
    assert report["ways"]["tree_12"]["tree_size"] == 12


def test_copies_depths_and_repeats_are_ways_of_their_own(config: Config) -> None:
    config = config.replace(
        decode={"ngram_match": 2},
        eval={
            "repeats": 3,
            "fixed_total_tokens": [4, 12],
            "fixed_depths": [1, 2],
            "ngram_total_tokens": 5,
            "untrained_prompts": 0,
            "hf_lookup_tokens": 3,
        },
    )
    session = EvaluationSession(config, 1)
    fixed = ["tree_4_depth_1", "tree_4_depth_2", "tree_12_depth_1", "tree_12_depth_2"]
    assert list(fixed_plans(config)) == fixed
    (result,) = session.answer(_prompt("a", "x", "hello hello hello hello"), 0)
    assert list(result.answers) == [
        BASELINE, CHOSEN, WITHOUT_COPIES, COPIES_ALONE, *fixed, HF_GENERATE, HF_LOOKUP,
    ]  # fmt: skip
    assert all(len(repeats) == 3 for repeats in result.answers.values())
    assert not result.differences
    (alone, *_) = result.answers[COPIES_ALONE]
    # A match of three words of a head's tree would be larger; where nothing matches, it is a root.
    assert 1 <= alone.tree_size <= 5
    report = summarize([result, result], fixed)["overall"]
    assert report["repeats"] == 3 and report["lossless_total"] == 14
    assert report["against_best_fixed"]["way"] in fixed


def test_batches_ask_what_was_asked_alone(config: Config) -> None:
    config = config.replace(
        eval={
            "batch_sizes": [1, 2],
            "repeats": 2,
            "untrained_prompts": 0,
            "hf_generate_prompts": 0,
            "max_new_tokens": 6,
            "arrivals": 2.0,
        }
    )
    session = EvaluationSession(config, 1)
    prompts = [
        _prompt("a", "x"),
        Prompt("q", "y", (Message("user", "who are you?"),), ("and now?",)),
    ]
    session.check_prompts(prompts)
    results = {
        r.key: r for turn, prompt in enumerate(prompts) for r in session.answer(prompt, turn)
    }
    questions = session.questions(prompts, results)
    assert [one.id for one in questions] == ["a", "q/1", "q/2"]
    assert [len(one.prompt_ids) for one in questions] == [r.prompt_tokens for r in results.values()]
    runs = list(session.run_batches(questions, ()))
    ways = [BASELINE, CHOSEN, "tree_12"]
    turned = [*ways, *ways[1:], ways[0]]
    assert [run.key for run in runs] == [
        key
        for size in (1, 2)
        for key in [
            *((0.0, size, n // 3, way, 0.0) for n, way in enumerate(turned)),
            (0.0, size, 0, CHOSEN, 2.0),
        ]
    ]  # fmt: skip
    assert not any(run.differences for run in runs)
    assert sum(run.answers for run in runs) == 7 * 3 + 7 * 4
    done = {run.key for run in runs[:6]}
    assert [run.key for run in session.run_batches(questions, done)] == [r.key for r in runs[6:]]


def test_at_other_temperatures_a_seeds_text_is_the_same_in_every_way(config: Config) -> None:
    config = config.replace(
        eval={
            "batch_sizes": [3], "temperatures": [0.0, 1.0], "repeats": 2, "hf_lookup_tokens": 2,
        }
    )  # fmt: skip
    session = EvaluationSession(config, 1)
    prompts = [_prompt("a", "x"), _prompt("b", "x", "who are you?")]
    (greedy, *_), drawn = (
        [r for n, prompt in enumerate(prompts) for r in session.answer(prompt, n, (), t)]
        for t in (0.0, 1.0)
    )
    assert [result.key for result in drawn] == [(1.0, "a"), (1.0, "b")]
    assert HF_LOOKUP in drawn[0].answers
    assert not any(result.differences for result in drawn)
    texts = [result.answers[BASELINE][0].token_ids for result in (greedy, *drawn)]
    assert len(set(texts)) == 3
    results = {result.key: result for result in drawn}
    questions = session.questions(prompts, results, 1.0)
    runs = list(session.run_batches(questions, ()))
    assert {run.temperature for run in runs} == {1.0}
    assert not any(run.differences for run in runs)
    # With another seed other tokens are drawn.
    other = EvaluationSession(config.replace(eval={"seed": 1}), 1)
    (again,) = other.answer(prompts[0], 0, (), 1.0)
    assert again.answers[BASELINE][0].token_ids != texts[1]


def test_batches_that_the_cache_cannot_hold_are_named_before_any_prompt(config: Config) -> None:
    config = config.replace(decode={"cache_tokens": 200}, eval={"batch_sizes": [2, 6]})
    with pytest.raises(InputError, match=r"of 6 requests .* decode\.cache_tokens=200"):
        EvaluationSession(config, 1).check_prompts([_prompt("a", "x")])


@pytest.mark.parametrize(("hf_model", "same"), [("plain", False), ("packed", True)])
def test_hf_generates_with_a_model_of_its_own_unless_told_otherwise(
    config: Config, hf_model: str, same: bool
) -> None:
    session = EvaluationSession(config.replace(eval={"hf_model": hf_model}), 1)
    outside, ours = session.ways.outside, session.decoder.target
    assert outside is not None and (outside.model is ours.model) == same
    packed = [
        any(isinstance(m, PackedLinear) for m in one.model.modules()) for one in (outside, ours)
    ]
    assert packed == [same, True]
    assert outside.dtype == ours.dtype


def test_a_prompt_that_does_not_fit_is_named_before_any_is_answered(config: Config) -> None:
    session = EvaluationSession(config, 1)
    long = _prompt("too-long", "x", "word " * 50)
    with pytest.raises(InputError, match=r"prompt too-long: .* 12 .*max_context=256"):
        session.check_prompts([_prompt("a", "x"), long])


def test_a_prompt_for_which_the_cache_is_too_small_is_named_too(config: Config) -> None:
    session = EvaluationSession(config.replace(decode={"cache_tokens": 120}), 1)
    long = _prompt("too-long", "x", "word " * 20)
    with pytest.raises(InputError, match=r"prompt too-long: .*cache_tokens=120"):
        session.check_prompts([_prompt("a", "x"), long])


def test_the_policy_has_its_say_in_the_chosen_trees_alone(config: Config) -> None:
    automatic = config.replace(
        decode={"total_tokens": "auto", "ngram_match": 2}, eval={"untrained_prompts": 0}
    )
    session = EvaluationSession(automatic, 1)
    assert session.calibration is not None
    policies = {way.name: way.decoder.policy for way in session.ways.aeries}
    assert policies[CHOSEN] is not None and policies[COPIES_ALONE] is None
    assert policies["tree_12"] is None
    # Each learns from its own rounds.
    assert policies[WITHOUT_COPIES] not in (None, policies[CHOSEN])
    session.check_prompts([_prompt("a", "x")])
    (result,) = session.answer(_prompt("a", "x"), 0)
    assert not result.differences
    # A head that has learnt nothing does not pay, at least not with trees as large as fixed ones.
    assert result.answers["tree_12"][0].tree_size == 12
    assert result.answers[CHOSEN][0].tree_size < 12


def test_a_second_turn_is_asked_on_top_of_the_targets_own_answer(config: Config) -> None:
    session = EvaluationSession(config, 1)
    prompt = Prompt("q", "mt_bench", (Message("user", "hello"),), ("and now?",), "writing")
    session.check_prompts([prompt])
    first, second = session.answer(prompt, 3)
    assert (first.id, second.id, second.task, second.category) == (
        "q/1", "q/2", "mt_bench", "writing",
    )  # fmt: skip
    asked = encode_prompt(session.decoder.target.tokenizer, prompt.after([first.text]))
    assert second.prompt_tokens == len(asked) > first.prompt_tokens
    # One that was interrupted in between goes on with the second.
    (again,) = session.answer(prompt, 3, [first.text])
    assert again.id == "q/2"
    assert again.answers[BASELINE][0].token_ids == second.answers[BASELINE][0].token_ids
    assert not second.differences


def test_turns_may_be_left_out(config: Config) -> None:
    session = EvaluationSession(config.replace(eval={"turns": 1}), 1)
    prompt = Prompt("q", "x", (Message("user", "hello"),), ("and now?",))
    assert [result.id for result in session.answer(prompt, 3)] == ["q"]


def test_the_turns_together_must_fit(config: Config) -> None:
    session = EvaluationSession(config, 1)
    prompt = Prompt("q", "x", (Message("user", "hello"),), ("and now?",) * 20)
    with pytest.raises(InputError, match=r"prompt q: .*max_context=256"):
        session.check_prompts([prompt])


def test_prompts_are_spread_over_tasks() -> None:
    prompts = [_prompt(f"{task}{n}", task) for task in ("x", "y") for n in range(3)]
    prompts += [_prompt("z0", "z")]
    taken = [prompt.id for prompt in select_prompts(prompts, 5)]
    assert taken == ["x0", "y0", "z0", "x1", "y1"]
    assert len(select_prompts(prompts, None)) == 7
    assert select_prompts([], 3) == []
    assert [p.id for p in select_prompts(prompts, 2, ["z", "y"])] == ["y0", "z0"]
    with pytest.raises(ConfigError, match=r"eval\.tasks: no prompt is of w; there are x, y, z"):
        select_prompts(prompts, 2, ["w", "x"])


def test_a_tasks_prompts_are_spread_over_its_categories() -> None:
    kinds = ["writing", "writing", "math", "math", "math"]
    prompts = [
        Prompt(f"{kind}{n}", "mt_bench", (Message("user", "x"),), (), kind)
        for n, kind in enumerate(kinds)
    ]
    prompts += [_prompt("z0", "z")]
    taken = [prompt.id for prompt in select_prompts(prompts, None)]
    assert taken == ["writing0", "z0", "math2", "writing1", "math3", "math4"]


def test_calibration_measures_and_chooses(config: Config) -> None:
    loaded = load_decoder(config.replace(decode={"total_tokens": "auto"}), num_threads=1)
    assert loaded.calibration is not None
    summary = loaded.calibration.summary()
    most = 1 + 4 + 2 * 16
    assert max(summary["by_size"]) <= min(LARGEST_TREE, most)
    assert summary["plain_step_ms"] > 0 and summary["expand_ms"] > 0
    for row in summary["by_size"].values():
        assert row["speedup"] > 0 and row["verify_ms"] > 0
        assert 0 <= row["depth"] <= 2 and row["accepted_length"] >= 1
    assert summary["rounds_measured"] > 0
    assert loaded.decoder.plan == loaded.calibration.plan
    assert summary["total_tokens"] == loaded.decoder.plan.total_tokens
    rounds = list(loaded.decoder.generate([1, 2 + 40], max_new_tokens=3))
    assert sum(len(done.tokens) for done in rounds) <= 3


def test_what_cannot_be_calibrated_is_refused(config: Config) -> None:
    plain = load_decoder(config.replace(draft={"path": None}, decode={"total_tokens": "auto"}))
    assert plain.decoder.plan == PLAIN and plain.calibration is None
    with pytest.raises(ConfigError, match="needs a draft head"):
        calibrate(plain.decoder)
    with pytest.raises(ConfigError, match="too small for the measurement"):
        load_decoder(config.replace(decode={"total_tokens": "auto", "max_context": 100}))


def test_a_tree_without_a_head_is_refused(config: Config) -> None:
    decoder = load_decoder(config.replace(draft={"path": None}, decode={"total_tokens": 1})).decoder
    assert decoder.plan_of(1) == PLAIN
    with pytest.raises(ConfigError, match=r"decode\.total_tokens=8 needs a draft head"):
        decoder.plan_of(8)


@pytest.mark.parametrize(
    ("prompt", "count", "said"),
    [
        ([], 5, "the prompt is empty"),
        ([1, 2, 3], 0, "max_new_tokens=0 generates nothing"),
        ([1, 2, 3], -2, "max_new_tokens=-2 generates nothing"),
        ([1] * 200, 51, "200 prompt tokens . 51 new tokens are 251, .* a tree of 6 .* is 250"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    config: Config, prompt: list[int], count: int, said: str
) -> None:
    decoder = load_decoder(config).decoder
    with pytest.raises(InputError, match=said):
        next(decoder.generate(prompt, max_new_tokens=count))


def test_a_generation_may_be_left_and_another_begun(config: Config) -> None:
    decoder = load_decoder(config).decoder

    def answer() -> list[int]:
        rounds = decoder.generate([1, 70, 80], max_new_tokens=12)
        return [token for done in rounds for token in done.tokens]

    before = answer()
    left = decoder.generate([1, 99], max_new_tokens=12)
    next(left), next(left)
    left.close()  # type: ignore[attr-defined]
    assert answer() == before


def test_a_seed_makes_sampling_repeatable(config: Config) -> None:
    decoder = load_decoder(config).decoder

    def answer(seed: int | None) -> tuple[int, ...]:
        rounds = decoder.generate([1, 70], max_new_tokens=12, temperature=1.0, seed=seed)
        return tuple(token for done in rounds for token in done.tokens)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1
    assert len({answer(None) for _ in range(5)}) > 1
