"""Test sending to targets of every kind, and every point at which it may crash, with a real log, outbox and client."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, NotFound, Refused, TargetFailed
from pipeline.campaign.files import exclusive_lock
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.config.schema import External
from pipeline.decision import board_submissions
from pipeline.execution import adapter
from pipeline.external import board, board_log, outbox
from pipeline.external.kaggle import Kaggle, parse_submissions
from pipeline.external.target_client import Ticket, clean, run_client
from pipeline.external.targets import target_of
from tests.support.boards import CAPS, DAY, FACTS, KAGGLE, NEXT, digest_of, events, known, num_sent, reserve, show, take
from tests.support.paths import ROOT


def test_whoever_asks_at_once_gets_one_number_and_no_more_than_the_caps(campaign):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: reserve(campaign, "a1"), range(8))) == {1}

        def reserved(arm: str) -> int | str:
            try:
                return reserve(campaign, arm)
            except Refused as refused:
                return refused.code

        found = list(pool.map(reserved, ["a2", "a3", "a4", "a5"] * 3))
    assert {each for each in found if isinstance(each, int)} == {2, 3, 4}
    assert {each for each in found if isinstance(each, str)} == {"daily_cap"}
    assert len(known(campaign)) == CAPS.per_day


def test_a_clock_set_back_gains_nothing(campaign):
    for arm in ("a1", "a2", "a3", "a4"):
        reserve(campaign, arm)
    with pytest.raises(Refused, match="daily_cap"):
        reserve(campaign, "a5", today="2026-01-01")
    assert reserve(campaign, "a5", today=NEXT) == 5


def test_without_a_target_nothing_is_reserved(campaign):
    with pytest.raises(ConfigError, match="no external target"):
        reserve(campaign, target="none")


def test_a_score_that_is_late_is_taken_up_by_the_next_meta_stage(campaign, client):
    assert reserve(campaign) == 1
    assert take(campaign) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    assert board_submissions.known_scores(Log(campaign.log).records()) == {}
    assert take(campaign) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    show(client, 1, publicScore="0.84")
    assert take(campaign, today=NEXT) == ["number 1 (r0001/a1, slot) scored 0.84"]
    assert take(campaign, today=NEXT) == []
    assert num_sent(client) == 1
    assert events(campaign) == ["submission", "board_attempt", "board_sent", "board_score"]
    assert not list(campaign.outbox.iterdir())


def test_a_revised_score_is_a_new_record_and_a_withdrawal_stays(campaign, client):
    reserve(campaign)
    take(campaign)
    for score in ("0.84", "0.86", "0.84"):
        show(client, 1, publicScore=score)
        take(campaign)
    records = [record for record in Log(campaign.log).records() if record["event"] == "board_score"]
    assert [record["score"] for record in records] == ["0.84", "0.86", "0.84"]
    board_log.set_score(campaign, 1, None)
    show(client, 1, publicScore="0.9")
    take(campaign)
    assert known(campaign)[0].state == "withdrawn"
    assert not board_log.record(Log(campaign.log), {"number": 1, "score": "0.9"})  # asked for before it was withdrawn
    assert known(campaign)[0].state == "withdrawn"
    board_log.set_score(campaign, 1, "0.84")  # a person gives it back
    assert known(campaign)[0].printed == "0.84"


def test_what_a_person_knows_better_stands_until_the_target_says_something_new(campaign, client):
    reserve(campaign)
    take(campaign)
    show(client, 1, publicScore="0.50")
    take(campaign)
    board_log.set_score(campaign, 1, "0.61")
    take(campaign)
    assert known(campaign)[0].printed == "0.61"
    show(client, 1, publicScore="0.55")
    take(campaign)
    assert known(campaign)[0].printed == "0.55"


def test_what_is_sent_past_midnight_counts_on_the_next_day(campaign, client, monkeypatch):
    days = iter([DAY, NEXT, NEXT])
    monkeypatch.setattr(board_log, "utc_day", lambda: next(days))
    for arm in ("a1", "a2", "a3"):
        reserve(campaign, arm)
    take(campaign, today=None)
    acts = [record["day"] for record in Log(campaign.log).records() if record["event"] == "board_attempt"]
    assert acts == [DAY, NEXT, NEXT]


def test_a_late_submission_is_told_apart(campaign, client):
    reserve(campaign)
    take(campaign)
    show(client, 1, publicScore="0.84", privateScore="0.83")
    take(campaign)
    record = Log(campaign.log).records()[-1]
    assert (record["score"], record["note"]) == ("0.84", "late: after the deadline (public 0.84, private 0.83)")


def test_a_private_score_is_waited_for_until_it_is_shown(campaign, client):
    private = replace(KAGGLE, score="private")
    reserve(campaign)
    take(campaign, private)
    show(client, 1, publicScore="0.84")
    assert take(campaign, private) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    show(client, 1, publicScore="0.84", privateScore="0.83")
    assert take(campaign, private) == ["number 1 (r0001/a1, slot) scored 0.83"]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("down", "unreachable"),
        ("credentials", "credentials"),
        ("rules", "rules"),
        ("limit", "limit"),
        ("silent", "rejected"),
    ],
)
def test_a_target_that_is_down_stops_nobody_and_is_asked_again(campaign, client, mode, kind):
    reserve(campaign)
    (client / "mode").write_text(mode)
    take(campaign)
    take(campaign)
    assert (known(campaign)[0].state, known(campaign)[0].why.partition(":")[0]) == ("failed", kind)
    assert events(campaign) == ["submission", *["board_attempt", "board_score"] * (1 + (mode in ("limit", "silent")))]
    assert not [secret for secret in ("a-secret-key", "0123456789abcdef") if secret in campaign.log.read_text()]
    (client / "mode").write_text("")
    take(campaign)
    show(client, 1, publicScore="0.8")
    take(campaign)
    assert (known(campaign)[0].printed, num_sent(client)) == ("0.8", 1)


def test_a_score_that_is_known_stays_when_the_target_is_down(campaign, client):
    reserve(campaign)
    take(campaign)
    show(client, 1, publicScore="0.84")
    take(campaign)
    (client / "mode").write_text("down")
    assert "asking again failed" in take(campaign)[0]
    assert (known(campaign)[0].state, known(campaign)[0].printed) == ("scored", "0.84")


def test_an_upload_whose_answer_was_lost_is_not_sent_again(campaign, client):
    reserve(campaign)
    (client / "mode").write_text("dropped")
    assert "Connection broken" in take(campaign)[0]
    (client / "mode").write_text("")
    assert take(campaign) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    assert num_sent(client) == 1


def test_what_was_taken_is_never_sent_again_even_when_it_is_not_listed(campaign, client):
    reserve(campaign)
    (client / "mode").write_text("unlisted")
    for _ in range(3):
        assert take(campaign) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    assert num_sent(client) == 1


def test_a_list_that_is_cut_off_is_no_proof_that_nothing_was_sent(client):
    row = {"description": "another", "date": "2026-11-24 10:00:00", "status": "complete", "publicScore": "0.1"}
    (client / "list.json").write_text(json.dumps([row] * 20))
    target = Kaggle("some-competition", "public", 30)
    ticket = Ticket(3, "ours", Path("/x"), Path("/x"), since=DAY)
    with pytest.raises(TargetFailed, match="may be older") as failed:
        target.poll(ticket)
    assert failed.value.kind == "unclear"
    with pytest.raises(TargetFailed, match="may be older"):  # the log's day may be ahead of Kaggle's
        Kaggle("some-competition", "public", 30).poll(replace(ticket, since=NEXT))
    (client / "list.json").write_text(json.dumps([row] * 19))
    assert Kaggle("some-competition", "public", 30).poll(ticket) is None


def test_a_submission_that_kaggle_could_not_score_has_no_score(campaign, client):
    reserve(campaign)
    take(campaign)
    show(client, 1, status="SubmissionStatus.ERROR")
    take(campaign)
    take(campaign)
    assert (known(campaign)[0].state, num_sent(client)) == ("failed", 1)
    assert known(campaign)[0].why.startswith("rejected")


def test_caps_hold_for_what_is_sent_on_another_day(campaign, client):
    tight = replace(CAPS, per_day=2)
    for arm, day in (("a1", DAY), ("a2", DAY), ("a3", NEXT), ("a4", NEXT)):
        reserve(campaign, arm, day, tight)
    said = take(campaign, today=NEXT, caps=tight)
    assert num_sent(client) == 2 and sum("daily_cap" in line for line in said) == 2
    take(campaign, today="2026-11-26", caps=tight)
    assert num_sent(client) == 4


def test_a_second_meta_stage_leaves_the_board_to_the_first(campaign, client):
    reserve(campaign)
    with exclusive_lock(campaign.board_lock, "process with the board"):
        assert "leaves the board to another one" in take(campaign)[0]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: take(campaign), range(4)))
    assert num_sent(client) == 1


class Killed(BaseException):
    """Ends a stage where nothing can be caught, as SIGKILL does."""


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("event", ["board_attempt", "board_sent", "board_score"])
def test_killed_at_any_record_it_is_sent_once_and_scored(campaign, client, monkeypatch, event, is_written):
    reserve(campaign)
    write = Log._write

    def killed(self, file, name, payload):
        if name != event or is_written:
            write(self, file, name, payload)
        if name == event:
            raise Killed

    def meta() -> None:
        take(campaign)
        if num_sent(client):
            show(client, 1, publicScore="0.84")
            take(campaign)

    with monkeypatch.context() as dying:
        dying.setattr(Log, "_write", killed)
        with pytest.raises(Killed):
            meta()
    meta()
    assert (known(campaign)[0].printed, num_sent(client)) == ("0.84", 1)
    assert events(campaign).count("board_score") == 1


PUSH = """
import sys
from dataclasses import replace
from pipeline.external import board; from pipeline.config import settings
from pipeline.campaign.layout import Campaign
from pipeline.config.schema import External
from pipeline.decision.submission_caps import Caps
campaign = Campaign.at(sys.argv[1])
external = External(kind="kaggle", submissions=2, rows=10, competition="some-competition", timeout_seconds=90, push="login")
chosen = replace(settings.load(campaign.round("r0001").config), external=external)
board.push(campaign, {"campaign": "smoke-0a1b2c3d"}, chosen, Caps(4, 10, 2, 2), today="2026-11-24")
"""


def test_a_push_that_is_killed_takes_its_upload_with_it_and_sends_once(campaign, client):
    reserve(campaign)
    take(campaign, replace(KAGGLE, push="login"))
    (client / "mode").write_text("slow")
    command = [sys.executable, "-c", PUSH, str(campaign.folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (client / "pid").exists() or not (client / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    upload = int((client / "pid").read_text())
    while is_alive(upload):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (known(campaign)[0].state, num_sent(client)) == ("attempted", 0)
    (client / "mode").write_text("")
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True)
    assert (known(campaign)[0].state, num_sent(client)) == ("sent", 1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_the_client_it_says_so(monkeypatch):
    with pytest.raises(TargetFailed, match="no program no-such-client") as failed:
        run_client(["no-such-client"], 5)
    assert failed.value.kind == "client_missing"


@pytest.mark.parametrize("text", ["", "Traceback (most recent call last)", "ref,fileName\n1,2"])
def test_a_list_that_is_none_is_refused(text):
    with pytest.raises(TargetFailed, match="no list of submissions"):
        parse_submissions(text)


def test_the_outbox_has_what_a_login_node_needs_and_is_filled_once(campaign):
    login = replace(KAGGLE, push="login")
    reserve(campaign, "reference")
    reserve(campaign, "a2")
    assert take(campaign, login) == [
        "number 1 (r0001/reference, reference) is in the outbox", "number 2 (r0001/a2, slot) is in the outbox"
    ]  # fmt: skip
    assert sorted(path.name for path in campaign.outbox.iterdir()) == ["0001", "0001.json", "0002", "0002.json"]
    assert json.loads((campaign.outbox / "0002.json").read_text()) == {
        "number": 2, "round": "r0001", "arm": "a2", "purpose": "slot", "adapter_digest": digest_of(campaign, "a2"), "target": "kaggle",
        "message": f"smoke-0a1b2c3d 0002 {digest_of(campaign, 'a2')[:12]}",
    }  # fmt: skip
    assert adapter.kept_digest(campaign.outbox / "0002" / "adapter") == digest_of(campaign, "a2")
    assert (campaign.outbox / "0001" / "submission.zip").read_bytes() == b"PKweights of r0000/a0"
    assert events(campaign) == ["submission", "submission"]  # nothing was sent


def test_an_outbox_that_was_killed_while_it_was_filled_is_filled_again(campaign):
    login = replace(KAGGLE, push="login")
    reserve(campaign)
    (campaign.outbox / "0001" / "adapter").mkdir(parents=True)  # renamed, and then killed
    (campaign.outbox / ".0001.half").mkdir()  # killed before
    assert not outbox.is_ready(campaign, 1)
    take(campaign, login)
    assert outbox.is_ready(campaign, 1) and (campaign.outbox / "0001" / "submission.zip").exists()


def test_what_is_not_in_the_outbox_is_not_sent(campaign, client):
    reserve(campaign)
    chosen = replace(settings.load(campaign.round("r0001").config), external=replace(KAGGLE, push="login"))
    said = board.push(campaign, FACTS, chosen, CAPS, today=DAY, dry_run=True)
    assert said == ["skip number 1 (r0001/a1, slot), because it is not in the outbox"]
    board.push(campaign, FACTS, chosen, CAPS, today=DAY)
    assert num_sent(client) == 0 and "outbox" in known(campaign)[0].why
    take(campaign, replace(KAGGLE, push="login"))
    assert board.push(campaign, FACTS, chosen, CAPS, today=DAY, dry_run=True) == ["send number 1 (r0001/a1, slot)"]
    board.push(campaign, FACTS, chosen, CAPS, today=DAY)
    assert num_sent(client) == 1
    with exclusive_lock(campaign.board_lock, "process with the board"), pytest.raises(ConfigError, match="runs now"):
        board.push(campaign, FACTS, chosen, CAPS, today=DAY)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_an_adapter_that_is_not_what_was_reserved_is_not_sent(campaign, client, damage):
    reserve(campaign)
    weights = campaign.round("r0001").attempts("a1")[0].adapter_dir / adapter.WEIGHTS
    weights.write_text("others") if damage == "changed" else weights.unlink()
    take(campaign)
    assert (known(campaign)[0].state, num_sent(client)) == ("failed", 0)
    assert known(campaign)[0].why.partition(":")[0] in ("integrity", "not_found")


def command(*words: str, **more) -> External:
    return External(kind="command", submissions=1, rows=10, command=list(words), timeout_seconds=20, **more)


def test_a_site_s_scorer_gets_the_adapter_and_prints_a_number(campaign):
    reserve(campaign, target="command")
    script = 'test -f "$0/adapter_config.json" && echo looking && echo 0.$((70 + $1))'
    assert take(campaign, command("sh", "-c", script, "{adapter}", "{number}")) == [
        "number 1 (r0001/a1, slot) scored 0.71"
    ]
    assert events(campaign) == ["submission", "board_attempt", "board_sent", "board_score"]


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("echo 1.4", "not_a_score"),
        ("true", "not_a_score"),
        ("echo broken >&2; exit 3", "rejected"),
        ("echo 'curl: (6) Could not resolve host: scores' >&2; exit 6", "unreachable"),
        ("sleep 60", "timeout"),
    ],
)
def test_a_scorer_that_gives_no_score_says_why(campaign, script, kind):
    reserve(campaign, target="command")
    take(campaign, replace(command("sh", "-c", script), timeout_seconds=1))
    assert known(campaign)[0].why.partition(":")[0] == kind
    take(campaign, command("echo", "0.5"))
    assert known(campaign)[0].printed == "0.5"


def test_a_scorer_that_can_be_asked_is_not_run_twice(campaign, tmp_path):
    reserve(campaign, target="command")
    seen = tmp_path / "seen"
    scorer = command(
        "sh",
        "-c",
        f"echo {{number}} >> {seen}; echo pending",
        poll_command=["sh", "-c", f"test -f {seen} && echo pending || echo unknown"],
    )
    for _ in range(2):
        assert take(campaign, scorer) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
    scorer = replace(scorer, poll_command=["echo", "0.5"])
    assert take(campaign, scorer) == ["number 1 (r0001/a1, slot) scored 0.5"]
    assert seen.read_text() == "1\n"


def test_waiting_ends_when_the_scores_are_there_and_tells_of_all(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr(board, "POLL_SECONDS", 0.01)
    for arm in ("a1", "a2"):
        reserve(campaign, arm, target="command")
    count = tmp_path / "count"
    script = (
        f"test $0 = 1 && echo 0.4 && exit; echo x >> {count}; test $(wc -l < {count}) -gt 2 && echo 0.5 || echo pending"
    )
    scorer = command("sh", "-c", script, "{number}", wait_seconds=60)
    assert take(campaign, scorer) == ["number 1 (r0001/a1, slot) scored 0.4", "number 2 (r0001/a2, slot) scored 0.5"]


def test_a_person_sends_what_is_in_the_outbox_and_types_the_score(campaign):
    manual = External(kind="manual", submissions=1, rows=10)
    reserve(campaign, target="manual")
    for _ in range(2):
        assert (
            take(campaign, manual) == ["number 1 (r0001/a1, slot) was sent and has no score yet"]
            or events(campaign).count("board_sent") == 1
        )
    assert (campaign.outbox / "0001" / "submission.zip").exists()
    board_log.set_score(campaign, 1, "0.84")
    take(campaign, manual)
    assert known(campaign)[0].printed == "0.84"
    assert not list(campaign.outbox.iterdir())
    with pytest.raises(NotFound, match="number 2 is not reserved"):
        board_log.set_score(campaign, 2, "0.5")
    with pytest.raises(ConfigError, match="no score"):
        board_log.set_score(campaign, 1, "84")


def test_no_target_has_nothing_to_do(campaign):
    assert target_of(External(), campaign.folder) is None
    assert take(campaign, External()) == []


def test_a_client_s_words_are_cleaned(monkeypatch):
    monkeypatch.setenv("SITE_TOKEN", "hunter2-hunter2")
    said = clean(
        "bad\x1b[31m token hunter2-hunter2\nat https://me:pw@host/x KGAT_abc " + "f" * 32 + " " + "long " * 200
    )
    assert len(said) <= 300 and "\n" not in said
    said = clean("bad\x1b[31m token hunter2-hunter2\nat https://me:pw@host/x KGAT_abc " + "f" * 32)
    assert said == "bad [31m token *** at https://***host/x *** ***"
