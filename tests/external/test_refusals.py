"""Case 11: a board's refusals are told as what they are, in its own words, and nothing that was only late is given up."""

import json
from dataclasses import replace

import pytest

from pipeline.campaign.errors import ConfigError, TargetFailed
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.decision import submission_caps
from pipeline.external import board, board_log
from pipeline.external.kaggle import parse_submissions
from pipeline.external.target_client import CURES, SORTS, WORDS, clean, kind_of_words, one_line
from pipeline.reporting import outside
from tests.support.boards import (
    CAPS,
    DAY,
    KAGGLE,
    NEXT,
    events,
    known,
    num_sent,
    reserve,
    says,
    says_no_more,
    show,
    take,
)

LATE = replace(KAGGLE, give_up_days=7)
SAID = {
    "limit": [
        "0 submissions remaining today.", "Maximum daily submissions reached", "429 - Too Many Requests", "You have no submissions left",
        "Submission not allowed: Your team has used its daily Submission allowance (5) today", "Max 5 entries per day exceeded",
        "400 - Bad Request - You have reached your daily submission limit", "submission quota exceeded",
        "429 Client Error: Too Many Requests for url: https://x\n\nYou have been rate limited. Wait a little while before retrying.",
        "Max retries exceeded (Caused by ResponseError('too many 429 error responses'))",
    ],
    "rules": [
        "Phone verification required", "You must verify your identity before submitting", "Please verify your phone number in your account",
        "403 - Forbidden - You must accept the competition rules", "You have not accepted the rules", "Team size limit exceeded",
        "403 Client Error: Forbidden for url: https://x\n\nYou don't have access to this resource.", "You must join the competition first",
        '{"code":403,"message":"Permission \'competitions.submit\' was denied"}', "You are not eligible",
    ],
    "rejected": [
        "The competition has ended", "This competition is no longer accepting submissions", "Submission deadline has passed",
        "403 - Forbidden - this competition is closed", "413 Client Error: Request Entity Too Large", "File too large, at most 20 GB",
        "Could not find competition - please verify that you entered the correct competition ID and that the competition is still "
        "accepting submissions.", "404 - Not Found", "400 - Bad Request", "Submission must be named submission.zip", "500 rows expected",
    ],
    "credentials": [
        "401 - Unauthorized", "Could not find kaggle.json. Make sure it's located in /root/.kaggle", "Your API token has expired",
        "Authentication required to call the Kaggle API.\n\nFirst, you will need a Kaggle account." + "\nOption A: more words." * 40,
        "<!DOCTYPE html><html><head><title>Log in</title><style>a{}</style></head><body>Please sign in</body></html>",
    ],
    "unreachable": [
        "HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: /v1 (Caused by NameResolutionError('x'))",
        "ConnectionResetError: [Errno 104] Connection reset by peer", "Read timed out. (read timeout=60)", "502 Server Error: Bad Gateway",
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "Tunnel connection failed: 403 Forbidden", "[Errno 111] Connection refused",
        "curl: (22) The requested URL returned error: 503", "500 - Internal Server Error", "[Errno 101] Network is unreachable",
        "<html><head><title>504 Gateway Time-out</title></head><body><hr>nginx</body></html>",
        "503 Server Error: x\n\nThis is a problem on Kaggle's side, not with your command. Please try again later.",
    ],
    "client_broken": [
        "ModuleNotFoundError: No module named 'requests'", "usage: kaggle [-h]\nkaggle: error: unrecognized arguments: --csv",
        "OSError: [Errno 122] Disk quota exceeded", "PermissionError: [Errno 13] Permission denied: '/root/.kaggle/kaggle.json'",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for kind, all_of in SAID.items() for words in all_of])
def test_case_11_words_have_a_kind(kind: str, words: str) -> None:
    assert kind_of_words(one_line(words)) == kind
    assert {kind for kind, _ in SORTS} | {"rejected"} <= set(CURES)


