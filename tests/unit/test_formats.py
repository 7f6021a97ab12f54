"""Every format's reader: what it makes of records, odd ones included, and what it refuses."""

import json
from typing import get_args

import pytest

from core.config.sections import FormatName
from core.data.conversations import RecordError
from core.data.formats import FORMATS, read_record


def read(value, name="auto"):
    """The format that was found, and the turns as `role: text`."""
    found, conversation = read_record(value, "file.json", name)
    return found, [f"{m.role}: {m.content}" for m in conversation.messages]


def test_the_config_names_every_format():
    assert set(get_args(FormatName)) == {"auto", *FORMATS}


def test_sharegpt_roles_are_mapped():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q"), ("bing", "a")]
    value = {"id": 7, "conversations": [{"from": f, "value": v} for f, v in turns]}
    name, conversation = read_record(value, "file.json")
    assert (name, conversation.id, conversation.source) == ("sharegpt", "7", "file.json")
    assert [m.role for m in conversation.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_sharegpt_tool_calls_are_the_assistants_and_results_the_tools():
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    assert read({"conversations": turns, "tools": '[{"name": "get"}]'}) == (
        "sharegpt",
        [
            'system: You can call these tools:\n<tools>\n[{"name": "get"}]\n</tools>',
            "user: weather?",
            'assistant: <tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>',
            "tool: rain",
            "assistant: It rains.",
        ],
    )


@pytest.mark.parametrize("category", ["IT", ["IT", "code"], None])
def test_pairs_whatever_the_category(category):
    value = {
        "conversation": [
            {"human": "q1", "assistant": "a1"},
            {"human": "q2", "assistant": "a2"},
        ],
        "category": category,
    }
    assert read(value) == ("pairs", ["user: q1", "assistant: a1", "user: q2", "assistant: a2"])


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, ["user: i", "assistant: o"]),
        ({"instruction": "i", "input": "n", "output": "o"}, ["user: i\n\nn", "assistant: o"]),
        ({"instruction": "i", "output": "o", "input": None}, ["user: i", "assistant: o"]),
        (
            {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
            ["system: s", "user: q", "assistant: a", "user: i", "assistant: o"],
        ),
        ({"prompt": "p", "completion": "c"}, ["user: p", "assistant: c"]),
        ({"question": "p", "answer": "c"}, ["user: p", "assistant: c"]),
    ],
)
def test_alpaca(value, turns):
    assert read(value) == ("alpaca", turns)


def test_openai_messages_with_parts_and_tool_calls():
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}, "type": "function"}
    value = {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "1"}, {"text": "and?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ]
    }
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert read(value) == (
        "messages",
        [
            "system: Be kind.",
            "user: 1\nand?",
            f"assistant: {called}\n{called}",
            "tool: 2",
            "assistant: Two.",
        ],
    )


def test_prompts_and_text_know_what_they_are_for():
    assert read_record("why?", "f")[1].kind == "prompt"
    assert read({"prompt": "why?"}) == ("prompt", ["user: why?"])
    name, text = read_record({"text": "Once upon a time."}, "f")
    assert (name, text.kind) == ("text", "text")


ROUNDS = [["ask", "q"], ["ans", "a"]]
ACTION = {
    "inner_thought": "Look.",
    "api_name": "find",
    "api_param": '{"k": 1}',
    "api_res": {"n": 2},
}
GDGPT = [
    ({"type": "pretrain", "text": "t"}, ["assistant: t"]),
    ({"type": "instruct", "instruct": "i", "output": "o"}, ["user: i", "assistant: o"]),
    (
        {"type": "instruct", "instruct": "i", "input": "n", "output": "o"},
        ["user: i\n\nn", "assistant: o"],
    ),
    ({"type": "conversation", "rounds": ROUNDS}, ["user: q", "assistant: a"]),
    (
        {
            "type": "conver_has_api",
            "api_desc": "find: finds",
            "rounds": [["ask", "q"], ["ans-api", {"actions": [ACTION], "ans": "done"}], *ROUNDS],
        },
        [
            "system: You can call these tools:\n<tools>\nfind: finds\n</tools>",
            "user: q",
            'assistant: Look.\n<tool_call>\n{"name": "find", "arguments": {"k": 1}}\n</tool_call>',
            'tool: {"n": 2}',
            "assistant: done",
            "user: q",
            "assistant: a",
        ],
    ),
    (
        {"type": "ref_qa", "reference": "Bees hum.", "rounds": ROUNDS},
        ["user: Answer according to this text.\n\nBees hum.\n\nq", "assistant: a"],
    ),
]


@pytest.mark.parametrize(("value", "turns"), GDGPT)
def test_gdgpt(value, turns):
    assert read(value) == ("gdgpt", turns)
    assert read(value, "gdgpt") == ("gdgpt", turns)
    assert read_record(value, "f")[1].kind == ("text" if value["type"] == "pretrain" else "chat")


@pytest.mark.parametrize(
    ("value", "name", "got"),
    [
        (42, "auto", "got 42"),
        (None, "auto", "got null"),
        ([1], "sharegpt", "got [1]"),
        ({"foo": 1}, "auto", 'got {"foo": 1}'),
        ({"conversations": "hello"}, "auto", '"hello" there'),
        ({"conversations": [3]}, "auto", "turn 0: expected 'from' and a text 'value', got 3"),
        ({"conversations": [{"from": "human"}]}, "auto", "turn 0: expected"),
        ({"conversations": [{"value": "x"}]}, "auto", "turn 0: expected"),
        ({"conversations": [{"from": "human", "value": None}]}, "auto", "turn 0"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "auto", "turn 0"),
        (
            {"conversations": [{"from": "gpt", "value": ""}, {"from": "alien", "value": "x"}]},
            "auto",
            'turn 1: from="alien"',
        ),
        ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, "auto", "no text"),
        ({"messages": [{"role": "user"}]}, "auto", "expected a text 'content'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 3}]}]}, "auto", "name"),
        ({"conversation": [{"person": "x"}]}, "auto", "turn 0: expected 'human'"),
        ({"instruction": 3, "output": "o"}, "auto", "instruction: expected a text, got 3"),
        ({"instruction": "i"}, "alpaca", "expected 'instruction' and 'output'"),
        ({"type": "poem"}, "gdgpt", 'type="poem" is none of'),
        ({"type": "conversation", "rounds": [["ask"]]}, "gdgpt", "round 0"),
        ({"type": "conversation", "rounds": [["sing", "x"]]}, "gdgpt", "expected ask, ans"),
        ({"type": "ref_qa", "rounds": ROUNDS}, "gdgpt", "reference: expected a text"),
        ({"instruction": "i", "output": "o"}, "sharegpt", "'conversations'"),
    ],
)
def test_a_value_that_is_no_conversation_says_what_it_is(value, name, got):
    with pytest.raises(RecordError) as caught:
        read(value, name)
    assert got in str(caught.value)


def test_arguments_that_are_no_json_stay_text():
    call = {"function": {"name": "run", "arguments": "not {json"}}
    value = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    written = read(value)[1][0].removeprefix("assistant: <tool_call>\n").split("\n")[0]
    assert json.loads(written) == {"name": "run", "arguments": "not {json"}
