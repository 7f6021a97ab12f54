"""A stand-in for vLLM's environment: run as its Python, it answers what vLLM's server was recorded.

It imports the standard library alone. A request must have the very body that was recorded: what
vLLM would have made of another one, nobody knows. Arguments of its own, by
`serve.vllm_arguments`: `--fail` ends it while it starts, `--child FILE` starts a process that would
outlive it and writes its id there. A request for DIES tokens ends it in mid-answer, and one for
HANGS tokens gets its first chunk and no further one.
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "unit" / "vllm_recorded.json"
DIES, HANGS = 13, 14


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    streams: tuple[dict[str, Any], ...] = ()

    def do_GET(self) -> None:
        self._send(200, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        special = body["max_tokens"] in (DIES, HANGS)
        for stream in self.streams:
            if special or stream["body"] == body:
                break
        else:
            error = {"message": f"nobody asked vLLM {body}", "param": None, "code": 400}
            self._send(400, json.dumps({"error": error}).encode())
            return
        self.send_response(stream["status"])
        self.send_header("Connection", "close")
        self.end_headers()
        for line in stream["lines"]:
            self.wfile.write(f"{line}\n\n".encode())
            self.wfile.flush()
            if body["max_tokens"] == DIES:
                os._exit(7)
            if body["max_tokens"] == HANGS:
                # Until the client is gone: it has nothing more to say.
                self.rfile.read(1)
                return
        self.close_connection = True

    def address_string(self) -> str:
        return "a Unix socket"

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


def main(arguments: list[str]) -> int:
    if arguments[0] == "-c":
        print("vLLM stand-in")
        return 0
    if "--fail" in arguments:
        print("there is no such model", file=sys.stderr)
        return 3
    if "--child" in arguments:
        child = subprocess.Popen(["sleep", "1000"])
        Path(arguments[arguments.index("--child") + 1]).write_text(f"{child.pid} {os.getpid()}")
    Handler.streams = tuple(json.loads(RECORDED.read_text(encoding="utf-8"))["streams"])
    with UnixServer(arguments[arguments.index("--uds") + 1], Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
