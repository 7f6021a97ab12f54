"""Aerie's side of a comparison: export a head, count what chains of its drafts get accepted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from core.config import Config
from core.data.prompts import read_prompts
from core.data.template import encode_prompt
from core.decode.load import load_decoder
from core.draft.export import export_head
from core.draft.formats import ExportTarget, read_head
from core.draft.formats.files import TOKEN_MAP
from core.evaluate.session import select_prompts


@dataclass(frozen=True)
class ExportedFor:
    """An exported head and its target's folder."""

    folder: Path
    kind: str
    target: Path


def export_for(target: Path, head: Path, format_name: str, folder: Path) -> ExportedFor:
    """Export a head in float32, with nothing beside it that the engine does not read."""
    about = AutoConfig.from_pretrained(target)
    found = read_head(head)
    to = ExportTarget.of(str(target.absolute()), about)
    export_head(folder, found.head, to, format_name, "float32")
    (folder / TOKEN_MAP).unlink(missing_ok=True)
    return ExportedFor(folder, found.head.config.kind, target)


def count_chain(
    exported: ExportedFor, *, prompts: Path, max_prompts: int, max_new_tokens: int, num_tokens: int
) -> dict[str, Any]:
    """Decode greedily with chains of `num_tokens` drafts.

    Returns:
        Counts by vLLM's names (`drafts` are rounds), the prompts' token ids and the answers'.
    """
    config = Config().replace(
        target={"path": str(exported.target), "dtype": "float32"},
        draft={"kind": exported.kind, "path": str(exported.folder)},
        decode={"top_k": 1, "depth": num_tokens - 1, "total_tokens": num_tokens + 1},
    )
    decoder = load_decoder(config, num_threads=2).decoder
    tokenizer = decoder.target.tokenizer
    chosen = select_prompts(read_prompts(prompts), max_prompts)
    prompt_ids = [encode_prompt(tokenizer, prompt.messages) for prompt in chosen]
    by_place, rounds, answers = [0] * num_tokens, 0, []
    for ids in prompt_ids:
        tokens: list[int] = []
        for done in decoder.generate(ids, max_new_tokens=max_new_tokens):
            tokens += done.tokens
            if done.tree_size:
                rounds += 1
                for place in range(len(done.ranks)):
                    by_place[place] += 1
        answers.append(tokens)
    return {
        "drafts": rounds,
        "draft_tokens": rounds * num_tokens,
        "accepted_tokens": sum(by_place),
        "accepted_tokens_per_pos": by_place,
        "prompts": prompt_ids,
        "token_ids": answers,
    }
