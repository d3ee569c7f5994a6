"""Case 11: `unreachable` is the connection alone, a limit is a limit whatever hint follows, and a list is read by its true header."""

import pytest

from pipeline.campaign.errors import TargetFailed
from pipeline.external.kaggle import parse_submissions
from pipeline.external.target_client import kind_of_words, one_line

HEADER = "ref,fileName,date,description,status,publicScore,privateScore"
ROW = "1,a.zip,2026-11-24,ours,SubmissionStatus.COMPLETE,0.84,"


@pytest.mark.parametrize(
    "words",
    [
        "Evaluation exception: column proxy is missing", "ssl_score must be a number", "unexpected column certificate", "tunnel: not a value",
        "the handshake task has no answer", "400 - Bad Request - field proxy_task is not known", "no offline metric", "TLS is no valid family",
        "Column 'ssl' is empty", "adapter trained by proxy does not fit", "row tunnel_7 failed", "failed to establish the rank of the adapter",
        "The certificate of completion is missing", "handshake failed the check of its answer", "chunked encoding of rows is wrong",
    ],
)  # fmt: skip
def test_case_11_one_word_of_a_refusal_is_no_broken_connection(words):
    assert kind_of_words(one_line(words)) == "rejected"


@pytest.mark.parametrize(
    "words",
    [
        "ProxyError('Cannot connect to proxy.', NewConnectionError('x'))", "407 Proxy Authentication Required", "Proxy server refused connections",
        "curl: (56) CONNECT tunnel failed, response 403", "Tunnel connection failed: 503 Service Unavailable", "SSLError(SSLEOFError(8, 'x'))",
        "curl: (60) SSL certificate problem: unable to get local issuer certificate", "TLS handshake failed", "net/http: TLS handshake timeout",
        "[SSL: WRONG_VERSION_NUMBER] wrong version number", "sslv3 alert handshake failure", "x509: certificate signed by unknown authority",
        "ssl.SSLCertVerificationError: hostname mismatch", "EOF occurred in violation of protocol", "Kaggle is currently offline",
        "certificate verify failed: self-signed certificate", "BrokenPipeError: [Errno 32] Broken pipe", "Failed to establish a new connection",
        "gnutls_handshake() failed", "ChunkedEncodingError: x", "Failed to connect to x port 443", "SSL connection error",
    ],
)  # fmt: skip
def test_case_11_a_broken_connection_is_unreachable(words):
    assert kind_of_words(one_line(words)) == "unreachable"


@pytest.mark.parametrize(
    "words",
    [
        "You have reached the maximum of 5 submissions per day. Verify your phone to get more.", "Max 5 submissions. Phone verification gives 10.",
        "Without identity verification 1 entry per day is allowed", "Daily submission limit: verify your phone number for more",
        "0 submissions remaining today; the deadline is 2026-12-01", "Submission limit reached. A larger team size may merge.",
        "You have no more submissions left, phone verification adds some", "Too many submissions; see the rules, and verify your phone",
    ],
)  # fmt: skip
def test_case_11_a_limit_is_a_limit_with_every_hint(words):
    assert kind_of_words(one_line(words)) == "limit"


@pytest.mark.parametrize(
    ("words", "kind"),
    [("Phone verification required to submit", "rules"), ("The maximum for submissions is a file size of 20 GB", "rejected"),
     ("Maximum submission size exceeded, size limit 20 GB", "rejected"), ("Team size limit exceeded", "rules")],
)  # fmt: skip
def test_case_11_other_bounds_are_no_limit_of_submissions(words, kind):
    assert kind_of_words(one_line(words)) == kind


@pytest.mark.parametrize(
    "before",
    [
        "Warning: columns changed, description, see the page", "Note: fileName, description, status, publicScore are shown",
        "a,description,b", "Warning: a,date,description,status,publicScore", "description,status",
    ],
)  # fmt: skip
def test_case_11_a_warning_is_no_header(before):
    [row] = parse_submissions(f"{before}\n{HEADER}\n{ROW}\n")
    assert (row["description"], row["publicscore"]) == ("ours", "0.84")


@pytest.mark.parametrize("text", ["Warning: a, description, b\n", "fileName,description,score\na.zip,ours,0.84\n"])
def test_case_11_a_list_without_its_columns_is_no_list(text):
    with pytest.raises(TargetFailed, match="printed no list") as failed:
        parse_submissions(text)
    assert failed.value.kind == "unclear"


@pytest.mark.parametrize(
    "name", ["publicScore", "public_score", '"PublicScore"', "status", "Description", "privateScore"]
)
def test_case_11_a_column_that_comes_twice_is_unreadable(name):
    with pytest.raises(TargetFailed, match="more than once") as failed:
        parse_submissions(f"{HEADER},{name}\n{ROW},0.1\n")
    assert failed.value.kind == "unclear"
    with pytest.raises(TargetFailed, match="column errordescription more than once"):
        parse_submissions(f"{HEADER},errorDescription,error_description\n{ROW},no,\n")


def test_case_11_further_columns_and_numbered_ones_are_passed_over():
    [row] = parse_submissions(f"{HEADER},publicScore2,,\n{ROW},0.1,,\n")
    assert row["publicscore"] == "0.84"
