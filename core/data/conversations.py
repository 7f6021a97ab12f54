"""Conversations, and reading them record by record in bounded memory.

A file is a JSON array or JSONL. One that ends in mid-record, as published dumps do, gives the
records before that, and says so in `RecordReader.truncated`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from core.errors import InputError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

# Names under which the datasets of this format know the three roles.
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
}

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CHUNK_BYTES = 2**20
# Bounds memory where a file is not what it seems; real conversations stay far below.
MAX_RECORD_BYTES = 2**26
# What json leaves unread of a number that is cut off.
CUT_NUMBER_TAILS = ("", ".", "e", "E", "e+", "e-", "E+", "E-")
# A token that the end of the buffer may have cut: `\ud83d\ude00`, `-Infinity`, `false`.
LONGEST_CUT_TOKEN = 16


class RecordError(InputError):
    """A record is no conversation; the others can go on."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """As chat templates and JSON have it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """The turns of one conversation; `id` is empty where the record has none."""

    id: str
    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class Record:
    """One record of a file; `problem` says why it could not be read as JSON, if so."""

    index: int
    value: Any
    problem: str | None = None


def parse_sharegpt(value: Any, source: str) -> Conversation:
    """A ShareGPT record, `{"id": …, "conversations": [{"from": …, "value": …}, …]}`.

    An empty list of turns is a conversation without turns: cleaning drops and counts it.

    Raises:
        RecordError: the value is no conversation at all.
    """
    if not isinstance(value, dict):
        raise RecordError(f"expected an object with 'conversations', got {_shown(value)}")
    turns = value.get("conversations")
    if not isinstance(turns, list):
        got = f"{_shown(turns)} there" if "conversations" in value else _shown(value)
        raise RecordError(f"expected a list under 'conversations', got {got}")
    messages = tuple(_parse_turn(turn, number) for number, turn in enumerate(turns))
    own_id = value.get("id")
    return Conversation("" if own_id is None else str(own_id), messages, source)


def _parse_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
        raise RecordError(f"turn {number}: expected 'from' and a text 'value', got {_shown(turn)}")
    speaker = turn["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RecordError(
            f"turn {number}: from={_shown(speaker)} is none of {', '.join(SHAREGPT_ROLES)}"
        )
    return Message(role, turn["value"])


def _shown(value: Any, longest: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def read_records(path: Path) -> RecordReader:
    """The records of a JSON array or a JSONL file, to be iterated once.

    Raises:
        InputError: the file is neither, or what follows cannot be read; says the byte offset.
    """
    return RecordReader(path)


class RecordReader:
    """Iterates over a file's records.

    Attributes:
        truncated: records that the end of the file cut off (0 or 1), known after the last one.
        bytes_read: how far reading has got, for progress.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.truncated = 0
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            start = file.read(2**12).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            if self.path.suffix not in JSONL_SUFFIXES and start.startswith(b"["):
                yield from self._array(file)
            else:
                yield from self._lines(file)

    def _lines(self, file: BinaryIO) -> Iterator[Record]:
        index = 0
        while line := file.readline(MAX_RECORD_BYTES):
            offset = self.bytes_read
            self.bytes_read += len(line)
            if len(line) == MAX_RECORD_BYTES:
                raise InputError(
                    f"{self.path}: the line at byte {offset} is longer than "
                    f"{MAX_RECORD_BYTES >> 20} MiB; expected a JSON array, or one record a line"
                )
            if not line.strip():
                continue
            record = _parse_line(line.removeprefix(codecs.BOM_UTF8), index)
            if record.problem and index == 0 and self.path.suffix not in JSONL_SUFFIXES:
                raise InputError(
                    f"{self.path}: {record.problem} in its first line; expected a JSON array of "
                    "records, or JSONL, one record a line"
                )
            if record.problem and not line.endswith(b"\n"):
                self.truncated = 1
                return
            yield record
            index += 1

    def _array(self, file: BinaryIO) -> Iterator[Record]:
        buffer = _Buffer(self, file)
        buffer.skip("[")
        index = 0
        while True:
            following = buffer.peek()
            if following == "]":
                return
            if index and following == ",":
                buffer.skip(",")
                following = buffer.peek()
            elif index and following:
                raise buffer.error(0, "expected ',' or ']' between records", index)
            found = buffer.decode(index) if following else None
            if found is None:
                # The closing bracket is missing too where the cut fell between two records.
                self.truncated = 1
                return
            yield Record(index, found[0])
            index += 1


def _parse_line(line: bytes, index: int) -> Record:
    try:
        return Record(index, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Record(index, None, f"not valid JSON ({error})")


class _Buffer:
    """A sliding window over the text of a file that holds one JSON array."""

    def __init__(self, reader: RecordReader, file: BinaryIO) -> None:
        self._reader, self._file = reader, file
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read(CHUNK_BYTES)

    def skip(self, character: str) -> None:
        """Step over the next character, which `peek` has shown."""
        assert self.peek() == character
        self._at += 1

    def decode(self, index: int) -> tuple[Any] | None:
        """The value that starts here, in a tuple; None if the file ends within it.

        Raises:
            InputError: malformed JSON; where the next record starts cannot be told.
        """
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error):
                    what = f"malformed JSON ({error.msg})"
                    raise self.error(error.pos - self._at, what, index) from None
            except RecursionError:
                raise self.error(0, "JSON that is nested too deeply", index) from None
            else:
                # At the end of the buffer a number may go on: 12 | 34, 12. | 5, 12e | 3.
                may_go_on = self._text[end:] in CUT_NUMBER_TAILS
                if not may_go_on or (self._ended and isinstance(value, dict | list | str)):
                    self._at = end
                    return (value,)
            if self._ended:
                return None
            waiting = len(self._text) - self._at
            if waiting > MAX_RECORD_BYTES:
                raise self.error(0, f"a record of more than {MAX_RECORD_BYTES >> 20} MiB", index)
            # Twice as much each time, so that long records are not parsed over and over.
            self._read(max(CHUNK_BYTES, waiting))

    def error(self, ahead: int, what: str, index: int) -> InputError:
        """An error at `ahead` characters from here, with its place in the file."""
        behind = len(self._text[self._at + ahead :].encode("utf-8"))
        undecoded = len(self._bytes_to_text.getstate()[0])
        offset = self._reader.bytes_read - undecoded - behind
        return InputError(
            f"{self._reader.path}: {what} at byte {offset}, in or after record {index}; the rest "
            "cannot be read; mend the file there, or convert it to JSONL, where a bad record "
            "stands alone"
        )

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        if error.msg.startswith("Unterminated string"):
            return True
        return len(self._text[error.pos :].strip()) < LONGEST_CUT_TOKEN

    def _read(self, num_bytes: int) -> None:
        content = self._file.read(num_bytes)
        before = self._reader.bytes_read
        self._reader.bytes_read += len(content)
        # Not final=True at the end: half a character there is just where the file was cut.
        self._ended = len(content) < num_bytes
        try:
            text = self._bytes_to_text.decode(content)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._reader.path}: not UTF-8 near byte {before + error.start} "
                f"({error.reason}); convert the file to UTF-8"
            ) from error
        self._text, self._at = self._text[self._at :] + text, 0
