"""Test the client of a model's endpoint against real servers: one that answers, and all the ways in which others fail."""

import datetime
import ipaddress
import json
import ssl
import threading
import time
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.campaign.errors import ConfigError
from pipeline.external import chat
from pipeline.model_calls.endpoint import post_chat
from pipeline.model_calls.failures import of_status
from pipeline.model_calls.secret import Secret
from tests.support.endpoints import (
    ECHOES,
    GOOD,
    KEY,
    cut_short,
    endpoint,
    failure,
    good,
    huge,
    malformed,
    redirecting,
    send,
    server,
    silent,
    status,
)  # fmt: skip


def dripping(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """A byte now and then: each arrives in time, the whole never does."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def slow_head(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for number in range(100):
        handler.wfile.write(f"X-{number}: 1\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.05)


def test_the_answer_comes_back_byte_for_byte():
    with server(good) as (url, seen):
        asked = endpoint(url)
        request = chat.body(asked, "rules", "facts", "proposals", {"type": "object"})
        assert post_chat(asked, request) == GOOD
    headers, content = seen[0]
    assert content == request and "Authorization" not in headers
    assert json.loads(content)["response_format"]["json_schema"]["strict"] is True


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (huge, "endpoint_too_large"),
        (malformed, "endpoint_broken"),
        (cut_short, "endpoint_broken"),
        (status(500), "endpoint_server"),
        (status(401), "endpoint_credentials"),
        (status(404), "endpoint_address"),
        (status(418), "endpoint_status"),
        *((redirecting(number), "endpoint_redirect") for number in (301, 302, 303, 307, 308)),
    ],
)
def test_every_other_server_is_a_typed_failure(answer, kind):
    with server(answer) as (url, seen):
        assert failure(endpoint(url)).kind == kind
    assert len(seen) == 1  # nothing is asked twice, and a redirect is not followed


@pytest.mark.parametrize("answer", [silent, dripping, slow_head])
def test_the_whole_call_has_one_deadline(answer):
    with server(answer) as (url, _):
        began = time.monotonic()
        assert failure(endpoint(url, timeout_seconds=0.3)).kind == "endpoint_timeout"
        assert time.monotonic() - began < 0.9
        while time.monotonic() - began < 2 and _callers():
            time.sleep(0.05)
        assert not _callers()  # a slow head, which goes on for five seconds, keeps neither thread nor socket


def _callers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "chat"]


def test_nobody_there():
    with server(good) as (url, _):
        pass
    assert failure(endpoint(url)).kind == "endpoint_unreachable"


def test_a_key_is_sent_in_the_header_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_KEY", KEY)
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    with server(good) as (url, seen):
        for asked in (endpoint(url, api_key_env="MODEL_KEY"), endpoint(url, api_key_file=str(path))):
            post_chat(asked, chat.body(asked, "rules", "facts", "proposals", {}))
            assert KEY not in repr(asked)
    for headers, content in seen:
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert KEY.encode() not in content
    assert KEY not in repr(asked.read_key())


def test_the_key_is_read_when_the_call_is_made(monkeypatch):
    asked = endpoint("http://127.0.0.1:1", api_key_env="MODEL_KEY")
    monkeypatch.setenv("MODEL_KEY", "one")
    assert asked.read_key() == Secret("one")
    monkeypatch.setenv("MODEL_KEY", "two")
    assert asked.read_key() == Secret("two")


@pytest.mark.parametrize("text", [None, "", " \n", "kéy", "a\nb", "a\rInjected: 1"])
def test_without_a_key_nothing_is_asked(text, monkeypatch, tmp_path):
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
    with server(good) as (url, seen):
        assert failure(endpoint(url, api_key_file=str(path))).kind == "endpoint_key"
        monkeypatch.delenv("MODEL_KEY", raising=False)
        assert failure(endpoint(url, api_key_env="MODEL_KEY")).kind == "endpoint_key"
    assert not seen


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_an_answer_that_repeats_the_key_is_dropped(echo, monkeypatch):
    monkeypatch.setenv("MODEL_KEY", KEY)
    with server(lambda handler, content: send(handler, b'{"a": "' + echo + b'"}')) as (url, _):
        assert failure(endpoint(url, api_key_env="MODEL_KEY")).kind == "endpoint_key_echoed"


def test_an_error_page_that_repeats_the_key_is_not_quoted(monkeypatch):
    monkeypatch.setenv("MODEL_KEY", KEY)
    with server(status(500)) as (url, _):
        assert "status 500" in str(failure(endpoint(url, api_key_env="MODEL_KEY")))


def self_signed(folder) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, False).sign(key, hashes.SHA256())
    )  # fmt: skip
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_a_certificate_that_nobody_vouches_for_is_refused_and_a_sites_own_serves(tmp_path, monkeypatch):
    with server(good, self_signed(tmp_path)) as (url, seen):
        assert failure(endpoint(url)).kind == "endpoint_tls"
        assert not seen
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert post_chat(endpoint(url), b"{}") == GOOD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": ""}, "not an http or https address"),
        ({"url": "ftp://example.com"}, "not an http or https"),
        ({"url": "file:///etc/passwd"}, "not an http or https"),
        ({"url": "http://example.com:port/"}, "not an http or https"),
        ({"url": "http://a b/"}, "not an http or https"),
        ({"url": "https://me:secret@example.com/v1"}, "holds a name or password"),
        ({"model": ""}, "model is empty"),
        ({"api_key_env": "A", "api_key_file": "/b"}, "names two keys"),
        ({"url": "http://example.com/v1", "api_key_env": "A"}, "in clear"),
        ({"url": "https://example.com/v1"}, "ends in '/v1', and no endpoint takes a chat there"),
        ({"url": "https://example.com"}, "ends in 'nothing'"),
    ],
)
def test_what_cannot_be_asked_safely_is_a_configuration_error(changes, message):
    asked = endpoint(**{"url": "https://example.com/v1/chat/completions", **changes})
    with pytest.raises(ConfigError, match=message) as error:
        asked.check_settings()
    assert "secret" not in str(error.value)


def test_a_key_may_go_in_clear_to_this_machine_alone():
    for host in ("127.0.0.1", "localhost", "[::1]"):
        endpoint(f"http://{host}:8000/v1/chat/completions", api_key_env="A").check_settings()


def test_the_same_question_is_the_same_bytes():
    asked = endpoint("http://127.0.0.1")
    one = chat.body(asked, "rules", "fäcts", "proposals", {"b": 1, "a": [2]}, 3)
    assert one == chat.body(asked, "rules", "fäcts", "proposals", {"a": [2], "b": 1}, 3)
    assert one.isascii() and b'"temperature":0' in one and b'"seed":3' in one


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("20", 20), ("0.2", 1), ("0", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", None), ("-5", None), ("1e9", None), ("9" * 400, None),
     ("", None)],
)  # fmt: skip
def test_the_time_that_an_endpoint_asks_to_wait_is_read_where_it_is_one(header, seconds):
    assert of_status(429, header, b"", "worker.endpoint").retry_after == seconds
    assert of_status(401, header, b"", "worker.endpoint").retry_after is None


def test_a_date_in_the_future_is_so_many_seconds_from_now():
    header = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90), usegmt=True)
    assert 80 <= (of_status(503, header, b"", "worker.endpoint").retry_after or 0) <= 91
