"""regenerate_responses: a pool of target replicas answers the user's turns of conversations.

Each replica takes a shard of conversations at a time and writes it itself. Which conversations
make up a shard depends on the input and the config alone, and so do the shard's bytes: the number
of replicas changes nothing, and a stopped run goes on with the shards that are left.

Without conversations, the target first makes prompts up, in shards of their own; these are
filtered together, in order, and then answered like any others.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from core.config import Config
from core.data.conversation_shards import (
    as_sharegpt,
    finished_shard,
    join_shards,
    read_shard,
    write_shard,
)
from core.data.conversations import Conversation, Message
from core.data.synthesis import PromptFilter, user_turn
from core.decode.answering import (
    ANSWERS,
    CUT,
    EMPTY,
    GENERATED,
    NO_ROOM,
    Answerer,
    make_up_prompts,
)
from core.decode.batch import BatchCounts
from core.errors import ConfigError, InputError
from core.models.target import (
    Target,
    load_target,
    load_tokenizer,
    target_fingerprint,
    target_folder,
    target_location,
)
from core.progress import Progress, say
from core.provenance import RunFolder
from core.runtime.pool import (
    PoolFigures,
    PoolSize,
    ShardReplica,
    attempts_file,
    load_on_replica,
    replicas_that_fit,
    run_pool,
    unseen,
)
from core.runtime.preparation import preparation_inputs
from core.runtime.resources import Resources
from core.runtime.scanning import selected_conversations

STAGE = "regenerate_responses"
CONVERSATIONS = "conversations.jsonl"
ANSWERED, PROMPTS = "shards", "prompts"
SYNTHETIC = "synthetic"
ASIDE = ".unfinished"
OWN_ROLES = ("system", "user", "assistant")
COUNTED = (GENERATED, ANSWERS, CUT, EMPTY, NO_ROOM)


def generation_inputs(config: Config) -> dict[str, Path]:
    """The conversations, unless prompts are made up, and the target.

    Raises:
        UserError: one of them is not set or does not exist, or lengths that exclude each other.
    """
    generate, data = config.generate, config.data
    if generate.max_new_tokens >= data.max_length:
        raise ConfigError(
            f"generate.max_new_tokens={generate.max_new_tokens} leaves no room for a prompt in "
            f"data.max_length={data.max_length}; lower the one or raise the other"
        )
    if generate.synthesize:
        if data.path is not None:
            raise ConfigError(
                f"data.path={data.path} and generate.synthesize={generate.synthesize}: prompts "
                "come from conversations or are made up; leave one of them out"
            )
        return {"target.path": target_folder(config.target.path)}
    if data.path is None:
        raise ConfigError(
            "data.path is not set; give a JSON or JSONL file of conversations, or have the target "
            "make up prompts with generate.synthesize=1000"
        )
    return preparation_inputs(config)


def generation_resources(config: Config) -> Resources:
    """One replica."""
    return Resources(
        cpus=config.generate.cpus_per_replica,
        gpus=config.generate.gpus_per_replica,
        because="generate.cpus_per_replica, generate.gpus_per_replica",
    )


def regenerate_responses(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Answer what is not answered yet, and write `<output>/conversations.jsonl`.

    Raises:
        InputError: no conversation, or none with an answer, is left.
        StageError: replicas kept crashing.
    """
    started = time.time()
    paths = generation_inputs(config)
    output = folder.path.absolute()
    pool = _Pool(config, target_fingerprint(paths["target.path"]))
    figures: dict[str, Any] = {}
    if config.generate.synthesize:
        conversations, figures["synthesis"] = _synthesize(config, output, pool)
    else:
        conversations = _cleaned(config, output)
    tasks = [
        {
            "shard": str(output / ANSWERED / f"shard-{number:05d}.jsonl"),
            "work": json.dumps([_as_json(c) for c in part], ensure_ascii=False),
        }
        for number, part in enumerate(_parts(conversations, config.generate.shard_conversations))
    ]
    say(STAGE, f"{len(conversations):,} conversations to answer")
    found = pool.run(tasks, "answered shards")
    join_shards([Path(task["shard"]) for task in tasks], output / CONVERSATIONS)
    figures |= _summed(found, len(conversations))
    figures["kept_cut"] = config.generate.keep_cut
    if not figures["conversations"]:
        raise InputError(
            f"no conversation has an answer ({_reasons(figures)}); raise generate.max_new_tokens "
            "or data.max_length, or set generate.keep_cut=true"
        )
    say(STAGE, f"{figures['conversations']:,} conversations with {figures[ANSWERS]:,} answers; "
        f"besides, {_reasons(figures)}")  # fmt: skip
    return {
        **figures,
        "shards": len(tasks),
        "tokens_per_second": pool.tokens_per_second,
        "replicas": pool.replicas,
        "nodes": len(pool.nodes),
        "seconds": time.time() - started,
    }


