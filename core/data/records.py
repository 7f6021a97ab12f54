"""Reading files record by record, in bounded memory: JSON arrays, JSONL, Parquet, hub data sets.

A JSON file that ends in mid-record, as published dumps do, gives the records before that, and
says so in `truncated`. Records are handed on as text, so that other processes parse them.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import ConfigError, InputError
from core.paths import resolve_path

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
HUB_SCHEME = "hub://"
CHUNK_BYTES = 2**20
# Bounds memory where a file is not what it seems; real conversations stay far below.
MAX_RECORD_BYTES = 2**26
PARQUET_ROWS = 256
# What json leaves unread of a number that is cut off.
CUT_NUMBER_TAILS = ("", ".", "e", "E", "e+", "e-", "E+", "E-")
# A token that the end of the buffer may have cut: `\ud83d\ude00`, `-Infinity`, `false`.
LONGEST_CUT_TOKEN = 16


@dataclass(frozen=True)
class Record:
    """One record of a file, as the text of a JSON value.

    `problem` says why not even its text could be read.
    """

    index: int
    text: str
    problem: str | None = None

    def parse(self) -> Any:
        """The value.

        Raises:
            ValueError: it is no JSON; says why.
        """
        if self.problem is not None:
            raise ValueError(self.problem)
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error})") from error


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
            record = _line_record(line.removeprefix(codecs.BOM_UTF8), index)
            first_of_unknown = index == 0 and self.path.suffix not in JSONL_SUFFIXES
            if first_of_unknown or not line.endswith(b"\n"):
                try:
                    record.parse()
                except ValueError as error:
                    if first_of_unknown:
                        raise InputError(
                            f"{self.path}: {error} in its first line; expected a JSON array of "
                            "records, or JSONL, one record a line"
                        ) from error
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
                buffer.skip("]")
                if buffer.peek():
                    raise buffer.error(0, "text behind the ']' that ends the array", index)
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
            yield Record(index, found)
            index += 1


def _line_record(line: bytes, index: int) -> Record:
    try:
        return Record(index, line.decode())
    except UnicodeDecodeError as error:
        return Record(index, "", f"not UTF-8 ({error.reason})")


class _Buffer:
    """A sliding window over the text of a file that holds one JSON array."""

    def __init__(self, reader: RecordReader, file: BinaryIO) -> None:
        self._reader, self._file = reader, file
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")()
        # Only where a value ends is wanted: int() refuses numbers of thousands of digits.
        self._json = json.JSONDecoder(parse_int=float)
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

    def decode(self, index: int) -> str | None:
        """The text of the value that starts here; None if the file ends within it.

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
                    text, self._at = self._text[self._at : end], end
                    return text
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


@dataclass(frozen=True)
class Source:
    """One file, or one hub data set, that is read from its beginning to its end."""

    location: str
    name: str

    @property
    def path(self) -> Path | None:
        """The file; None for a hub data set."""
        return None if self.location.startswith(HUB_SCHEME) else Path(self.location)

    @property
    def num_bytes(self) -> int:
        """Of the file; 0 where nobody knows before reading."""
        return self.path.stat().st_size if self.path else 0

    def read(self) -> RecordReader | ParquetReader | HubReader:
        """Its records, to be iterated once.

        Raises:
            InputError: while iterating: it cannot be read, or not to its end.
        """
        if self.path is None:
            return HubReader(self.location)
        if self.path.suffix in PARQUET_SUFFIXES:
            return ParquetReader(self.path)
        return RecordReader(self.path)


def find_sources(locations: str | tuple[str, ...], *, field: str) -> list[Source]:
    """The sources behind a config's locations: files, folders of files, `hub://` data sets.

    Raises:
        InputError: one of them does not exist, or is a folder without files of conversations.
    """
    sources = []
    for location in [locations] if isinstance(locations, str) else locations:
        if location.startswith(HUB_SCHEME):
            sources.append(Source(location, location.removeprefix(HUB_SCHEME)))
            continue
        path = resolve_path(location, field=field)
        files = [path]
        if path.is_dir():
            suffixes = JSON_SUFFIXES + PARQUET_SUFFIXES
            files = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
        if not files:
            raise InputError(f"{field}={location}: no {', '.join(suffixes)} in that folder")
        for file in files:
            if not _is_text(str(file.absolute())):
                raise InputError(f"{field}: the name of {str(file)!r} is not UTF-8; rename it")
        sources += [Source(str(file.absolute()), file.name) for file in files]
    return sources


def _is_text(name: str) -> bool:
    """Whether a path can be written as UTF-8; others arrive with lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


class ParquetReader:
    """Iterates over a Parquet file's rows, each as a JSON object."""

    truncated = 0

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Record]:
        numbers = itertools.count()
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                    for row in batch.to_pylist():
                        yield Record(next(numbers), json.dumps(row, default=str))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path}: cannot be read as Parquet ({error}); write the file again"
            ) from error


class HubReader:
    """Iterates over a hub data set, streaming: `hub://<id>[?split=train][&name=<subset>]`."""

    truncated = 0

    def __init__(self, location: str) -> None:
        self.location = location
        parts = urlsplit(location)
        self.dataset = parts.netloc + parts.path
        options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.split, self.subset = options.pop("split", "train"), options.pop("name", None)
        self.revision = options.pop("revision", None)
        if options or not self.dataset:
            raise ConfigError(
                f"data.path={location}: expected hub://<id>?split=<split>&name=<subset>"
                "&revision=<commit>, where all behind the id is optional"
            )

    def __iter__(self) -> Iterator[Record]:
        # Imports pandas and much else, which readers of files do without.
        import datasets

        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(
                self.dataset,
                self.subset,
                split=self.split,
                revision=self.revision,
                streaming=True,
            )
            for number, row in enumerate(rows):
                yield Record(number, json.dumps(row, default=str))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(
                f"data.path={self.location}: cannot be read ({type(error).__name__}: {error}); "
                "check the id, the split, the network, or HF_TOKEN for gated data sets"
            ) from error
