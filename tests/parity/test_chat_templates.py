"""The built-in templates: their published texts, and their masks on real conversations.

The mask is computed a second time without the code under test: each turn is written out alone by
a few lines for its family, its pieces are tokenized one by one, and those of the assistant count.
"""

import copy
from itertools import islice
from typing import get_args

import numpy as np
import pytest

from core.config.sections import TemplateName
from core.data.chat_templates import AUTO, BUILT_IN, NEEDS, use_template
from core.data.cleaning import CleaningCounts, clean
from core.data.conversations import Message
from core.data.formats import read_sharegpt
from core.data.records import read_records
from core.data.template import TemplateError, adapted, chat_template, encode_conversation, render
from core.errors import MismatchError
from core.models.tiny import byte_tokenizer

LONG = 2**31 - 1
CONVERSATIONS = 1000
# Long ones cost time and show nothing that shorter ones do not.
CHARACTERS = 2000
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def llama_2(system, turns, bos, eos):
    for number, (role, text) in enumerate(turns):
        if number == 0 and system:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        yield (f"{bos}[INST] {text} [/INST]", 0) if role == "user" else (f" {text} {eos}", 1)


def mixtral(system, turns, bos, eos):
    yield bos, 0
    for number, (role, text) in enumerate(turns):
        if number == 0 and system:
            text = f"{system}\n\n{text}"
        yield (f"[INST] {text} [/INST]", 0) if role == "user" else (f" {text}{eos}", 1)


def vicuna(system, turns, bos, eos):
    yield f"{bos}{system or VICUNA_SYSTEM}", 0
    for number, (role, text) in enumerate(turns):
        if role == "user":
            # A separator stands behind the system message, none behind an end token.
            yield f"{' ' if number == 0 else ''}USER: {text} ASSISTANT:", 0
        else:
            yield f" {text}{eos}", 1


def llama_3(system, turns, bos, eos):
    yield "<|begin_of_text|>", 0
    for role, text in [("system", system)] * bool(system) + turns:
        yield f"<|start_header_id|>{role}<|end_header_id|>", 0
        # This tokenizer parts white space before a word from its last character.
        yield from (("\n", 0), ("\n", 0))
        yield f"{text}<|eot_id|>", int(role == "assistant")


def chat_ml(usual):
    def pieces(system, turns, bos, eos):
        yield f"<|im_start|>system\n{system or usual}<|im_end|>\n", 0
        for role, text in turns:
            yield f"<|im_start|>{role}\n", 0
            yield f"{text}<|im_end|>", int(role == "assistant")
            yield "\n", 0

    return pieces


WRITERS = {
    "llama-2": llama_2,
    "mixtral": mixtral,
    "vicuna": vicuna,
    "llama-3": llama_3,
    "qwen-2": chat_ml("You are a helpful assistant."),
    AUTO: chat_ml(SMOLLM2_SYSTEM),
}


@pytest.fixture(scope="module")
def short_conversations(sharegpt_path):
    """A thousand real conversations, cleaned."""
    parsed = (read_sharegpt(r.parse(), "sharegpt") for r in read_records(sharegpt_path))
    kept = (clean(one, CleaningCounts()) for one in parsed)
    short = (c for c in kept if c and sum(len(m.content) for m in c.messages) < CHARACTERS)
    return list(islice(short, CONVERSATIONS))


