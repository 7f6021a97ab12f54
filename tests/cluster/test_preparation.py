"""The stage prepare_data as a job: what it writes, counts, refuses and does not redo."""

import json
import random
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import load_config
from core.data.conversations import unpack_messages
from core.data.examples import example_shards, read_examples, read_metadata
from core.data.prompts import read_prompts
from core.data.spool import SELECTED_SCHEMA
from core.data.template import encode_conversation, encode_prompt, tokenizer_hash
from core.errors import InputError
from core.models.tiny import byte_tokenizer, save_tiny_target
from core.runtime.encoding import encode_all
from core.runtime.preparation import ASIDE, SCANNED
from jobs.prepare_data import main

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    save_tiny_target(folder)
    return folder


ACTION = {
    "inner_thought": "Search.",
    "api_name": "find",
    "api_param": '{"q": "x"}',
    "api_res": "1 result",
}
GDGPT = [
    {"type": "pretrain", "text": "Bees live in hives."},
    {"type": "instruct", "instruct": "Fill in.", "input": "He likes ___", "output": "playing"},
    {"type": "instruct", "instruct": "Write a poem.", "output": "A poem."},
    {
        "type": "conversation",
        "rounds": [["ask", "Hi"], ["ans", "Good day."], ["ask", "Day?"], ["ans", "Friday."]],
    },
    {
        "type": "conver_has_api",
        "api_desc": "find: finds things",
        "rounds": [["ask", "Find x"], ["ans-api", {"actions": [ACTION], "ans": "One found."}]],
    },
    {
        "type": "ref_qa",
        "reference": "It was 2019.",
        "rounds": [["ask", "When?"], ["ans", "In 2019."]],
    },
]


def records(count, start=0):
    """Conversations of two rounds; every tenth first question is the same."""
    made = []
    for i in range(start, start + count):
        first = "What are you?" if i % 10 == 0 else f"Question {i}?"
        turns = [first, f"Answer {i}.", f"More on {i}?", "No. " * (1 + i % 60)]
        made.append(
            {
                "id": f"r{i}",
                "conversations": [
                    {"from": ("human", "gpt")[t % 2], "value": text} for t, text in enumerate(turns)
                ],
            }
        )
    return made


def arguments(data, target, output, *more):
    settings = ("data.held_out=0.2", "data.shard_tokens=2000", "data.max_length=200")
    return [f"data.path={data}", f"target.path={target}", f"output={output}", *settings, *more]


def contents(folder):
    """Every file that other stages read, by name."""
    found = [p for p in folder.rglob("*") if p.suffix in (".parquet", ".jsonl")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.name != "metrics.jsonl"}


def test_examples_and_prompts(tmp_path, target, write_json, capsys):
    data, output = write_json(records(150)), tmp_path / "out"
    assert main(arguments(data, target, output)) == 0
    report = json.loads((output / "report.json").read_text())
    examples = {
        split: [e for shard in example_shards(output, split) for e in read_examples(shard)]
        for split in ("train", "held_out")
    }
    assert report["conversations_read"] == report["conversations"] == 150
    assert report["train_examples"] == len(examples["train"])
    assert report["held_out_examples"] == len(examples["held_out"])
    assert report["train_tokens"] == sum(e.num_tokens for e in examples["train"])
    assert report["supervised_tokens"] == sum(int(e.loss_mask_T.sum()) for e in examples["train"])
    assert report["longest"] == 200
    assert (report["bad_records"], report["truncated"]) == (0, 0)
    ids = [e.id for split in examples.values() for e in split]
    assert {i.partition("#")[0] for i in ids} == {f"r{i}" for i in range(150)}
    assert len(set(ids)) == len(ids)
    assert 10 < len(examples["held_out"]) < 55
    assert len(example_shards(output, "train")) > 5
    metadata = read_metadata(example_shards(output, "train")[0])
    assert (metadata.split, metadata.max_length) == ("train", 200)

    tokenizer = byte_tokenizer()
    prompts = read_prompts(output / "prompts.jsonl")
    assert len(prompts) == report["prompts"] > 10
    held_out = {e.id.partition("#")[0] for e in examples["held_out"]}
    assert all(prompt.id.rpartition("/")[0] in held_out for prompt in prompts)
    assert {prompt.task for prompt in prompts} == {"first_turn", "follow_up"}
    # Training conversations begin with it, so none that is held out may ask it.
    assert all(prompt.messages[0].content != "What are you?" for prompt in prompts)
    assert all(len(encode_prompt(tokenizer, p.messages)) <= 512 for p in prompts)

    assert main([*arguments(data, target, output), "--verify"]) == 0
    assert f"{report['train_examples']:,} examples" in capsys.readouterr().out
    assert main([*arguments(data, target, output), "--inspect", "2"]) == 0
    assert "<|im_start|>assistant" in capsys.readouterr().out


