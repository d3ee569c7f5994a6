"""Real HTTP servers that stand in for a model's endpoint, and how a test asks them."""

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.external import chat
from pipeline.model_calls.endpoint import CHUNK, Endpoint, post_chat
from pipeline.model_calls.failures import KINDS, EndpointFailed

KEY = "sk-test-0123456789abcdef"
GOOD = b'{"choices": [{"message": {"content": "{\\"proposals\\": []}"}}]}'
ECHOES = {
    "plain": KEY.encode(),
    "escaped": "".join(f"\\u{ord(letter):04x}" for letter in KEY).encode(),
    "slashed": KEY.replace("-", "\\-").encode(),
    "base 64": b"c2stdGVzdC0wMTIzNDU2Nzg5YWJjZGVm",
}
Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


class Seen(list[tuple[dict[str, str], bytes]]):
    """Headers and body of every request that came."""


@contextmanager
def server(answer: Answer, certificate: ssl.SSLContext | None = None) -> Iterator[tuple[str, Seen]]:
    """A real HTTP server on a free port; gives its address and what was asked."""
    seen = Seen()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((dict(self.headers), content))
            try:
                answer(self, content)
            except (BrokenPipeError, ConnectionResetError):
                return  # the client has hung up, as it should

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            return

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            return  # a client that does not like our certificate

    listening = Quiet(("127.0.0.1", 0), Handler)
    if certificate:
        listening.socket = certificate.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{listening.server_port}/v1/chat/completions", seen
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def good(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, GOOD)


def silent(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    time.sleep(1)


def huge(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" " * CHUNK)


def malformed(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.wfile.write(b"\x00\x01 not HTTP \xff\r\n\r\n")


def cut_short(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b"{")


def redirecting(status: int) -> Answer:
    return lambda handler, content: send(handler, b"", status, Location="http://localhost:1/elsewhere")


def status(number: int) -> Answer:
    return lambda handler, content: send(handler, f"no, {KEY}".encode(), number)


def endpoint(url: str, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": url, "model": "small", "use": chat.USE, "timeout_seconds": 5.0, **changes})


def failure(asked: Endpoint) -> EndpointFailed:
    with pytest.raises(EndpointFailed) as failed:
        post_chat(asked, b"{}")
    assert failed.value.kind in KINDS
    assert KEY not in str(failed.value) and KEY not in repr(failed.value.__dict__)
    assert "127.0.0.1" not in str(failed.value)
    return failed.value
