"""vLLM's own server as a child process: started, waited for, watched, and ended."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from core.errors import AerieError, StageError
from core.progress import format_seconds, say

SUPERVISOR = Path(__file__).with_name("supervisor.py")
# Of the log's end that an error repeats, in characters.
SAID = 2000
LOOK_EVERY_S, SAY_EVERY_S = 0.2, 10.0
# A server that starts may take connections and not answer; one at work may take a while.
READY_S, ANSWER_S = 2.0, 20.0
STOP_S = 20.0
# HTTP wants a name, also over a Unix socket.
HOST = "http://vllm"


class ServerEndedError(AerieError):
    """vLLM's server has ended, or cannot answer any more."""


class Server:
    """It ends when `close` is called, or with this process, however that ends.

    Attributes:
        folder: for what the server reads and writes, this user's alone; it goes with it.
        socket: a Unix socket in there, on which it is to listen: no port is taken, and nobody
            else on the machine can ask it, past Aerie's keys.
        log: what it says.
    """

    def __init__(self, on_end: Callable[[], None] | None = None) -> None:
        """Nothing is started yet.

        Args:
            on_end: called, in a thread, when it ends without having been told to.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="aerie-vllm-"))
        self.socket, self.log = self.folder / "http", self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._on_end, self._closing = on_end, False
        self._ended = threading.Event()
        self._last_words: str | None = None

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float
    ) -> None:
        """Start it, and wait until it answers.

        Args:
            command: which runs in `folder`.
            environment: all of its variables.
            timeout_s: how long it may take.
        Raises:
            StageError: it ended, or took longer; with the end of what it said.
        """
        supervised = [sys.executable, str(SUPERVISOR), str(self.folder), *command]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                supervised,
                cwd=self.folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready(timeout_s)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="vllm", daemon=True).start()

    def close(self) -> None:
        """End it, and forget its files."""
        self._closing = True
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def ended(self) -> bool:
        """Whether it no longer runs."""
        return self._process is None or self._process.poll() is not None

    def wait_for_end(self, seconds: float) -> bool:
        """Give what was seen of its end the time to be told; whether it has ended."""
        return self._ended.wait(seconds)

    def said(self) -> str:
        """The end of what it wrote."""
        if self._last_words is not None:
            return self._last_words
        try:
            return self.log.read_text(errors="replace")[-SAID:]
        except OSError as error:
            return f"(its log cannot be read: {error})"

    async def check(self, client: httpx.AsyncClient) -> None:
        """Ask whether it is well.

        Raises:
            ServerEndedError: it is not, or is no more.
        """
        if self.ended:
            raise ServerEndedError(f"vLLM's server has ended; it said\n{self.said()}")
        try:
            response = await client.get("/health", timeout=ANSWER_S)
        except httpx.HTTPError as error:
            raise ServerEndedError(f"vLLM's server does not answer: {error!r}") from error
        if response.status_code != 200:
            raise ServerEndedError(f"vLLM's server is not well (HTTP {response.status_code})")

    def _wait_until_ready(self, timeout_s: float) -> None:
        began = said = time.monotonic()
        transport = httpx.HTTPTransport(uds=str(self.socket))
        with httpx.Client(transport=transport, base_url=HOST, timeout=READY_S) as client:
            while not self._answers(client):
                now = time.monotonic()
                if self.ended:
                    raise StageError(f"vLLM's server did not start; it said\n{self.said()}")
                if now - began > timeout_s:
                    raise StageError(
                        f"vLLM's server was not ready in serve.vllm_start_s={timeout_s:g} "
                        f"seconds; it said\n{self.said()}"
                    )
                if now - said > SAY_EVERY_S:
                    said = now
                    last = (self.said().splitlines() or [""])[-1]
                    say("serve", f"vLLM starts, {format_seconds(now - began)}: {last[:120]}")
                time.sleep(LOOK_EVERY_S)
        say("serve", f"vLLM is ready, after {format_seconds(time.monotonic() - began)}")

    @staticmethod
    def _answers(client: httpx.Client) -> bool:
        try:
            return client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def _watch(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        if not self._closing:
            self._last_words = self.said()
            # This process may be about to leave too.
            shutil.rmtree(self.folder, ignore_errors=True)
            say("serve", f"vLLM's server has ended with {code}; it said\n{self.said()}")
            if self._on_end is not None:
                self._on_end()
        self._ended.set()
