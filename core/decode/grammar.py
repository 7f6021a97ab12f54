"""Answers that must follow a JSON schema: at each node of a draft tree, what may come next.

A grammar takes part in a choice as bias and penalties do: by the logits. So speculation under it
gives what plain decoding under it would.

Shapes: N tree nodes, V target vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor

from core.decode.tree import DraftTree
from core.errors import InputError

Result = TypeVar("Result")

# Between a value and the next sign. Without an end to it, small models say nothing else.
WHITESPACE = r"[ \n]{0,12}"
# Schemas that are kept; to read a large one takes a second.
MOST_SCHEMAS = 32
# The library reads a schema by recursion, through references too, and ends the process where the
# stack does. So the stack has room for this many objects and lists inside each other.
MOST_PARTS, STACK_BYTES = 10_000, 256 * 2**20
# The first signs that a schema allows are found between rounds of everybody's: a second for 100,000
# characters in one string, on a slow machine.
MOST_CHARACTERS = 300_000
_stack_size = threading.Lock()


class JsonGrammars:
    """Makes constraints for a target's tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Build a table of all tokens, which takes a second.

        Args:
            tokenizer: of transformers.
            vocab_size: rows of the target's logits.
            eos_token_ids: that end an answer.
        """
        ends = sorted(eos_token_ids)
        # Not of torch: filling so many values would start threads in whichever thread this is.
        end_V = np.zeros(vocab_size, dtype=bool)
        end_V[ends] = True
        self._end_V = torch.from_numpy(end_V)
        self._lock = threading.Lock()
        self._begun: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._tokens: llguidance.LLTokenizer | InputError
        try:
            self._tokens = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocab_size, eos_token=ends
            )
        except ValueError as error:
            self._tokens = InputError(f"this target's tokenizer has no JSON grammars: {error}")

    def constraint(self, schema: str) -> Constraint:
        """For one answer; any thread may ask. Of the schemas asked for last, none is read again.

        Args:
            schema: a JSON schema, as JSON.
        Raises:
            InputError: it is no schema, or one that the library does not know, or the target's
                tokenizer has no grammars.
        """
        begun = self._begun.get(schema) or self._compiled(schema)
        with self._lock:
            self._begun[schema] = begun
            self._begun.move_to_end(schema)
            if len(self._begun) > MOST_SCHEMAS:
                self._begun.popitem(last=False)
            return Constraint(begun.deep_copy(), self._end_V)

    def _compiled(self, schema: str) -> llguidance.LLMatcher:
        if isinstance(self._tokens, InputError):
            raise self._tokens
        parts = schema.count("{") + schema.count("[")
        if parts > MOST_PARTS:
            raise InputError(
                f"the JSON schema has {parts} objects and lists; give one of {MOST_PARTS} at most"
            )
        if len(schema) > MOST_CHARACTERS:
            raise InputError(
                f"the JSON schema has {len(schema)} characters; give one of {MOST_CHARACTERS} at "
                "most"
            )
        return _on_a_deep_stack(partial(_matcher, self._tokens, schema))


def _matcher(tokens: llguidance.LLTokenizer, schema: str) -> llguidance.LLMatcher:
    try:
        options: Any = {"whitespace_pattern": WHITESPACE}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise InputError(f"the JSON schema cannot be used: {str(error)[:500]}") from error
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
    if matcher.is_error():
        raise InputError(f"the JSON schema cannot be used: {matcher.get_error()[:500]}")
    return matcher


def _on_a_deep_stack(function: Callable[[], Result]) -> Result:
    """The function's result, from a thread of its own. Of its stack, only what is used is taken."""
    done: Future[Result] = Future()

    def work() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    # It is set for all threads that begin now; to others, more than they need does no harm.
    with _stack_size:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=work, name="schema", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()


class Constraint:
    """A grammar, and how far one answer has come in it."""

    def __init__(self, matcher: llguidance.LLMatcher, end_V: Tensor) -> None:
        """Begin before the first token.

        Args:
            matcher: of this answer alone.
            end_V: bool [V]: the tokens that end it.
        """
        self._matcher, self._end_V = matcher, end_V

    def append(self, token_ids: Sequence[int]) -> None:
        """Further tokens of the answer; what comes behind its end does not count."""
        self._matcher.try_consume_tokens(list(token_ids))

    def apply(self, tree: DraftTree, logits_NV: Tensor) -> Tensor:
        """Logits in which what must not come next is minus infinity; `logits_NV` stays as it was.

        Rows of nodes that must not be reached themselves are left alone: nobody gets there.

        Args:
            tree: its root is the last token appended.
            logits_NV: [N, V]; row i scores the token after node i.
        """
        logits_NV = logits_NV.clone()
        tokens = tree.token_ids_N.tolist()

        def visit(node: int) -> None:
            allowed_V = self._allowed().to(logits_NV.device)
            logits_NV[node].masked_fill_(~allowed_V, -math.inf)
            for child in tree.children[node]:
                if allowed_V[tokens[child]] and self._matcher.try_consume_tokens([tokens[child]]):
                    visit(child)
                    self._matcher.rollback(1)

        visit(0)
        return logits_NV

    def _allowed(self) -> Tensor:
        """bool [V]: what may come next."""
        if self._matcher.is_stopped():
            return self._end_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, bitorder="little")[: len(self._end_V)]
        return torch.from_numpy(flags.astype(bool))