@pytest.mark.parametrize(("kind", "where"), list(zip(SAID, ["err", "out"] * 3, strict=True)))
def test_case_11_a_refused_upload_is_logged_with_the_boards_words_and_sent_later(campaign, client, kind, where):
    words = SAID[kind][0]
    reserve(campaign)
    bar = "100%|##########| 66.0k/66.0k [00:04<00:00, 15.2kB/s]\r"
    hint = "\nIf this is unexpected, you can re-run with `kaggle --debug [command]` to see the full\ntraceback. If you think this is a bug, tell"
    says(client, "submit", **{where: f"{bar}\n{words}{hint}"})
    assert f"has no score: kaggle ended with exit code 1: {words.rstrip('.')}" in take(campaign)[0]
    assert (known(campaign)[0].state, known(campaign)[0].why) == (
        "failed",
        f"{kind}: kaggle ended with exit code 1: {clean(words)}",
    )
    [trouble] = outside.troubles(campaign)
    assert (trouble.who, trouble.kind, trouble.cure) == ("board", kind, CURES[kind]) and words in trouble.what
    says_no_more(client)
    take(campaign)
    assert (known(campaign)[0].state, num_sent(client)) == ("sent", 1)
    assert outside.troubles(campaign) == []


def test_case_11_a_client_that_ends_well_and_sends_nothing_is_sorted_by_its_words(campaign, client):
    reserve(campaign)
    says(client, "submit", code=0, out="0 submissions remaining today.\n")
    take(campaign)
    assert (
        known(campaign)[0].why
        == "limit: the client ended well, but nothing was submitted: 0 submissions remaining today."
    )
    says(client, "submit", code=-9)
    take(campaign)
    assert known(campaign)[0].why.startswith("unclear: ")


def test_case_11_after_a_refusal_for_quota_nothing_more_is_uploaded_and_no_day_is_used(campaign, client):
    for arm in ("a1", "a2", "a3"):
        reserve(campaign, arm)
    says(client, "submit", err="Maximum daily submissions reached")
    said = take(campaign)
    assert "Maximum daily submissions reached" in said[0] and all(
        "takes no more submissions now" in line for line in said[1:]
    )
    assert (client / "calls").read_text().count("competitions submit\n") == 1
    says_no_more(client)
    take(campaign, today=NEXT)
    assert num_sent(client) == 3 and [sorted(each.days) for each in known(campaign)] == [[DAY, NEXT]] * 3
    assert events(campaign).count("board_attempt") == 4  # the two others were begun once, on the day on which they went
    submission_caps.verify(Log(campaign.log).records(), CAPS)


@pytest.mark.parametrize(
    ("status", "column"),
    [("SubmissionStatus.ERROR", "errorDescription"), ("error", "error_message"), ("SUBMISSIONSTATUS.Error", "Public Error"), ("failed", "ERROR")],
)  # fmt: skip
def test_case_11_an_error_column_of_any_name_is_shown(campaign, client, status, column):
    reserve(campaign)
    take(campaign)
    show(client, 1, status=status, **{column: "Evaluation exception:\nadapter has rank 64, token KGAT_abc"})
    for _ in range(2):
        take(campaign)
    why = "rejected: Kaggle could not score it: Evaluation exception: adapter has rank 64, token ***"
    assert (known(campaign)[0].state, known(campaign)[0].why, num_sent(client)) == ("failed", why, 1)
    assert events(campaign).count("board_score") == 1


@pytest.mark.parametrize(
    ("status", "missing"), [("SubmissionStatus.COMPLETE", ""), ("complete", "None"), ("COMPLETED", "nan")]
)
def test_case_11_complete_without_a_score_is_waited_for(campaign, client, status, missing):
    reserve(campaign)
    take(campaign)
    show(client, 1, status=status, publicScore=missing)
    assert take(campaign, LATE, today=NEXT) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    assert known(campaign)[0].state == "sent" and outside.troubles(campaign) == []
    show(client, 1, status=status, publicScore="0.84")
    assert take(campaign, LATE, today=NEXT) == ["number 1 (r0001/a1, slot) scored 0.84"]


def test_case_11_complete_without_a_score_and_with_an_error_is_rejected_until_it_has_one(campaign, client):
    reserve(campaign)
    take(campaign)
    show(client, 1, errorDescription="scoring failed")
    take(campaign)
    assert known(campaign)[0].why == "rejected: Kaggle could not score it: scoring failed"
    show(client, 1, publicScore="0.5", errorDescription="rescored")
    take(campaign)
    assert (known(campaign)[0].printed, Log(campaign.log).records()[-1]["note"]) == ("0.5", "rescored")


def test_case_11_a_score_is_given_up_after_the_configured_days_and_taken_all_the_same(campaign, client):
    reserve(campaign)
    take(campaign, LATE)
    show(client, 1, publicScore="")
    take(campaign, LATE, today="2026-12-01")
    assert known(campaign)[0].state == "sent"
    for _ in range(2):
        assert "no score 7 days after it was sent" in take(campaign, LATE, today="2026-12-02")[0]
    assert (known(campaign)[0].state, known(campaign)[0].why) == ("failed", "late: no score 7 days after it was sent")
    assert events(campaign) == ["submission", "board_attempt", "board_sent", "board_score"]
    assert not board.is_waited_for(known(campaign)[0])
    assert outside.troubles(campaign)[0].cure == CURES["late"]
    show(client, 1, publicScore="0.84")
    assert take(campaign, LATE, today="2027-01-01") == ["number 1 (r0001/a1, slot) scored 0.84"]
    assert num_sent(client) == 1


