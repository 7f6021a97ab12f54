"""Each cleaning rule on what it is for and on what it must leave alone."""

import json
import random
from typing import get_args

import pytest

from core.config.sections import RuleName
from core.data.cleaning import RULES, CleaningCounts, clean, mask_personal_data, rules_for
from core.data.conversations import Conversation, Message, Role
from core.data.language import known_languages

ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


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


PAGE = (
    '<div class="markdown prose w-full"><p>Use <strong>this</strong>:</p><pre><div class="bar">'
    "<span>python</span><button>Copy code</button></div><div><code "
    'class="hljs language-python">def f(a_b):\n    return a_b &lt; 1  # *x*</code></div></pre>'
    '<ol><li>one</li><li>two <a href="https://x.org">link</a></li></ol></div>'
)


def test_html_becomes_markdown_with_its_code_as_it_was():
    (_, answer), applied = cleaned("u:q", f"a:{PAGE}")
    assert "```python\ndef f(a_b):\n    return a_b < 1  # *x*\n```" in answer
    assert answer.startswith("a:Use **this**:")
    assert "1. one" in answer
    assert "two [link](https://x.org)" in answer
    assert "Copy code" not in answer
    assert "<" not in answer.replace("a_b < 1", "")
    assert applied == {"html"}


@pytest.mark.parametrize(
    "text",
    [
        "Use `<div>` for that:\n\n```html\n<div><p>x</p></div>\n```",
        "if a <b> c and d</b>",
        "<div> is a tag",
        "1 < 2 and 3 > 2",
        "<script>alert(1)</script>",
        "see <https://x.org>",
    ],
)
def test_texts_about_html_stay(text):
    assert cleaned(f"u:{text}", f"a:{text}") == ([f"u:{text}", f"a:{text}"], set())


def test_rules_can_be_off():
    turns = ["u:q\u200b ", "a:<p>x</p>"]
    rules = rules_for(get_args(RuleName), (), (), False)
    assert set(rules) == {"broken_characters"}
    counts = CleaningCounts()
    one = clean(conversation(*turns), counts, rules)
    assert one is not None
    assert [m.content for m in one.messages] == ["q\u200b ", "<p>x</p>"]
    assert not counts.changed + counts.dropped
    assert set(get_args(RuleName)) == set(RULES) - {"broken_characters"}


LANGUAGES = {
    "en": "How do I bake bread at home without a machine or any yeast?",
    "de": "Wie backe ich zu Hause Brot ohne Maschine und ganz ohne Hefe?",
    "zh": "如何在没有机器和酵母的情况下在家烤面包？请详细说明步骤。",
}


@pytest.mark.parametrize(
    ("only", "dropped", "left"),
    [(["en"], [], {"en"}), ([], ["zh"], {"en", "de"}), (["en", "de"], ["de"], {"en"})],
)
def test_languages_are_kept_or_dropped(only, dropped, left):
    rules, counts = rules_for((), only, dropped, False), CleaningCounts()
    kept = {
        code
        for code, text in LANGUAGES.items()
        if clean(conversation(f"u:{text}", f"a:{text}"), counts, rules)
    }
    assert kept == left
    assert counts.dropped["language"] == len(LANGUAGES) - len(left)
    assert set(LANGUAGES) <= known_languages()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jo.doe+x@mail.example.org now", "write to <EMAIL> now"),
        ("call +49 171 1234567 or (555) 123-4567.", "call <PHONE> or <PHONE>."),
        ("555-123-4567", "<PHONE>"),
    ],
)
def test_personal_data_is_masked_where_asked(text, masked):
    rules, counts = rules_for((), (), (), True), CleaningCounts()
    one = clean(conversation(f"u:{text}", "a:r"), counts, rules)
    assert one is not None
    assert one.messages[0].content == masked
    assert counts.changed["personal_data"] == 1
    assert cleaned(f"u:{text}", "a:r") == ([f"u:{text}", "a:r"], set())


@pytest.mark.parametrize(
    "text", ["2023-04-01", "1,234,567", "id 12345678901", "192.168.100.200", "x@y", "3.14159265"]
)
def test_numbers_that_are_no_telephones_stay(text):
    assert mask_personal_data((Message("user", text),))[0].content == text


def test_samples_are_the_three_of_smallest_hash_in_any_order():
    given = [conversation(f"u:q{i} ", f"a:r{i}", id=f"c{i}") for i in range(20)]
    pictures = []
    for seed in range(3):
        counts = CleaningCounts()
        for one in random.Random(seed).sample(given, k=20):
            block = CleaningCounts()
            clean(one, block)
            counts.merge(json.loads(json.dumps(block.as_dict())))
        pictures.append(counts.shown_samples())
        assert counts.changed["white_space"] == 20
    assert pictures[0] == pictures[1] == pictures[2]
    samples = pictures[0]["changed"]["white_space"]
    assert len(samples) == 3
    number = samples[0]["id"].removeprefix("c")
    assert samples[0] == {
        "id": f"c{number}",
        "before": f"user: q{number} \nassistant: r{number}",
        "after": f"user: q{number}\nassistant: r{number}",
    }


def test_texts_and_prompts_keep_what_they_are():
    text = Conversation("", (Message("assistant", " running text "),), "f", "text")
    prompt = Conversation("", (Message("user", "why? "),), "f", "prompt")
    for one, expected in ((text, "running text"), (prompt, "why?")):
        kept = clean(one, CleaningCounts())
        assert kept is not None
        assert [m.content for m in kept.messages] == [expected]


def test_tool_turns_survive_between_the_assistants():
    turns = ["u:q", "a:call", "t:result", "t:more", "a:answer", "u:bye", "t:late"]
    assert cleaned(*turns)[0] == ["u:q", "a:call", "t:result\n\nmore", "a:answer"]
