"""A chat endpoint on loopback whose answers and faults a test decides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What to send back."""

    text: str | None = "[[A]]"
    status: int = 200
    delay_s: float = 0.0
    disconnect: bool = False
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A running endpoint."""

    base_url: str
    requests: list[dict[str, Any]]
    """Bodies, in the order they came."""
    keys: list[str]
    busiest: list[int]
    """Requests under way, when each came."""


@contextmanager
def judge_server(reply: Callable[[str, int], Reply]):
    """Serve until the block ends; ``reply`` gets the message and how often it has come before."""
    server = Server(base_url="", requests=[], keys=[], busiest=[])
    lock = threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = body["messages"][-1]["content"]
            with lock:
                before = sum(seen["messages"][-1]["content"] == message for seen in server.requests)
                server.requests.append(body)
                server.keys.append(self.headers.get("Authorization", ""))
                under_way += 1
                server.busiest.append(under_way)
            answer = reply(message, before)
            time.sleep(answer.delay_s)
            with lock:
                under_way -= 1
            if answer.disconnect:
                self.connection.close()
                return
            payload = (
                answer.raw if answer.raw is not None else json.dumps(completion(answer)).encode()
            )
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    http = Quiet(("127.0.0.1", 0), Handler)
    server.base_url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(reply: Reply) -> dict[str, Any]:
    """As OpenAI's interface words it."""
    if reply.status != 200:
        return {"error": {"message": f"status {reply.status}", "type": "fault"}}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": reply.text},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