def _cleaned(config: Config, output: Path) -> list[Conversation]:
    """The conversations that prepare_data would take; a tool's answers nobody can give again."""
    found = selected_conversations(config, output / ASIDE)
    kept = [one for one in found if all(message.role in OWN_ROLES for message in one.messages)]
    if len(kept) < len(found):
        say(STAGE, f"{len(found) - len(kept):,} conversations with tool calls are left out")
    if not kept:
        raise InputError(f"data.path={config.data.path}: no conversation that can be answered")
    return kept


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _summed(found: Sequence[Mapping[str, Any]], conversations: int) -> dict[str, Any]:
    """What the shards add up to."""
    names = (*COUNTED, *BatchCounts.__annotations__, "records")
    total = Counter({name: sum(about[name] for about in found) for name in names})
    return {
        "conversations_in": conversations,
        "conversations": total["records"],
        **{name: total[name] for name in COUNTED},
        "cut_share": total[CUT] / max(1, total[GENERATED]),
        "generated_tokens": total["new_tokens"],
        "prompt_tokens": total["prompt_tokens"],
        # Of what the target's passes could have given, the share that they did not.
        "idle_places": 1 - total["new_tokens"] / max(1, total["places"]),
    }


def _reasons(figures: Mapping[str, Any]) -> str:
    cut = "cut and kept" if figures["kept_cut"] else "cut"
    return f"{figures[CUT]} {cut}, {figures[EMPTY]} empty, {figures[NO_ROOM]} without room"


def _synthesize(
    config: Config, output: Path, pool: _Pool
) -> tuple[list[Conversation], dict[str, Any]]:
    """Prompts that the target made up and the filter kept, as conversations of one turn."""
    generate = config.generate
    tokenizer = load_tokenizer(target_folder(config.target.path), config.target.template)
    chosen = PromptFilter(user_turn(tokenizer), tokenizer.all_special_tokens,
                          generate.min_prompt_words)  # fmt: skip
    tasks = [
        {
            "shard": str(output / PROMPTS / f"shard-{number:05d}.jsonl"),
            "work": json.dumps([part[0], part[-1] + 1]),
        }
        for number, part in enumerate(
            _parts(range(generate.synthesize), generate.shard_conversations)
        )
    ]
    say(STAGE, f"{generate.synthesize:,} prompts to make up")
    pool.run(tasks, "prompt shards")
    conversations = []
    for task in tasks:
        for record in read_shard(Path(task["shard"])):
            words = chosen.keep(record["text"], cut=record["cut"])
            if words is not None:
                turns = (Message("user", words),)
                conversations.append(Conversation(record["id"], turns, SYNTHETIC))
    dropped = ", ".join(f"{name} {count}" for name, count in chosen.dropped.items())
    say(STAGE, f"{len(conversations):,} prompts kept; dropped: {dropped or 'none'}")
    if not conversations:
        raise InputError(
            f"none of {generate.synthesize} made-up prompts is of use (dropped: {dropped}); the "
            "target may not be tuned for conversations: give conversations with data.path"
        )
    kept = {"prompts": generate.synthesize, "kept": len(conversations)}
    return conversations, {**kept, "dropped": dict(chosen.dropped)}