def tokenizer_for(name, smollm2_tokenizer):
    """SmolLM2's vocabulary with the tokens of the family, without a template of its own."""
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    if name == AUTO:
        return tokenizer
    tokenizer.chat_template = None
    if needed := NEEDS[name]:
        tokenizer.add_special_tokens({"additional_special_tokens": list(needed)})
    else:
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    use_template(tokenizer, name)
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BUILT_IN, AUTO])
def test_masks_of_a_thousand_conversations(name, smollm2_tokenizer, short_conversations):
    tokenizer = tokenizer_for(name, smollm2_tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert len(short_conversations) == CONVERSATIONS
    for one in short_conversations:
        ids, mask = encode_conversation(tokenizer, one.messages, LONG)
        turns = [(m.role, m.content) for m in one.messages]
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        pieces = list(WRITERS[name](system, turns, bos, eos))
        encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
        expected = [bit for (_, bit), part in zip(pieces, encoded, strict=True) for _ in part]
        assert ids.tolist() == [token for part in encoded for token in part]
        assert mask.tolist() == expected
        assert mask.any()
        # What ends a turn is one token, and it is learnt.
        ends = np.flatnonzero(np.diff(mask.astype(np.int8), append=np.int8(0)) < 0)
        last = {"llama-3": "<|eot_id|>", "qwen-2": "<|im_end|>", AUTO: "<|im_end|>"}.get(name, eos)
        assert set(ids[ends].tolist()) == {tokenizer.convert_tokens_to_ids(last)}


SYSTEM, QUESTION = Message("system", "S"), Message("user", "Q")
ANSWER, RESULT = Message("assistant", "A"), Message("tool", "R")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama-2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] Q [/INST]"),
        ("mixtral", "<s>[INST] S\n\nQ [/INST] A</s>[INST] Q [/INST]"),
        ("vicuna", "<s>S USER: Q ASSISTANT: A</s>USER: Q ASSISTANT:"),
        (
            "llama-3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen-2",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_published_formats_with_a_system_message(name, text, smollm2_tokenizer):
    tokenizer = tokenizer_for(name, smollm2_tokenizer)
    messages = (SYSTEM, QUESTION, ANSWER, QUESTION)
    assert render(tokenizer, messages, generation_prompt=True) == text


def test_names_are_those_of_the_config():
    assert set(get_args(TemplateName)) == {AUTO, *BUILT_IN} == {AUTO, *NEEDS}


def test_a_family_that_is_not_the_tokenizers_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(MismatchError, match=r"no <\|begin_of_text\|>.*another of llama-2, vicuna"):
        use_template(tokenizer, "llama-3")
    tokenizer.eos_token = None
    with pytest.raises(MismatchError, match="no eos_token"):
        use_template(tokenizer, "vicuna")


def test_a_tokenizer_without_template_names_the_choices():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"target.template=llama-2\|vicuna\|mixtral\|llama-3\|"):
        chat_template(tokenizer)


CALLED = (QUESTION, ANSWER, RESULT, ANSWER)


def test_tool_answers_go_through_templates_that_take_them(tiny_tokenizer):
    assert adapted(tiny_tokenizer, CALLED) == CALLED
    ids, mask = encode_conversation(tiny_tokenizer, CALLED, LONG)
    assert "<|im_start|>tool\nR<|im_end|>" in tiny_tokenizer.decode(ids)
    assert tiny_tokenizer.decode(ids[mask == 1]) == "A<|im_end|>A<|im_end|>"


@pytest.mark.parametrize("name", BUILT_IN)
def test_tool_answers_are_marked_text_in_the_others(name, smollm2_tokenizer):
    tokenizer = tokenizer_for(name, smollm2_tokenizer)
    response = "<tool_response>\nR\n</tool_response>"
    assert adapted(tokenizer, CALLED)[2] == Message("user", response)
    merged = adapted(tokenizer, (QUESTION, ANSWER, RESULT, QUESTION, ANSWER))
    assert [m.content for m in merged] == ["Q", "A", f"{response}\n\nQ", "A"]
    ids, mask = encode_conversation(tokenizer, CALLED, LONG)
    assert response in tokenizer.decode(ids[mask == 0])
    assert "R" not in tokenizer.decode(ids[mask == 1])


def test_a_system_message_goes_into_the_question_where_there_is_no_place_for_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert adapted(tokenizer, (SYSTEM, QUESTION, ANSWER)) == (Message("user", "S\n\nQ"), ANSWER)
