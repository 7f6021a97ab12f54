"""Long conversations: divided between rounds, cut only where one round alone is too long."""

import random

import pytest

from core.data.conversations import Conversation, Message
from core.data.splitting import encode_parts
from core.data.template import encode_conversation

LONG = 2**31 - 1


def chat(*lengths, system=False):
    """Rounds of a question of ten bytes and an answer of so many."""
    messages = [Message("system", "be kind")] if system else []
    for number, length in enumerate(lengths):
        messages.append(Message("user", f"question {number % 10}"))
        messages.append(Message("assistant", f"{number % 10}" * length))
    return Conversation("c", tuple(messages), "f")


def answers(tokenizer, part):
    """What the assistant says in a part, turn by turn."""
    spoken = tokenizer.decode(part.input_ids_T[part.loss_mask_T == 1])
    return [text for text in spoken.split("<|im_end|>") if text]


@pytest.mark.parametrize("system", [False, True])
def test_every_answer_is_whole_and_in_one_part(tiny_tokenizer, system):
    rng = random.Random(4)
    for _ in range(30):
        one = chat(*(rng.randrange(1, 120) for _ in range(rng.randrange(1, 12))), system=system)
        whole, _ = encode_conversation(tiny_tokenizer, one.messages, LONG)
        parts = encode_parts(tiny_tokenizer, one, 260)
        assert (len(parts) == 1) == (len(whole) <= 260)
        assert not any(part.cut for part in parts)
        given = [m.content for m in one.messages if m.role == "assistant"]
        assert [text for part in parts for text in answers(tiny_tokenizer, part)] == given
        for part in parts:
            assert len(part.input_ids_T) == len(part.loss_mask_T) <= 260
            text = tiny_tokenizer.decode(part.input_ids_T)
            assert text.startswith("<|im_start|>" + ("system" if system else "user"))
            assert part.num_turns == text.count("<|im_start|>")


def test_as_many_rounds_as_fit_go_together(tiny_tokenizer):
    one = chat(*[20] * 12)
    alone = len(encode_conversation(tiny_tokenizer, chat(20).messages, LONG)[0])
    # Exactly three rounds, one token less than four, exactly four.
    assert [p.num_turns for p in encode_parts(tiny_tokenizer, one, 3 * alone)] == [6] * 4
    assert [p.num_turns for p in encode_parts(tiny_tokenizer, one, 4 * alone - 1)] == [6] * 4
    assert [p.num_turns for p in encode_parts(tiny_tokenizer, one, 4 * alone)] == [8] * 3


def test_only_an_answer_that_is_too_long_alone_is_cut(tiny_tokenizer):
    parts = encode_parts(tiny_tokenizer, chat(20, 500, 30), 200)
    assert [part.cut for part in parts] == [False, True, False]
    assert [len(part.input_ids_T) for part in parts][1] == 200
    assert answers(tiny_tokenizer, parts[0]) == ["0" * 20]
    assert set(answers(tiny_tokenizer, parts[1])[0]) == {"1"}
    assert answers(tiny_tokenizer, parts[2]) == ["2" * 30]
    (cut,) = encode_parts(tiny_tokenizer, chat(20, 500, 30), 200, split=False)
    assert cut.cut
    assert (len(cut.input_ids_T), cut.num_turns) == (200, 6)


@pytest.mark.parametrize("system", [False, True])
def test_a_question_loses_its_beginning_before_an_answer_is_cut(tiny_tokenizer, system):
    """An answer that fits alone is whole, whatever was asked; the question ends as it did."""
    head = (Message("system", "be kind"),) if system else ()
    first = chat(20).messages
    for asked, answered in ((400, 2), (120, 100), (60, 130)):
        question = Message("user", "".join(chr(97 + n % 26) for n in range(asked)))
        round_ = (question, Message("assistant", "n" * answered))
        one = Conversation("c", (*head, *first, *round_, *first), "f")
        parts = encode_parts(tiny_tokenizer, one, 200)
        assert [part.shortened for part in parts] == [False, True, False]
        assert not any(part.cut for part in parts)
        assert answers(tiny_tokenizer, parts[1]) == ["n" * answered]
        text = tiny_tokenizer.decode(parts[1].input_ids_T)
        assert question.content[-10:] + "<|im_end|>" in text
        assert ("be kind" in text) == system
        # No more than it takes, up to the few characters that a token may have.
        assert 190 <= len(parts[1].input_ids_T) <= 200


