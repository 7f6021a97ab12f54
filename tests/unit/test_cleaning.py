"""Each cleaning rule on what it is for and on what it must leave alone."""

import random

import pytest

from core.data.cleaning import CleaningCounts, clean
from core.data.conversations import Conversation, Message, Role
from core.data.selection import Selection, content_hash, is_held_out

ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}


def conversation(*turns, id=""):
    """`conversation("u:question", "a:answer")`."""
    messages = tuple(Message(ROLES[turn[0]], turn[2:]) for turn in turns)
    return Conversation(id, messages, "test")


def cleaned(*turns):
    """Turns after cleaning, and the rules that changed or dropped something."""
    counts = CleaningCounts()
    result = clean(conversation(*turns), counts)
    applied = {name for name, n in (counts.changed + counts.dropped).items() if n}
    if result is None:
        return None, applied
    return [f"{m.role[0]}:{m.content}" for m in result.messages], applied


def test_a_clean_conversation_stays_as_it_is():
    turns = ["s:be kind", "u:1 / 3 is what?", "a:0.333…", "u:thanks", "a:Copy code from there."]
    assert cleaned(*turns) == (turns, set())


@pytest.mark.parametrize(
    ("turns", "expected", "rule"),
    [
        (["a:hello", "u:q", "a:r"], ["u:q", "a:r"], "leading_assistant_turns"),
        (["s:x", "a:hi", "u:q", "a:r"], ["s:x", "u:q", "a:r"], "leading_assistant_turns"),
        (["u:q", "a: ", "a:r"], ["u:q", "a:r"], "blank_turns"),
        (["u:q", "u:p", "a:r", "a:t"], ["u:q\n\np", "a:r\n\nt"], "repeated_roles"),
        (["u:q", "a:r", "u:and?"], ["u:q", "a:r"], "unanswered_turn"),
        (["u:q", "s:x", "a:r"], ["u:q", "a:r"], "late_system_turns"),
        (["u: q\n", "a:r"], ["u:q", "a:r"], "white_space"),
        (["u:q\u200b\ufeff", "a:co\u00adop"], ["u:q", "a:coop"], "invisible_characters"),
        (["u:q\ud800", "a:r"], ["u:q", "a:r"], "broken_characters"),
        (["u:bash\nCopy code\nls", "a:r"], ["u:bash\nls", "a:r"], "ui_residue"),
        (["u:sqlCopy codeSELECT 1", "a:r"], ["u:sql\nSELECT 1", "a:r"], "ui_residue"),
        (["u:```pyCopy code\nx = 1", "a:r"], ["u:```py\nx = 1", "a:r"], "ui_residue"),
        (["u:answer:\n2 / 2\nit is", "a:r"], ["u:answer:\nit is", "a:r"], "ui_residue"),
        (["u:my sourcesShare Prompt", "a:r"], ["u:my sources", "a:r"], "ui_residue"),
    ],
)
def test_rule_mends(turns, expected, rule):
    result, applied = cleaned(*turns)
    assert result == expected
    assert rule in applied


@pytest.mark.parametrize(
    ("turns", "rule"),
    [
        ([], "empty"),
        (["u:q"], "unanswered_turn"),
        (["a:r", "a:s"], "leading_assistant_turns"),
        (["s:x", "a:r"], "leading_assistant_turns"),
        (["s:x"], "leading_assistant_turns"),
        (["u: ", "a:\u200b"], "blank_turns"),
        (["a:r", "u:q"], "unanswered_turn"),
    ],
)
def test_rule_drops(turns, rule):
    result, applied = cleaned(*turns)
    assert result is None
    assert rule in applied


@pytest.mark.parametrize(
    "text",
    [
        "```ruby\nbegin\n  1 / 0\nrescue",
        "1 / 0",
        "Premium (20 / 1,500 words)",
        "3 / 2",
        "the `Copy code` button",
        "family \U0001f468\u200d\U0001f469",
        "نمی\u200cخواهم",
    ],
)
def test_what_only_looks_like_residue_stays(text):
    assert cleaned(f"u:{text}", "a:r") == ([f"u:{text}", "a:r"], set())


def test_real_conversations_come_out_well_formed(real_conversations):
    for one in real_conversations:
        roles = [message.role for message in one.messages]
        assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
        assert all(m.content == m.content.strip() != "" for m in one.messages)


def many(count):
    return [conversation(f"u:question {i}", f"a:answer {i}", id=f"c{i}") for i in range(count)]


def selected(conversations, limit, seed=0):
    selection = Selection(limit, seed)
    for one in conversations:
        selection.add(one)
    return [one for _, one in selection.ordered()]


def test_selection_does_not_depend_on_order_nor_on_the_limit():
    given = many(300)
    shuffled = random.Random(1).sample(given, k=len(given))
    few, all_of_them = selected(given, 40), selected(given, None)
    assert len(few) == 40
    assert selected(shuffled, 40) == few
    assert all_of_them[:40] == few
    assert sorted(one.id for one in all_of_them) == sorted(one.id for one in given)
    assert selected(given, 40, seed=1) != few


def test_selection_is_stable_under_growth():
    before = {one.id for one in selected(many(300), 40)}
    after = {one.id for one in selected(many(330), 40)}
    assert after - before <= {f"c{i}" for i in range(300, 330)}
    assert len(after & before) >= 25


def test_duplicates_are_dropped_whatever_their_order():
    twin_a = conversation("u:same", "a:same", id="a")
    twin_b = conversation("u:same", "a:same", id="b")
    for order in ([twin_a, twin_b], [twin_b, twin_a]):
        selection = Selection(5, seed=0)
        for one in [*order, *many(3)]:
            selection.add(one)
        assert selection.num_duplicates == 1
        assert {one.id for _, one in selection.ordered()} == {"a", "c0", "c1", "c2"}


def test_ids_are_unique_and_never_empty():
    given = [
        conversation("u:1", "a:1", id="x"),
        conversation("u:2", "a:2", id="x"),
        conversation("u:3", "a:3"),
    ]
    ids = [one.id for one in selected(given, None)]
    assert len(set(ids)) == 3
    assert "x" in ids
    assert content_hash(given[2]) in ids


def test_held_out_share_is_met_and_independent_of_selection():
    given = many(4000)
    taken = selected(given, 2000)
    for group in (given, taken):
        share = sum(is_held_out(content_hash(one), 0.1, 0) for one in group) / len(group)
        # Binomial: four standard deviations of 2,000 draws are 0.027.
        assert abs(share - 0.1) < 0.027
    assert not any(is_held_out(content_hash(one), 0.0, 0) for one in given)