class _Pool:
    """Runs tasks on replicas of the target, those whose shard is finished left out.

    Attributes:
        replicas: of the last run; 0 if nothing was left to do.
        nodes: that took part.
    """

    def __init__(self, config: Config, fingerprint: str) -> None:
        self.config, self.fingerprint = config, fingerprint
        self.replicas = 0
        self.nodes: set[str] = set()
        self._tokens, self._seconds = 0, 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated a second over this run's shards; loading is not in it."""
        return self._tokens / max(self._seconds, 1e-9)

    def run(self, tasks: Sequence[Mapping[str, str]], unit: str) -> list[dict[str, Any]]:
        """What came of each task's shard, in order."""
        left = [task for task in tasks if finished_shard(Path(task["shard"])) is None]
        for task in left:
            attempts_file(Path(task["shard"])).unlink(missing_ok=True)
        with Progress(STAGE, len(tasks), unit, skipped=len(tasks) - len(left)) as progress:
            if left:
                self._run(left, progress)
        found = [finished_shard(Path(task["shard"])) for task in tasks]
        for about, task in zip(found, tasks, strict=True):
            if about is None:
                raise unseen(Path(task["shard"]))
        return [about for about in found if about is not None]

    def _run(self, tasks: Sequence[Mapping[str, str]], progress: Progress) -> None:
        generate = self.config.generate
        size = PoolSize(generate.num_replicas, generate.cpus_per_replica, generate.gpus_per_replica)
        fits = replicas_that_fit(size, len(tasks), STAGE, "generate.num_replicas")
        self.replicas = max(self.replicas, fits)
        location = target_location(str(self.config.target.path))
        config = self.config.replace(target={"path": location})
        settings = _ReplicaSettings(config, self.fingerprint)
        figures = PoolFigures()
        with closing(run_pool(tasks, _Replica, settings, size, fits)) as rows:
            for row in rows:
                figures.add(row)
                progress.advance(1, tokens=row["tokens"])
        self.nodes |= figures.nodes
        self._tokens += figures.tokens
        self._seconds += figures.seconds


@dataclass(frozen=True)
class _ReplicaSettings:
    config: Config
    fingerprint: str


class _Replica(ShardReplica):
    """Answers conversations, or makes prompts up."""

    advice = "Lower generate.batch_size or generate.num_replicas"

    def __init__(self, settings: _ReplicaSettings) -> None:
        self.config, self.fingerprint = settings.config, settings.fingerprint

    def load(self) -> Target:
        cpus = self.config.generate.cpus_per_replica
        return load_on_replica(load_target, self.config.target, cpus, self.fingerprint)

    def finished(self, shard: Path) -> int | None:
        return None if finished_shard(shard) is None else 0

    def make(self, target: Target, shard: Path, work: str) -> int:
        make = self._prompts if shard.parent.name == PROMPTS else self._answers
        return make(target, shard, json.loads(work))

    def _answers(self, target: Target, shard: Path, work: list[dict[str, Any]]) -> int:
        answerer = Answerer(target, self.config.generate, self.config.data.max_length)
        answered = answerer.answer([_from_json(value) for value in work])
        figures = {name: answerer.counts[name] for name in COUNTED}
        computed = asdict(answerer.computed)
        write_shard(shard, (as_sharegpt(c) for c in answered), {**figures, **computed})
        return answerer.computed.new_tokens

    def _prompts(self, target: Target, shard: Path, work: list[int]) -> int:
        made, tokens = make_up_prompts(target, self.config.generate, range(*work))
        records = [
            {"id": f"{SYNTHETIC}-{number:07d}", "text": text, "cut": cut}
            for number, (text, cut) in zip(range(*work), made, strict=True)
        ]
        write_shard(shard, records, {})
        return tokens


def _as_json(conversation: Conversation) -> dict[str, Any]:
    turns = [message.as_dict() for message in conversation.messages]
    return {"id": conversation.id, "source": conversation.source, "messages": turns}


def _from_json(value: Mapping[str, Any]) -> Conversation:
    turns = tuple(Message(turn["role"], turn["content"]) for turn in value["messages"])
    return Conversation(value["id"], turns, value["source"])


def inspect_conversations(config: Config, count: int) -> None:
    """`--inspect N`: print the first conversations, the target's words coloured."""
    if config.output is None:
        raise ConfigError("output is not set; pass output=<folder that this job wrote>")
    path = Path(config.output).expanduser() / CONVERSATIONS
    if not path.exists():
        raise InputError(f"{path}: no such file; run the job to its end first")
    console = Console(highlight=False, soft_wrap=True)
    for record, _ in zip(read_shard(path), range(count), strict=False):
        console.rule(record["id"])
        for turn in record["conversations"]:
            style = "green" if turn["from"] == "gpt" else "dim"
            console.print(Text(f"{turn['from']}: {turn['value']}", style=style))
