"""Talk to a model in the terminal: `aerie chat --url http://127.0.0.1:8000`, or one in a folder.

`aerie chat --model <folder>` loads an HF folder (or a hub id) into this process, without a server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.text import Text

from core.config import Config
from core.errors import EXIT_DONE, EXIT_FAILURE, UserError
from core.runtime.job import guarded
from serve.text import Span

if TYPE_CHECKING:
    from serve.local_chat import LocalChat

LONGEST_ANSWER = 512
# Characters that are shown of an error that is not the server's own.
LONGEST_REFUSAL = 200
HELP = "/reset forgets the conversation, /stats shows the last answer's figures, /quit leaves"


class Chat:
    """A conversation with a server; its messages and the last answer's figures."""

    def __init__(self, client: httpx.Client, model: str, settings: dict[str, Any]) -> None:
        self.messages: list[dict[str, str]] = []
        self.figures: dict[str, Any] = {}
        self._client, self._settings = client, {"model": model, **settings}

    def ask(self, text: str) -> Iterator[Span]:
        """Yields spans of the answer; the question is kept only if it was answered.

        Raises:
            httpx.HTTPError: the server is gone, or refuses; the message is its own.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        body = {**self._settings, "messages": messages, "stream": True, "aerie": {"spans": True}}
        answer = ""
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise httpx.HTTPError(_refusal(response))
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data in ("", "[DONE]"):
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise httpx.HTTPError(_message(chunk))
                self.figures = chunk.get("aerie") or self.figures
                for span, drafted in chunk["choices"][0].get("aerie", {}).get("spans", []):
                    answer += span
                    yield span, drafted
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="aerie chat", description=__doc__, epilog=HELP)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    where.add_argument("--model", help="HF folder or hub id, loaded here instead of a server")
    parser.add_argument("--name", help="of a server's model, where it has several; else its first")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-in-8bit", action="store_true", help="with --model: int8 weights")
    bits.add_argument("--load-in-4bit", action="store_true", help="with --model: NF4 weights")
    parser.add_argument("--temperature", type=float, help="the server's default if not given")
    parser.add_argument("--max-tokens", type=int, help="longest answer, in tokens")
    parser.add_argument(
        "--key-env",
        default="AERIE_API_KEY",
        metavar="NAME",
        help="environment variable with the API key, where the server asks for one (%(default)s)",
    )
    arguments = parser.parse_args(argv)
    key = os.environ.get(arguments.key_env, "").strip()
    given = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    settings = {name: value for name, value in given.items() if value is not None}
    console = Console(highlight=False)
    if arguments.model:
        return guarded(lambda: _here(console, arguments), "aerie chat")
    if arguments.load_in_8bit or arguments.load_in_4bit:
        parser.error("--load-in-8bit and --load-in-4bit go with --model: a server has loaded its")
    with httpx.Client(
        base_url=arguments.url,
        timeout=httpx.Timeout(10, read=None),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    ) as client:
        try:
            response = client.get("/v1/models")
            if response.status_code == 401:
                print(f"aerie chat: {arguments.url} asks for an API key, and {arguments.key_env} "
                      "does not hold it; set it, or give --key-env", file=sys.stderr)  # fmt: skip
                return EXIT_FAILURE
            there = _models(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            print(f"aerie chat: no server at {arguments.url} ({error}); start one with "
                  "`aerie serve` or give --url", file=sys.stderr)  # fmt: skip
            return EXIT_FAILURE
        model = arguments.name or there[0]
        if model not in there:
            print(f"aerie chat: --name {model}: {arguments.url} has {', '.join(there)}",
                  file=sys.stderr)  # fmt: skip
            return EXIT_FAILURE
        console.print(f"{model} at {arguments.url}. {HELP}.", style="dim")
        console.print("Tokens that the draft head guessed are green.", style="dim")
        _converse(console, Chat(client, model, settings))
    return EXIT_DONE


def _here(console: Console, arguments: argparse.Namespace) -> None:
    # torch, where a server is asked, would be loaded for nothing.
    from serve.local_chat import LocalChat

    bits = "int8" if arguments.load_in_8bit else "nf4" if arguments.load_in_4bit else "none"
    config = Config().replace(
        target={"path": arguments.model, "quantization": bits},
        decode={"temperature": arguments.temperature or 0.0},
    )
    chat = LocalChat(config, arguments.max_tokens or LONGEST_ANSWER)
    console.print(f"{arguments.model}. {HELP}.", style="dim")
    _converse(console, chat)


def _converse(console: Console, chat: Chat | LocalChat) -> None:
    while True:
        try:
            line = console.input("[bold]› [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.messages.clear()
            console.print("forgotten", style="dim")
        elif line == "/stats":
            console.print(_stats(chat.figures), style="dim")
        elif line.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            _answer(console, chat, line)


def _answer(console: Console, chat: Chat | LocalChat, question: str) -> None:
    try:
        for span, drafted in chat.ask(question):
            console.print(Text(span, style="green" if drafted else ""), end="")
        console.print()
    except KeyboardInterrupt:
        console.print("\nstopped", style="dim")
    except (httpx.HTTPError, UserError) as error:
        console.print(Text(f"\n{error}", style="red"))


def _stats(figures: dict[str, Any]) -> str:
    if not figures:
        return "no answer yet"
    said = [f"{figures['tokens_per_second']:.1f} tokens/s"]
    # Not every backend tells of its rounds.
    if "accepted_length" in figures:
        said.append(f"accepted length {figures['accepted_length']:.2f}, {figures['rounds']} rounds")
    return ", ".join(said)


def _message(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])


def _refusal(response: httpx.Response) -> str:
    """The server's reason, or what a proxy in front of it says."""
    try:
        return _message(response.json())
    except (ValueError, KeyError, TypeError):
        said = " ".join(response.text.split())[:LONGEST_REFUSAL]
        return f"{response.status_code} {response.reason_phrase}: {said or 'no reason is given'}"


def _models(response: httpx.Response) -> list[str]:
    """The models that a server lists, one at least.

    Raises:
        httpx.HTTPError: it refuses, or what answers is no such server.
    """
    if response.is_error:
        raise httpx.HTTPError(_refusal(response))
    try:
        names = [str(one["id"]) for one in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise httpx.HTTPError("what answers there lists no models")
    return names


if __name__ == "__main__":
    sys.exit(main())