def test_tool_rounds_stay_together(tiny_tokenizer):
    one = Conversation(
        "c",
        (
            Message("user", "q1"),
            Message("assistant", "call" * 20),
            Message("tool", "result" * 10),
            Message("assistant", "done" * 10),
            Message("user", "q2"),
            Message("assistant", "bye" * 20),
        ),
        "f",
    )
    parts = encode_parts(tiny_tokenizer, one, 290)
    assert [part.num_turns for part in parts] == [4, 2]
    assert answers(tiny_tokenizer, parts[0]) == ["call" * 20, "done" * 10]


def test_of_a_tool_round_that_is_too_long_the_first_answers_stay(tiny_tokenizer):
    call, result = Message("assistant", "call" * 20), Message("tool", "result" * 50)
    one = Conversation("c", (Message("user", "q1"), call, result, *chat(9).messages[1:]), "f")
    (part,) = encode_parts(tiny_tokenizer, one, 200)
    assert (part.num_turns, part.cut, part.shortened, part.left_out) == (2, False, False, 1)
    assert answers(tiny_tokenizer, part) == ["call" * 20]


def test_an_answer_that_is_too_long_keeps_its_beginning_whatever_was_asked(tiny_tokenizer):
    one = Conversation("c", (Message("user", "y" * 400), Message("assistant", "n" * 500)), "f")
    (part,) = encode_parts(tiny_tokenizer, one, 200)
    assert (part.cut, part.shortened, len(part.input_ids_T)) == (True, True, 200)
    assert 100 <= int(part.loss_mask_T.sum()) < 120


def test_a_system_message_that_is_too_long_leaves_nothing_to_learn(tiny_tokenizer):
    system = Message("system", "be kind " * 50)
    one = Conversation("c", (system, *chat(20, 30).messages), "f")
    parts = encode_parts(tiny_tokenizer, one, 200)
    assert [(len(part.input_ids_T), int(part.loss_mask_T.sum())) for part in parts] == [
        (200, 0)
    ] * 2


SCRIPTS = (
    "the quick brown fox ",
    "def f(x):\n    return x\n",
    "\u6211\u5011\u4eca\u5929",
    "\U0001f600 ",
    "  \n",
)


def test_answers_are_whole_wherever_one_character_is_asked_enough(smollm2_tokenizer):
    """Random rounds in scripts of very different numbers of characters a token."""
    rng = random.Random(11)

    def text(longest):
        pieces = (rng.choice(SCRIPTS) * rng.randrange(1, 60) for _ in range(rng.randrange(1, 5)))
        return ("".join(pieces)[: rng.randrange(1, longest)]).strip() or "x"

    seen = set()
    for _ in range(60):
        question, answer = Message("user", text(3000)), Message("assistant", text(700))
        limit = rng.randrange(60, 400)
        (part,) = encode_parts(smollm2_tokenizer, Conversation("c", (question, answer), "f"), limit)
        least = encode_conversation(
            smollm2_tokenizer, (Message("user", question.content[-1:]), answer), LONG
        )[0]
        assert part.cut == (len(least) > limit)
        assert part.loss_mask_T.any() and len(part.input_ids_T) <= limit
        seen.add((part.cut, part.shortened))
        if not part.cut:
            assert answers(smollm2_tokenizer, part) == [answer.content]
            # The rest of what was asked would not have fitted.
            assert not part.shortened or len(part.input_ids_T) > limit - 8
    assert len(seen) == 4


def test_running_text_is_supervised_whole(tiny_tokenizer):
    text = Conversation("t", (Message("assistant", "x" * 250),), "f", "text")
    parts = encode_parts(tiny_tokenizer, text, 100)
    assert [len(part.input_ids_T) for part in parts] == [100, 100, 51]
    assert all(part.loss_mask_T.all() for part in parts)
    assert parts[-1].input_ids_T[-1] == tiny_tokenizer.eos_token_id
    (cut,) = encode_parts(tiny_tokenizer, text, 100, split=False)
    assert cut.cut
    assert len(cut.input_ids_T) == 100