def test_case_11_without_days_and_for_private_scores_nothing_is_given_up(campaign, client):
    reserve(campaign)
    for external in (KAGGLE, replace(LATE, score="private")):
        for day in (DAY, "2027-12-01"):
            assert take(campaign, external, today=day) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    with pytest.raises(ConfigError, match="external.give_up_days"):
        settings.compose(["external=kaggle", "external.give_up_days=-1"])


def test_case_11_a_list_that_cannot_be_had_once_is_asked_for_again_in_the_same_pass(campaign, client, monkeypatch):
    monkeypatch.setattr(board, "POLL_SECONDS", 0.01)
    monkeypatch.setattr("pipeline.external.kaggle.LIST_SECONDS", 0.0)
    reserve(campaign)
    take(campaign)
    show(client, 1, publicScore="0.84")
    says(client, "submissions", err="503 Server Error: Service Unavailable")
    monkeypatch.setattr(
        board.time, "sleep", lambda seconds: says_no_more(client) if (client / "says.json").exists() else None
    )
    assert take(campaign, replace(KAGGLE, wait_seconds=60)) == ["number 1 (r0001/a1, slot) scored 0.84"]
    assert events(campaign)[-2:] == ["board_score", "board_score"]


def test_case_11_what_is_pending_after_a_broken_connection_is_no_failure_any_more(campaign, client):
    reserve(campaign)
    take(campaign)
    says(client, "submissions", err="Connection reset by peer")
    take(campaign)
    assert known(campaign)[0].why.startswith("unreachable: ")
    says_no_more(client)
    take(campaign)
    assert (known(campaign)[0].state, known(campaign)[0].why, outside.troubles(campaign)) == ("sent", "", [])


LIST = 'ref,fileName,date,description,status,publicScore,privateScore\n1,a.zip,2026-11-24,"one, two",SubmissionStatus.PENDING,,\n'


@pytest.mark.parametrize(
    "text", [LIST, "\ufeff" + LIST, LIST.replace("\n", "\r\n"), "Using competition: x\n\n" + LIST, LIST.replace("fileName", '"file_name"')]
)  # fmt: skip
def test_case_11_a_list_is_read_in_every_spelling(text):
    [row] = parse_submissions(text)
    assert (row["description"], row["status"], row["publicscore"]) == ("one, two", "SubmissionStatus.PENDING", "")


def test_case_11_a_cell_of_several_lines_does_not_end_its_row():
    text = (
        'description,errorDescription,status,Public_Score\nours,"first\n\nNo submissions",ERROR,\nother,,COMPLETE,0.5\n'
    )
    assert [row["description"] for row in parse_submissions(text)] == ["ours", "other"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("429 - Too Many Requests", "limit"), ("<html><title>502 Bad Gateway</title></html>", "unreachable"), ("Hello", "unclear"),
     (f"description\n{'x' * 200_000}\n", "unclear")],
)  # fmt: skip
def test_case_11_what_is_printed_in_place_of_a_list_has_a_kind(text, kind):
    with pytest.raises(TargetFailed) as failed:
        parse_submissions(text)
    assert failed.value.kind == kind and failed.value.cure


def test_case_11_long_words_keep_their_beginning_and_their_end():
    said = clean("Maximum daily submissions reached. " + "x " * 300 + "ValueError: the last line")
    assert (
        said.startswith("Maximum daily submissions reached.") and said.endswith("the last line") and len(said) <= WORDS
    )
    assert (
        clean("Authorization: Bearer sk-1234 and Set-Cookie: session=abc; path")
        == "Authorization: Bearer *** and ***; path"
    )


def test_case_11_a_score_that_a_person_typed_after_a_refusal_stands(campaign, client):
    reserve(campaign)
    says(client, "submit", err="The competition has ended")
    take(campaign)
    board_log.set_score(campaign, 1, "0.5")
    take(campaign)
    assert known(campaign)[0].printed == "0.5" and outside.troubles(campaign) == []
    assert json.loads(campaign.log.read_text().splitlines()[-1])["by"] == "person"
