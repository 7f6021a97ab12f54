"""The stage prepare_data as a job: what it writes, counts, refuses and does not redo."""

import json
import random
import shutil

import pytest

from core.config import load_config
from core.data.corpus import read_corpus
from core.data.examples import example_shards, read_examples, read_metadata
from core.data.prompts import read_prompts
from core.data.template import encode_conversation, encode_prompt, tokenizer_hash
from core.errors import InputError
from core.models.tiny import byte_tokenizer, save_tiny_target
from core.runtime.preparation import encode_all
from jobs.prepare_data import main

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    save_tiny_target(folder)
    return folder


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
    assert sorted(ids) == sorted(f"r{i}" for i in range(150))
    assert 10 < len(examples["held_out"]) < 55
    assert len(example_shards(output, "train")) > 5
    metadata = read_metadata(example_shards(output, "train")[0])
    assert (metadata.split, metadata.max_length) == ("train", 200)

    tokenizer = byte_tokenizer()
    prompts = read_prompts(output / "prompts.jsonl")
    assert len(prompts) == report["prompts"] > 10
    held_out = {e.id for e in examples["held_out"]}
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
    given = records(100)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(write_json(given), target, first)) == 0
    shuffled = write_json(random.Random(3).sample(given, k=100), "conversations.json")
    # Blocks of another size fall to the workers in another order.
    monkeypatch.setattr("core.runtime.preparation.CONVERSATIONS_PER_BLOCK", 7)
    assert main(arguments(shuffled, target, second)) == 0
    assert contents(first) == contents(second)


def test_encoding_on_workers_is_that_of_this_process_in_order(target, write_json):
    path = write_json(records(80))
    corpus = read_corpus(path, load_config(None, ["data.held_out=0.5"]))
    tokenizer = byte_tokenizer()
    rows = list(encode_all(corpus.selected, str(target), tokenizer_hash(tokenizer), 150))
    assert len(rows) == 80
    for (conversation, held_out), row in zip(corpus.selected, rows, strict=True):
        ids, mask = encode_conversation(tokenizer, conversation.messages, 150)
        assert row["input_ids"].tolist() == ids.tolist()
        assert row["loss_mask"].tolist() == mask.tolist()
        assert len(row["prompt_lengths"]) == (2 if held_out else 0)


def test_bad_records_are_named_and_the_others_written(tmp_path, target, write_json, capsys):
    given = records(20)
    given[3:3] = [42, {"foo": 1}]
    given.append({"conversations": [{"from": "human"}]})
    command = arguments(write_json(given), target, tmp_path / "out")
    for allowed in (0, 2, 0):
        assert main([*command, f"data.max_bad_records={allowed}"]) == 2
        message = capsys.readouterr().err
        assert "3 of 23 records are no conversation" in message
        assert "record 3: expected an object with 'conversations', got 42" in message
        assert "record 4: expected a list under 'conversations', got {\"foo\": 1}" in message
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


def test_workers_that_cannot_encode_say_why(tmp_path, target, write_json):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not today') if messages|length > 2 else 'x' }}"
    folder = tmp_path / "refusing"
    tokenizer.save_pretrained(folder)
    corpus = read_corpus(write_json(records(5, start=1)), load_config(None))
    with pytest.raises(InputError, match=r"conversation 'r\d+': .*not today"):
        list(encode_all(corpus.selected, str(folder), tokenizer_hash(tokenizer), 100))
    with pytest.raises(InputError, match="another tokenizer"):
        list(encode_all(corpus.selected, str(folder), "0" * 64, 100))
