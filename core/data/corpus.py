"""A file of conversations, read, cleaned, deduplicated and selected in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from core.config import Config
from core.data.cleaning import DUPLICATE, CleaningCounts, clean
from core.data.conversations import Conversation, Record, RecordError, parse_sharegpt, read_records
from core.data.selection import Selection, is_held_out
from core.errors import InputError
from core.progress import Progress, say

STAGE = "prepare_data"
BAD_RECORDS_SHOWN = 3


@dataclass
class Corpus:
    """What reading a file gave.

    Attributes:
        selected: conversations in the order in which they are written, and whether held out.
        bad_records: how many records were no conversations.
        first_bad: what was wrong with the first few, one line each.
    """

    selected: list[tuple[Conversation, bool]] = field(default_factory=list)
    counts: CleaningCounts = field(default_factory=CleaningCounts)
    conversations_read: int = 0
    truncated: int = 0
    bad_records: int = 0
    first_bad: list[str] = field(default_factory=list)

    def note_bad(self, record: Record, why: str) -> None:
        """Count a record that is no conversation."""
        self.bad_records += 1
        if len(self.first_bad) < BAD_RECORDS_SHOWN:
            self.first_bad.append(f"record {record.index}: {why}")


def read_corpus(path: Path, config: Config) -> Corpus:
    """Read, clean, deduplicate and select, in one pass.

    Memory: the conversations that are taken (at most data.max_conversations, if it is set), and
    one hash for each that was read.

    Raises:
        InputError: the file cannot be read, or no conversation is left.
    """
    corpus = Corpus()
    selection = Selection(config.data.max_conversations, config.data.seed)
    reader = read_records(path)
    size_mb = -(-path.stat().st_size // 10**6)
    with Progress(STAGE, total=size_mb, unit="MB read") as progress:
        for record in reader:
            progress.advance(reader.bytes_read // 10**6 - progress.done)
            conversation = _parse(record, path.name, corpus)
            if conversation is not None:
                corpus.conversations_read += 1
                cleaned = clean(conversation, corpus.counts)
                if cleaned is not None:
                    selection.add(cleaned)
        progress.advance(size_mb - progress.done)
    corpus.truncated = reader.truncated
    corpus.counts.dropped[DUPLICATE] += selection.num_duplicates
    share, seed = config.data.held_out, config.data.seed
    corpus.selected = [(c, is_held_out(key, share, seed)) for key, c in selection.ordered()]
    _say_what_was_read(corpus, path)
    return corpus


def _parse(record: Record, source: str, corpus: Corpus) -> Conversation | None:
    if record.problem:
        corpus.note_bad(record, record.problem)
        return None
    try:
        return parse_sharegpt(record.value, source)
    except RecordError as error:
        corpus.note_bad(record, str(error))
        return None


def _say_what_was_read(corpus: Corpus, path: Path) -> None:
    say(STAGE, f"{corpus.conversations_read:,} conversations read, {len(corpus.selected):,} taken")
    for what, counter in (("dropped", corpus.counts.dropped), ("changed", corpus.counts.changed)):
        counted = ", ".join(f"{name} {count:,}" for name, count in counter.items() if count)
        say(STAGE, f"{what}: {counted or 'none'}")
    if corpus.truncated:
        say(
            STAGE,
            f"warning: {path.name} ends in mid-record, after {corpus.conversations_read:,} "
            "conversations; what came before is used",
        )
    if not corpus.selected:
        bad = f"; {corpus.first_bad[0]}" if corpus.first_bad else ""
        raise InputError(
            f"{path}: no conversation is left after cleaning ({corpus.conversations_read} read, "
            f"{corpus.bad_records} bad records{bad}); expected "
            '[{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}]'
        )