def test_bytes_depend_neither_on_order_nor_on_workers(tmp_path, target, write_json, monkeypatch):
    given = records(100) + records(20)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(write_json(given), target, first)) == 0
    shuffled = random.Random(3).sample(given, k=len(given))
    # Blocks of another size, in another order, from several files of other kinds.
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "conversations.json").write_text(json.dumps(shuffled[:50]))
    lines = "".join(json.dumps(one) + "\n" for one in shuffled[50:70])
    (parts / "conversations.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(shuffled[70:]), parts / "conversations.parquet")
    monkeypatch.setattr("core.data.scan.BLOCK_BYTES", 500)
    assert main(arguments(parts, target, second, "data.num_workers=1")) == 0
    # Which file an example came from is part of it.
    assert [without_source(one) for one in examples_in(first)] == [
        without_source(one) for one in examples_in(second)
    ]
    again = arguments(write_json(given), target, tmp_path / "again", "data.num_workers=1")
    assert main(again) == 0
    assert contents(tmp_path / "again") == contents(first)
    figures = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "again")
    ]
    for report in figures:
        assert report["dropped"]["duplicate"] == 20
        assert report["peak_memory_mib"] > 100
        for name in ("run", "peak_memory_mib", "read_seconds", "encode_seconds"):
            del report[name]
    assert figures[0] == figures[1]


def examples_in(folder):
    return [
        one
        for split in ("train", "held_out")
        for shard in example_shards(folder, split)
        for one in read_examples(shard)
    ]


def without_source(one):
    return (one.id, one.input_ids_T.tolist(), one.loss_mask_T.tolist(), one.num_turns)


def selected(path, records):
    """A file of what the first pass selects."""
    rows = [
        {
            "content": f"{number:064x}",
            "id": record["id"],
            "source": "f",
            "kind": "chat",
            "messages": json.dumps(
                [(("user", "assistant")[t % 2], turn["value"].strip())
                 for t, turn in enumerate(record["conversations"])]
            ),
            "held_out": number % 2 == 0,
        }
        for number, record in enumerate(records)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=SELECTED_SCHEMA), path, row_group_size=7)
    return rows


def test_encoding_on_workers_is_that_of_this_process_in_order(tmp_path, target):
    given = selected(tmp_path / "selected.parquet", records(80))
    config = load_config(
        None, ["data.max_length=150", f"target.path={target}", "data.too_long=cut"]
    )
    tokenizer = byte_tokenizer()
    rows = list(encode_all(tmp_path / "selected.parquet", config, tokenizer_hash(tokenizer)))
    assert [row["id"] for row in rows] == [row["id"] for row in given]
    for one, row in zip(given, rows, strict=True):
        ids, mask = encode_conversation(tokenizer, unpack_messages(one["messages"]), 150)
        assert row["input_ids"][0].tolist() == ids.tolist()
        assert row["loss_mask"][0].tolist() == mask.tolist()
        assert len(row["prompt_lengths"]) == (2 if one["held_out"] else 0)


