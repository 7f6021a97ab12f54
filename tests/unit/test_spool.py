"""What is selected from what was scanned: the same, however the rows came in."""

import json
import random

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from core.config.sections import DataConfig
from core.data.conversations import Conversation, Message, unpack_messages
from core.data.records import Source
from core.data.scan import ScanCounts, read_blocks, scan_block
from core.data.selection import content_hash, is_held_out
from core.data.spool import Spool, num_partition_bits, select


def turns(*texts):
    speakers = ("human", "gpt")
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]


def many(count, start=0):
    rng = random.Random(start)
    return [
        {
            "id": f"c{i}",
            "conversations": turns(
                f"question {i}", " ".join(map(str, rng.sample(range(9999), 60)))
            ),
        }
        for i in range(start, start + count)
    ]


def selected(tmp_path, records, *, bits=0, limit=None, seed=0, block=10**6, **data):
    """Rows taken, and the counts."""
    settings = DataConfig(seed=seed, **data)
    folder = tmp_path / f"run-{random.random()}"
    folder.mkdir()
    counts, spool = ScanCounts(), Spool(folder / "spool", bits)
    for start in range(0, len(records), block):
        path = folder / "part.json"
        path.write_text(json.dumps(records[start : start + block]))
        for table in read_blocks(Source(str(path), "f.json"), 0):
            scanned = scan_block(table, settings)
            is_counts = scanned["counts"].is_valid()
            for found in scanned.filter(is_counts)["counts"].to_pylist():
                counts.merge(json.loads(found))
            spool.add(scanned.filter(pc.invert(is_counts)))
    spool.close()
    taken = select(
        spool,
        folder / "selected.parquet",
        counts.cleaning,
        similarity=settings.near_duplicates,
        limit=limit,
        held_out=0.1,
        seed=seed,
    )
    rows = pq.read_table(folder / "selected.parquet").to_pylist()
    assert len(rows) == taken
    return rows, counts


def ids(rows):
    return [row["id"] for row in rows]


def test_selection_depends_on_neither_order_blocks_nor_partitions(tmp_path):
    given = [*many(200), *many(20), {"id": "odd", "conversations": turns("q only")}]
    near = many(30)
    for record in near:
        record["conversations"][1]["value"] += " and one more"
        record["id"] = f"near-{record['id']}"
    given += near
    first, counts = selected(tmp_path, given)
    assert counts.cleaning.dropped["duplicate"] == 20
    assert counts.cleaning.dropped["near_duplicate"] == 30
    assert len(counts.cleaning.samples["dropped"]["near_duplicate"]) == 3
    assert len(first) == 200
    for seed in range(3):
        shuffled = random.Random(seed).sample(given, k=len(given))
        again, others = selected(tmp_path, shuffled, bits=seed * 3, block=17 + seed)
        assert again == first
        assert others.cleaning.as_dict() == counts.cleaning.as_dict()
    hashes = [row["content"] for row in first]
    winners = {row["id"] for row in first if row["id"].startswith("near-")}
    # Of the two that are alike, that of the smaller hash: about as often one as the other.
    assert 5 < len(winners) < 25
    assert len(set(hashes)) == 200


def test_a_limit_takes_the_first_and_is_stable_under_growth(tmp_path):
    all_of_them, _ = selected(tmp_path, many(300))
    few, _ = selected(tmp_path, many(300), limit=40, bits=4)
    assert few == all_of_them[:40]
    grown, _ = selected(tmp_path, many(330), limit=40, bits=2)
    assert set(ids(grown)) - set(ids(few)) <= {f"c{i}" for i in range(300, 330)}
    assert len(set(ids(grown)) & set(ids(few))) >= 25
    assert selected(tmp_path, many(300), limit=40, seed=1)[0] != few


def test_of_twins_the_first_id_stays_and_ids_are_unique(tmp_path):
    same = turns("same question", "same answer")
    given = [
        {"id": "b", "conversations": same},
        {"conversations": same},
        {"id": "a", "conversations": same},
        {"id": "x", "conversations": turns("one question", "one answer")},
        {"id": "x", "conversations": turns("another thing", "something else")},
        {"id": "x#2", "conversations": turns("a third matter", "yet more to say")},
        {"conversations": turns("nameless it is", "so it is called by its hash")},
    ]
    for order in (given, given[::-1]):
        rows, counts = selected(tmp_path, order, bits=1)
        assert counts.cleaning.dropped["duplicate"] == 2
        found = ids(rows)
        assert len(set(found)) == 5
        assert {"a", "x"} < set(found)
        # Parts of a long conversation are called so.
        assert "x#2" not in found
        nameless = next(row for row in rows if "nameless" in row["messages"])
        assert nameless["id"] == nameless["content"]
        messages = unpack_messages(nameless["messages"])
        assert messages == (
            Message("user", "nameless it is"),
            Message("assistant", "so it is called by its hash"),
        )


def test_near_duplicates_can_stay(tmp_path):
    given = many(5)
    twin = json.loads(json.dumps(given[0]))
    twin["conversations"][1]["value"] += " indeed"
    assert len(selected(tmp_path, [*given, twin])[0]) == 5
    assert len(selected(tmp_path, [*given, twin], near_duplicates=None)[0]) == 6


def test_the_kind_counts_for_the_content():
    message = (Message("user", "q"),)
    chat, prompt = (Conversation("", message, "f", kind) for kind in ("chat", "prompt"))
    assert content_hash(chat) != content_hash(prompt)


def test_held_out_share_is_met():
    hashes = [content_hash(Conversation("", (Message("user", str(i)),), "")) for i in range(4000)]
    share = sum(is_held_out(one, 0.1, 0) for one in hashes) / len(hashes)
    # Binomial: four standard deviations are 0.019.
    assert abs(share - 0.1) < 0.02
    assert not any(is_held_out(one, 0.0, 0) for one in hashes)


@pytest.mark.parametrize(("size", "bits"), [(0, 0), (2**22, 1), (2**30, 9), (2**50, 12)])
def test_partitions_grow_with_the_input(size, bits):
    assert num_partition_bits(size) == bits
