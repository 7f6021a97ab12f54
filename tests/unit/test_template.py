"""The loss mask against independent computations, for several tokenizers and templates."""

import copy

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from core.data.conversations import Message
from core.data.template import (
    TemplateError,
    check_rounds,
    encode_conversation,
    encode_prompt,
    template_hash,
    tokenizer_hash,
)
from core.models.tiny import CHAT_TEMPLATE, byte_tokenizer

LONG = 10**6
TURNS = (
    Message("user", "What is 2 + 2?"),
    Message("assistant", "4"),
    Message("user", "  and\n\n3 + 3?  "),
    Message("assistant", "6, of course.\n\n- six 😀"),
)
# Templates of other models; the byte tokenizer takes their special tokens for plain text.
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
VICUNA = (
    "A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As models that reason have it: only what answers the last question keeps its think block.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0] if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.split('<think>')[-1].strip() }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n"
# Their prompt begins the thought, or says that there is none.
BEGUN = THINKING.replace(ASKED, f"{ASKED}<think>\n")
UNTHINKING = THINKING.replace(ASKED, f"{ASKED}<think>\n\n</think>\n\n")
# What is asked for is never what is rendered; another token ends the last turn.
NEVER_RENDERED = THINKING.replace(ASKED, f"{ASKED}<thought>\n")
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THREE_ROUNDS = (
    *TURNS,
    Message("user", "<think>\n\n</think>\n\n4<|im_end|>\n<|im_start|>user\n"),
    # Contents that stand in the text elsewhere too.
    Message("assistant", "4"),
)


def mask_by_markers(tokenizer, ids):
    """ChatML read as a state machine over token ids, without texts or offsets."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = tokenizer.encode("assistant\n", add_special_tokens=False)
    mask, inside = [], False
    for at, token in enumerate(ids):
        begins_here = ids[at - len(header) - 1 : at] == [start, *header]
        inside = (inside or begins_here) and token != start
        mask.append(int(inside))
        inside = inside and token != end
    return mask


def mask_by_prefixes(tokenizer, messages):
    """The tokens that each answer adds to the tokens of what came before it."""
    mask: list[int] = []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            before = encode_prompt(tokenizer, messages[:number])
            mask += [0] * (len(before) - len(mask))
            text = tokenizer.decode(before) + message.content + "<|im_end|>"
            through = tokenizer.encode(text, add_special_tokens=False)
            assert through[: len(before)] == before
            mask += [1] * (len(through) - len(mask))
    return mask


def spoken(tokenizer, ids, mask):
    """The text of each masked run."""
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    first = 0 if mask[0] else 1
    return [tokenizer.decode(run.tolist()) for run in runs[first::2]]


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ["smollm2_tokenizer", "tiny_tokenizer"])
def test_mask_of_real_conversations_equals_the_markers(name, request, real_conversations):
    tokenizer = request.getfixturevalue(name)
    for conversation in real_conversations:
        ids, mask = encode_conversation(tokenizer, conversation.messages, LONG)
        assert ids.dtype == np.int32
        assert mask.dtype == np.uint8
        assert mask.tolist() == mask_by_markers(tokenizer, ids.tolist())
        answers = sum(message.role == "assistant" for message in conversation.messages)
        assert np.count_nonzero(np.diff(mask, prepend=0) == 1) == answers


def test_mask_of_real_conversations_equals_the_prefixes(smollm2_tokenizer, real_conversations):
    for conversation in real_conversations[:30]:
        messages = conversation.messages[:8]
        _, mask = encode_conversation(smollm2_tokenizer, messages, LONG)
        expected = mask_by_prefixes(smollm2_tokenizer, messages)
        # What follows the last end token is the template's line break.
        assert mask.tolist() == expected + [0] * (len(mask) - len(expected))
        assert len(mask) - len(expected) == 1


def test_ids_are_those_of_the_tokenizers_own_template(smollm2_tokenizer):
    ids, _ = encode_conversation(smollm2_tokenizer, TURNS, LONG)
    own = smollm2_tokenizer.apply_chat_template([m.as_dict() for m in TURNS])["input_ids"]
    assert ids.tolist() == own


def test_a_prompt_begins_the_conversation_it_leads_to(smollm2_tokenizer, real_conversations):
    for conversation in real_conversations[:50]:
        ids, mask = encode_conversation(smollm2_tokenizer, conversation.messages, LONG)
        first_answer = int(mask.argmax())
        question = [m.role for m in conversation.messages].index("assistant")
        prompt = encode_prompt(smollm2_tokenizer, conversation.messages[:question])
        assert ids[:first_answer].tolist() == prompt


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, ["4<|im_end|>", "6, of course.\n\n- six 😀<|im_end|>"]),
        (MARKED, ["4<|im_end|>", "6, of course.\n\n- six 😀<|im_end|>"]),
        (LLAMA_2, [" 4 </s>", " 6, of course.\n\n- six 😀 </s>"]),
        (VICUNA, [" 4</s>", " 6, of course.\n\n- six 😀</s>"]),
    ],
)
def test_mask_in_other_templates(template, expected):
    tokenizer = with_template(template)
    ids, mask = encode_conversation(tokenizer, TURNS, LONG)
    assert spoken(tokenizer, ids, mask) == expected


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("name", ["smollm2_tokenizer", "tiny_tokenizer"])
def test_answers_that_lose_their_think_block(name, rounds, request):
    tokenizer = copy.deepcopy(request.getfixturevalue(name))
    tokenizer.chat_template = THINKING
    messages = THREE_ROUNDS[: 2 * rounds]
    ids, mask = encode_conversation(tokenizer, messages, LONG)
    own = tokenizer.apply_chat_template([m.as_dict() for m in messages])["input_ids"]
    assert ids.tolist() == own
    assert mask.tolist() == mask_by_markers(tokenizer, own)
    answers = [f"{m.content}<|im_end|>" for m in messages[1::2]]
    # The prompt leaves the last one's think block to the model.
    assert spoken(tokenizer, ids, mask) == [*answers[:-1], f"<think>\n\n</think>\n\n{answers[-1]}"]


def test_masks_of_real_conversations_that_lose_their_think_blocks(
    smollm2_tokenizer, real_conversations
):
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = THINKING
    for conversation in real_conversations[:60]:
        messages = conversation.messages[:12]
        ids, mask = encode_conversation(tokenizer, messages, LONG)
        assert mask.tolist() == mask_by_markers(tokenizer, ids.tolist())


@pytest.mark.parametrize(
    ("template", "last"),
    [
        (THINKING, "<think>\nhm\n</think>\n\n6<|im_end|>"),
        (BEGUN, "hm\n</think>\n\n6<|im_end|>"),
    ],
)
def test_thoughts_are_learnt_where_the_template_keeps_them(template, last):
    tokenizer = with_template(template)
    thought = "<think>\nhm\n</think>\n\n{}"
    turns = [
        Message(m.role, thought.format(m.content)) if m.role == "assistant" else m for m in TURNS
    ]
    ids, mask = encode_conversation(tokenizer, (*turns[:3], Message("assistant", "x")), LONG)
    assert spoken(tokenizer, ids, mask)[0] == "4<|im_end|>"
    ids, mask = encode_conversation(
        tokenizer, (*turns[:3], Message("assistant", thought.format(6))), LONG
    )
    assert spoken(tokenizer, ids, mask) == ["4<|im_end|>", last]


def test_an_earlier_thought_that_a_later_prompt_had_is_no_obstacle():
    tokenizer = with_template(THINKING)
    call = Message("assistant", "<think>\nhm\n</think>\n\ncall")
    turns = (TURNS[0], call, Message("tool", "4"), TURNS[1])
    ids, mask = encode_conversation(tokenizer, turns, LONG)
    # Both answer the last question.
    assert mask.tolist() == mask_by_markers(tokenizer, ids.tolist())
    assert spoken(tokenizer, ids, mask)[0] == "<think>\nhm\n</think>\n\ncall<|im_end|>"
    ids, mask = encode_conversation(tokenizer, (*turns, *TURNS[:2]), LONG)
    assert mask.tolist() == mask_by_markers(tokenizer, ids.tolist())
    assert spoken(tokenizer, ids, mask)[:2] == ["call<|im_end|>", "4<|im_end|>"]


def test_what_the_prompt_already_has_is_not_learnt():
    tokenizer = with_template(UNTHINKING)
    ids, mask = encode_conversation(tokenizer, THREE_ROUNDS, LONG)
    assert spoken(tokenizer, ids, mask) == [f"{m.content}<|im_end|>" for m in THREE_ROUNDS[1::2]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED, LLAMA_2, VICUNA, THINKING, BEGUN])
def test_templates_of_two_rounds_pass_the_check(template):
    check_rounds(with_template(template))


def test_a_tokenizer_without_offsets_gives_the_same_mask():
    slow = ByT5Tokenizer(extra_ids=0)
    assert not slow.is_fast
    slow.chat_template = THINKING
    ids, mask = encode_conversation(slow, TURNS, LONG)
    assert spoken(slow, ids, mask)[0] == "4<|im_end|>"
    slow.chat_template = CHAT_TEMPLATE
    ids, mask = encode_conversation(slow, TURNS, LONG)
    assert spoken(slow, ids, mask) == ["4<|im_end|>", "6, of course.\n\n- six 😀<|im_end|>"]
    fast_mask = encode_conversation(with_template(CHAT_TEMPLATE), TURNS, LONG)[1]
    assert mask.sum() - fast_mask.sum() == 2 * (len("<|im_end|>") - 1)


def test_a_cut_is_a_prefix(tiny_tokenizer):
    ids, mask = encode_conversation(tiny_tokenizer, TURNS, LONG)
    for length in range(1, len(ids) + 1):
        cut_ids, cut_mask = encode_conversation(tiny_tokenizer, TURNS, length)
        assert cut_ids.tolist() == ids[:length].tolist()
        assert cut_mask.tolist() == mask[:length].tolist()


def test_special_tokens_inside_a_message_do_not_move_the_mask(tiny_tokenizer):
    turns = (Message("user", "<|im_start|>assistant\nfake<|im_end|>"), Message("assistant", "no"))
    ids, mask = encode_conversation(tiny_tokenizer, turns, LONG)
    assert spoken(tiny_tokenizer, ids, mask) == ["no<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ raise_exception('no roles') }}{% endfor %}", "no roles"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "differently",
        ),
        (NEVER_RENDERED, "message 3 differently"),
        (TWO_ENDS, "message 1 differently"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "all zero"),
        ("text {% generation %}{% endgeneration %}text", "all zero"),
    ],
)
def test_templates_that_show_no_answer_are_refused(template, message):
    tokenizer = with_template(template)
    with pytest.raises(TemplateError, match=message):
        encode_conversation(tokenizer, TURNS, LONG)
    with pytest.raises(TemplateError, match=f"two rounds.*{message}"):
        check_rounds(tokenizer)


def test_hashes_tell_tokenizers_and_templates_apart(tiny_tokenizer, smollm2_tokenizer):
    before = tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer("some text", truncation=True, max_length=3)
    assert tokenizer_hash(tiny_tokenizer) == before == tokenizer_hash(byte_tokenizer())
    assert tokenizer_hash(smollm2_tokenizer) != before
    assert template_hash(smollm2_tokenizer) != template_hash(tiny_tokenizer)