MIXED = [
    *GDGPT,
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None,
         "tool_calls": [{"function": {"name": "get_weather", "arguments": "{}"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains today."},
    ]},
    {"conversation": [{"human": "What is RAM?", "assistant": "Memory."}], "category": ["IT"]},
    {"conversations": [{"from": "human", "value": "Hello there!"}, {"from": "gpt", "value": "Hi"}]},
    {"prompt": "Why is the sky blue?"},
]  # fmt: skip


def test_all_formats_in_one_file_are_ready_for_training(tmp_path, target, write_json):
    output = tmp_path / "out"
    more = ("data.max_length=2000", "data.held_out=0")
    assert main(arguments(write_json(MIXED), target, output, *more)) == 0
    report = json.loads((output / "report.json").read_text())
    formats = {"gdgpt": 6, "alpaca": 1, "messages": 1, "pairs": 1, "sharegpt": 1, "prompt": 1}
    assert report["formats"] == formats
    assert report["train_examples"] == len(MIXED) - 1
    tokenizer = byte_tokenizer()
    learnt = {
        tokenizer.decode(one.input_ids_T[one.loss_mask_T == 1]) for one in examples_in(output)
    }
    assert learnt == {
        "Bees live in hives.<|im_end|>",
        "playing<|im_end|>",
        "A poem.<|im_end|>",
        "Good day.<|im_end|>Friday.<|im_end|>",
        'Search.\n<tool_call>\n{"name": "find", "arguments": {"q": "x"}}\n</tool_call><|im_end|>'
        "One found.<|im_end|>",
        "In 2019.<|im_end|>",
        "3<|im_end|>",
        '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call><|im_end|>'
        "It rains today.<|im_end|>",
        "Memory.<|im_end|>",
        "Hi<|im_end|>",
    }
    (prompt,) = read_prompts(output / "prompts.jsonl")
    assert [m.content for m in prompt.messages] == ["Why is the sky blue?"]


def test_a_killed_run_goes_on_behind_the_first_pass(tmp_path, target, write_json, monkeypatch):
    data, output = write_json(records(60)), tmp_path / "out"
    assert main(arguments(data, target, tmp_path / "reference")) == 0

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("core.runtime.preparation._put_in_place", killed)
        assert main(arguments(data, target, output)) == 1
    assert (output / ASIDE / SCANNED).exists()
    assert not (output / "train").exists()
    with monkeypatch.context() as patch:
        patch.setattr("core.runtime.preparation.scan", killed)
        assert main(arguments(data, target, output)) == 0
    assert contents(output) == contents(tmp_path / "reference")
    assert not (output / ASIDE).exists()


def test_a_full_disk_says_so_and_leaves_nothing_behind(tmp_path, target, write_json):
    """On a file system that holds a few files, mounted for one process alone.

    It has bytes enough, or the check before the start would refuse it.
    """
    small = tmp_path / "small"
    small.mkdir()
    data = write_json(records(3000))
    command = " ".join(arguments(data, target, small / "out", "cluster.address=local"))
    script = (
        f"mount -t tmpfs -o size=1g,nr_inodes=24 none {small} && "
        f"PYTHONPATH=. {sys.executable} -m jobs.prepare_data {command}; "
        f'code=$?; find {small} -name "*.arrow"; exit $code'
    )
    entered = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*entered, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a user mount a file system of their own")
    done = subprocess.run([*entered, "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    assert ".arrow" not in done.stdout


def test_bad_records_are_named_and_the_others_written(tmp_path, target, write_json, capsys):
    given = records(20)
    given[3:3] = [42, {"foo": 1}]
    given.append({"conversations": [{"from": "human"}]})
    command = arguments(write_json(given), target, tmp_path / "out")
    for allowed in (0, 2, 0):
        assert main([*command, f"data.max_bad_records={allowed}"]) == 2
        message = capsys.readouterr().err
        assert "3 of 23 records are no conversation" in message
        assert "record 3: expected an object with 'conversations', 'messages'" in message
        assert "got 42" in message
        assert 'got {"foo": 1}' in message
        assert "record 22: turn 0: expected 'from'" in message
        assert "data.max_bad_records=3" in message
        assert "Traceback" not in message
        assert not (tmp_path / "out" / "report.json").exists()
    shard = example_shards(tmp_path / "out", "train")[0]
    written = shard.stat().st_mtime_ns

    assert main([*command, "data.max_bad_records=3"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["bad_records"], report["conversations"]) == (3, 20)
    assert report["train_examples"] + report["held_out_examples"] == 20
    assert shard.stat().st_mtime_ns == written


def test_an_interrupted_run_leaves_no_split_and_is_made_good(tmp_path, target, write_json):
    command = arguments(write_json(records(30)), target, tmp_path / "out")
    reference = arguments(write_json(records(30)), target, tmp_path / "reference")
    assert main(reference) == 0
    assert main(command) == 0
    for name in ("report.json", "outcome.json", "prompts.jsonl"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "held_out")
    left = tmp_path / "out" / ".unfinished" / "train"
    left.mkdir(parents=True)
    (left / "shard-00077.parquet").write_bytes(b"half")
    (tmp_path / "out" / "train" / "shard-00078.parquet").write_bytes(b"stale")
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_truncated_file_is_a_warning(tmp_path, target, write_json, capsys):
    path = write_json(records(10))
    path.write_bytes(path.read_bytes()[:-40])
    assert main(arguments(path, target, tmp_path / "out")) == 0
    assert "ends in mid-record, after 9 conversations" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["truncated"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=/no/such/file.json", "no such file"),
        ("data.path=null", "data.path is not set"),
        ("target.path=null", "target.path is not set"),
        ("target.path=/no/such/folder", "no such folder"),
        ("data.max_length=16", "no training example is left"),
    ],
)
def test_user_errors(tmp_path, target, write_json, capsys, change, message):
    command = arguments(write_json(records(10)), target, tmp_path / "out", change)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_without_conversations(tmp_path, target, write_json, capsys):
    assert main(arguments(write_json([]), target, tmp_path / "out")) == 2
    assert "no conversation is left" in capsys.readouterr().err


def test_workers_that_cannot_encode_say_why(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not today') if messages|length > 2 else 'x' }}"
    folder = tmp_path / "refusing"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    selected(tmp_path / "selected.parquet", records(5, start=1))
    config = load_config(None, [f"target.path={folder}"])
    with pytest.raises(InputError, match=r"conversation 'r\d+': .*not today"):
        list(encode_all(tmp_path / "selected.parquet", config, tokenizer_hash(tokenizer)))
    with pytest.raises(InputError, match="another tokenizer"):
        list(encode_all(tmp_path / "selected.parquet", config, "0" * 64))


def test_a_tokenizer_without_template(tmp_path, target, write_json, capsys):
    folder = tmp_path / "bare"
    shutil.copytree(target, folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    command = arguments(write_json(records(20)), folder, tmp_path / "out")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "has no chat template" in error
    assert "target.template=llama-2|vicuna|mixtral|llama-3|qwen-2" in error
    assert error.count("\n") == 1
    assert main([*command, "target.template=vicuna"]) == 0
    (first, *_) = examples_in(tmp_path / "out")
    assert "USER: " in byte_tokenizer().decode(first.input_ids_T)
