"""Shards of examples: what is written is read, bytes are stable, faults are named."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from core.data.conversations import Conversation, Message
from core.data.examples import (
    SCHEMA,
    Example,
    ExampleMetadata,
    ShardWriter,
    example_shards,
    read_examples,
    read_footer,
    read_metadata,
    verify_examples,
    write_examples,
)
from core.data.inspection import coloured, show_examples, verify_folder
from core.data.prompts import (
    Prompt,
    PromptPool,
    prompts_of,
    questions_of,
    read_prompts,
    write_prompts,
)
from core.data.template import encode_conversation, template_hash, tokenizer_hash
from core.errors import InputError, MismatchError

METADATA = ExampleMetadata("train", "t0", "c0", 64, {"dropped": {"empty": 2}, "changed": {}})


def example(length, name="a", supervised=1):
    ids = np.arange(length, dtype=np.int32)
    mask = np.zeros(length, dtype=np.uint8)
    mask[length - supervised :] = 1
    return Example(name, ids, mask, "file.json", 2)


def as_values(one):
    return (one.id, one.input_ids_T.tolist(), one.loss_mask_T.tolist(), one.source, one.num_turns)


def test_round_trip(tmp_path):
    path = tmp_path / "shard-00000.parquet"
    written = [example(5), example(1, "b"), example(64, "ü", supervised=60)]
    write_examples(path, written, METADATA)
    read = read_examples(path)
    assert [as_values(one) for one in read] == [as_values(one) for one in written]
    assert read[0].input_ids_T.dtype == np.int32
    assert read[0].loss_mask_T.dtype == np.uint8
    assert read_metadata(path) == METADATA
    assert verify_examples(path) == (3, 70, 62)
    assert pq.read_schema(path).equals(SCHEMA)


def test_same_examples_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_examples(tmp_path / name, [example(5), example(9, "b")], METADATA)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_writer_fills_shards_and_divides_no_example(tmp_path):
    writer = ShardWriter(tmp_path / "train", METADATA, shard_tokens=30)
    for index in range(10):
        writer.add(example(11, f"e{index}"))
    writer.flush()
    shards = example_shards(tmp_path, "train")
    assert [shard.name for shard in shards] == [f"shard-{i:05d}.parquet" for i in range(4)]
    assert [len(read_examples(shard)) for shard in shards] == [3, 3, 3, 1]
    assert [one.id for s in shards for one in read_examples(s)] == [f"e{i}" for i in range(10)]
    assert (writer.num_examples, writer.num_tokens, writer.longest) == (10, 110, 11)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (example(5, supervised=0), "all-zero loss mask"),
        (example(65), "more than data.max_length=64"),
        (dataclasses.replace(example(5), loss_mask_T=np.ones(4, np.uint8)), "mask of 4"),
        (dataclasses.replace(example(5), loss_mask_T=np.full(5, 2, np.uint8)), "other values"),
        (dataclasses.replace(example(5), input_ids_T=np.full(5, -1, np.int32)), "negative"),
    ],
)
def test_verify_names_the_faulty_example(tmp_path, wrong, message):
    path = tmp_path / "shard-00000.parquet"
    write_examples(path, [example(5), dataclasses.replace(wrong, id="wrong one")], METADATA)
    with pytest.raises(InputError, match=rf"'wrong one'.*{message}"):
        verify_examples(path)


def test_files_that_are_no_shards(tmp_path):
    garbage, other = tmp_path / "garbage.parquet", tmp_path / "other.parquet"
    garbage.write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"x": [1]}), other)
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(garbage)
    with pytest.raises(InputError, match=r"garbage\.parquet: cannot be read"):
        read_footer(garbage)
    with pytest.raises(InputError, match="expected the columns"):
        read_examples(other)
    with pytest.raises(InputError, match="format None"):
        read_metadata(other)
    with pytest.raises(InputError, match="has no 'train' examples"):
        example_shards(tmp_path, "train")


def test_verify_folder_misses_a_shard(tmp_path):
    writer = ShardWriter(tmp_path / "train", METADATA, shard_tokens=10)
    for _ in range(3):
        writer.add(example(10))
    assert "3 shards, 3 examples, 30 tokens, 3 supervised" in verify_folder(tmp_path, "train")
    (tmp_path / "train" / "shard-00001.parquet").unlink()
    with pytest.raises(InputError, match="shard 1 is missing"):
        verify_folder(tmp_path, "train")


def test_inspection_colours_what_the_assistant_says(tmp_path, tiny_tokenizer, smollm2_tokenizer):
    turns = (Message("user", "[b]hi[/b]"), Message("assistant", "hello"))
    ids, mask = encode_conversation(tiny_tokenizer, turns, 64)
    one = Example("one", ids, mask, "f", 2)
    text = coloured(one, tiny_tokenizer)
    by_style = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert by_style["bold green"] == "hello<|im_end|>"
    assert text.plain == tiny_tokenizer.decode(ids.tolist())
    metadata = dataclasses.replace(
        METADATA,
        tokenizer_hash=tokenizer_hash(tiny_tokenizer),
        template_hash=template_hash(tiny_tokenizer),
    )
    writer = ShardWriter(tmp_path / "train", metadata, 10)
    writer.add(one)
    console = Console(record=True, width=100)
    show_examples(tmp_path, tiny_tokenizer, 5, console=console)
    assert "[b]hi[/b]" in console.export_text()
    with pytest.raises(MismatchError, match="another tokenizer"):
        show_examples(tmp_path, smollm2_tokenizer, 1)


def test_prompts_of_a_conversation():
    system, q1, a1, q2, a2 = (
        Message("system", "s"),
        Message("user", "q1"),
        Message("assistant", "a1"),
        Message("user", "q2"),
        Message("assistant", "a2"),
    )
    both = prompts_of(Conversation("id", (system, q1, a1, q2, a2), "x"))
    assert both == (
        Prompt("id/1", "first_turn", (system, q1)),
        Prompt("id/2", "follow_up", (system, q1, a1, q2)),
    )
    assert prompts_of(Conversation("id", (q1, a1), "x")) == (Prompt("id/1", "first_turn", (q1,)),)


def test_prompts_round_trip_with_every_line_separator(tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = [Prompt("a/1", "first_turn", (Message("user", "x\u2028y\u0085z\n ü"),))]
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts


@pytest.mark.parametrize(
    "line",
    ["42", "{", '{"id": "a", "task": "t"}', '{"id": 1, "task": "t", "messages": []}',
     '{"id": "a", "task": "t", "messages": [{"role": "robot", "content": "x"}]}',
     '{"id": "a", "task": "t", "messages": [{"role": "user", "content": 3}]}',
     '{"question_id": 1, "turns": ["x"]}', '{"question_id": 1, "category": "qa", "turns": []}',
     '{"question_id": 1, "category": "qa", "turns": ["x", ""]}', '{"prompt": ""}', '""',
     '{"question_id": null, "category": "qa", "turns": ["x"]}'],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a", "task": "t", "messages": [{"role": "user", "content": "x"}]}\n' + line
    )
    with pytest.raises(InputError, match="line 2"):
        read_prompts(path)


def test_question_files_and_plain_prompts_are_read_too(tmp_path):
    questions, plain = tmp_path / "question.jsonl", tmp_path / "plain.jsonl"
    questions.write_text(
        '{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], '
        '"reference": ["a", "b"]}\n'
        '{"question_id": 81, "category": "summarization", "turns": ["Sum up."]}\n'
    )
    plain.write_text('"Who?"\n\n{"prompt": "Why?", "id": "why"}\n')
    ask, sum_up = Message("user", "Write."), Message("user", "Sum up.")
    assert read_prompts(questions, plain) == [
        Prompt("writing/81", "mt_bench", (ask,), ("Again.",), "writing"),
        Prompt("summarization/81", "summarization", (sum_up,), (), "summarization"),
        Prompt("plain/1", "plain", (Message("user", "Who?"),)),
        Prompt("why", "plain", (Message("user", "Why?"),)),
    ]  # fmt: skip


def test_a_turn_is_asked_on_top_of_the_answers_before_it():
    prompt = Prompt("q", "t", (Message("user", "1"),), ("2", "3"))
    assert prompt.ids() == ["q/1", "q/2", "q/3"]
    assert prompt.ids(2) == ["q/1", "q/2"] and prompt.ids(1) == ["q"]
    assert [(m.role, m.content) for m in prompt.after(["a"])] == [
        ("user", "1"), ("assistant", "a"), ("user", "2"),
    ]  # fmt: skip
    assert prompt.after([]) == prompt.messages


def test_two_prompts_of_one_name_are_refused(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    line = '{"question_id": 1, "category": "qa", "turns": ["x", "y"]}\n'
    one.write_text(line), two.write_text(line)
    with pytest.raises(InputError, match=r"two.jsonl, line 1: id='qa/1' .* in .*one.jsonl"):
        read_prompts(one, two)
    # A turn's name counts too: results are kept by it.
    two.write_text('{"prompt": "z", "id": "qa/1/2"}')
    with pytest.raises(InputError, match=r"id='qa/1/2' has been used before"):
        read_prompts(one, two)


def test_prompts_that_training_has_seen_are_left_out(tmp_path):
    pool = PromptPool(tmp_path / "candidates.jsonl", max_tokens=50)

    def asks(name, first, lengths=None):
        turns = (
            ("user", first),
            ("assistant", "a"),
            ("user", f"{first} again"),
            ("assistant", "b"),
        )
        one = Conversation(name, tuple(Message(*turn) for turn in turns), "x")
        if lengths is None:
            pool.saw(questions_of(one))
        else:
            pool.offer(questions_of(one), zip(prompts_of(one), lengths, strict=True))

    asks("both fit", "1", [10, 50])
    asks("first fits", "2", [10, 51])
    asks("trained first", "3", [10, 10])
    asks("trained later", "4 again", [10, 10])
    asks("asked before", "1", [10, 10])
    asks("too long", "5", [51, 52])
    asks("training", "3")
    asks("training too", "4")
    assert pool.write(tmp_path / "prompts.jsonl") == 3
    found = [p.id for p in read_prompts(tmp_path / "prompts.jsonl")]
    assert found == ["both fit/1", "both fit/2", "first fits/1"]
